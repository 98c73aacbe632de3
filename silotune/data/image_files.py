"""The images that a dataset names: found below one folder, looked at, and told apart by their pixels.

A path in a column is a record's word, and may not lead out of the folder that site.toml names, nor over
a link. What can't be read is left out and counted. Two files with the same pixels are one image,
whatever they are called and however they are packed: so copies are on one side of the split.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from silotune.data.roles import Sieve
from silotune.errors import DatasetUnreadable
from silotune.models.images import ImageUnread, Pixels, content_of, decoded

CONTENT = "image_content"
"""Of an example with an image: SHA-256, in hex, of its pixels."""


def look_at_images(sieve: Sieve, *, folder: Path, column: str) -> None:
    """Drop rows without an image that can be read; the others get its whole path, and `CONTENT`.

    Parameters
    ----------
    sieve : Sieve
        With the role ``image``: paths below `folder`.
    folder : Path
        Where the images are.
    column : str
        Where the paths come from, for messages.

    Raises
    ------
    DatasetUnreadable
        There is no such folder.
    EnvironmentFault
        A library that an image needs is not installed.
    """
    if not folder.is_dir():
        raise DatasetUnreadable(
            f"{folder} is no folder", remedy="Set images of the dataset in site.toml to a folder."
        )
    names = sieve.column("image")
    contents, problems = [""] * len(names), dict[str, list[int]]()
    for row in sieve.rows():
        try:
            contents[row] = content_sha256(decoded(content_of(folder, names[row])))
        except ImageUnread as exc:
            problems.setdefault(str(exc), []).append(row)
    for problem, rows in problems.items():
        sieve.drop(rows, f"the image is {problem}", column)
    sieve.replace("image", [str(folder / name) for name in names])
    sieve.add(CONTENT, contents)


def content_sha256(pixels: Pixels) -> str:
    """SHA-256, in hex, of an image's shape and pixels."""
    return hashlib.sha256(f"{pixels.shape}".encode() + pixels.tobytes()).hexdigest()
