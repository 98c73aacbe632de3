"""The images that a dataset names: found below one folder, looked at, and told apart by their pixels.

A path in a column is a record's word, and may not lead out of the folder that site.toml names, nor over
a link. What can't be read is left out and counted. Two files with the same pixels are one image,
whatever they are called and however they are packed: so copies are on one side of the split.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from silotune.data.roles import Sieve
from silotune.errors import DatasetUnreadable, EnvironmentFault, RecordInvalid, TooFewRecords
from silotune.models.images import SUFFIXES, ImageUnread, Pixels, content_of, decoded

CONTENT = "image_content"
"""Of an example with an image: SHA-256, in hex, of its pixels."""


def look_at_images(sieve: Sieve, *, folder: Path, column: str) -> None:
    """Drop rows whose image can't be read here; the others get its whole path, and `CONTENT`.

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
    """
    if not folder.is_dir():
        raise DatasetUnreadable(
            f"{folder} is no folder", remedy="Set images of the dataset in site.toml to a folder."
        )
    names = sieve.column("image")
    contents, problems = [""] * len(names), dict[str, list[int]]()
    for row in (row for row in sieve.rows() if names[row]):
        try:
            contents[row] = content_sha256(decoded(content_of(folder, names[row])))
        except ImageUnread as exc:
            problems.setdefault(f"the image is {exc}", []).append(row)
        except EnvironmentFault as exc:  # of one format: it must not tell that an image is of it
            problems.setdefault(f"{exc.detail}: {exc.remedy}", []).append(row)
    for problem, rows in problems.items():
        sieve.drop(rows, problem, column)
    sieve.replace("image", [name and str(folder / name) for name in names])
    sieve.add(CONTENT, contents)


def content_sha256(pixels: Pixels) -> str:
    """SHA-256, in hex, of an image's shape and pixels."""
    return hashlib.sha256(f"{pixels.shape}".encode() + pixels.tobytes()).hexdigest()


def images_below(folder: Path) -> list[str]:
    """The names of all images below a folder, as a column would have them; links are not followed.

    Raises
    ------
    RecordInvalid
        Some can't be read.
    TooFewRecords
        There is none.
    """
    names = sorted(
        path.relative_to(folder).as_posix()
        for root, _, files in os.walk(folder)
        for path in (Path(root, name) for name in files)
        if path.suffix.lower() in SUFFIXES and not path.is_symlink()
    )
    if not names:
        raise TooFewRecords(
            f"{folder}: no image below it", remedy=f"Images end in {', '.join(SUFFIXES)}."
        )
    unread = []
    for name in names:
        try:
            decoded(content_of(folder, name))
        except ImageUnread as exc:
            unread.append(f"  - {name}: {exc}")
    if unread:
        raise RecordInvalid(
            "\n".join([f"{folder}: of {len(names)} images can't be read", *unread]),
            remedy="Take them out of the folder.",
        )
    return names
