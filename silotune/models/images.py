"""Images as arrays of bytes: PNG and JPEG by Pillow, DICOM by pydicom, within stated bounds.

Whoever made a file may have made it to stop the machine: a few kilobytes that unpack to gigabytes. So a
file's size is bounded before it is read, and the number of its pixels before they are unpacked.

DICOM: one frame, one channel. Stored values are rescaled by slope and intercept (or the modality table),
then shown by the file's first window (or table of interest); without either, from the smallest to the
largest value. MONOCHROME1 is inverted, so that more is brighter in every image. What is compressed
other than by RLE is not read, nor are colours, overlays, or text of the header.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import stat
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from silotune.errors import EnvironmentFault

if TYPE_CHECKING:
    from pydicom import Dataset

Pixels = NDArray[np.uint8]
"""[height, width] of one channel, or [height, width, 3]."""

LARGEST = 64 * 2**20
"""Bytes of a file; a larger one is not read."""

MOST_PIXELS = 40_000_000
"""Pixels of an image; more are not unpacked."""

_TOO_MANY = f"an image of more than {MOST_PIXELS // 10**6} million pixels"

SUFFIXES = (".png", ".jpg", ".jpeg", ".dcm")

_PLAIN = {"1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"}
_RLE = "1.2.840.10008.1.2.5"
_DEFLATED = b"1.2.840.10008.1.2.1.99"
_ROOM_OF_RLE = 2**20  # bytes of a header, and of runs that don't shorten


class ImageUnread(Exception):
    """Why a file is not taken as an image; the text has nothing of its content or name."""


def content_of(root: Path, name: str) -> bytes:
    """The bytes of a file below a folder.

    Parameters
    ----------
    root : Path
        The folder; it may be a link itself.
    name : str
        Relative, with ``/`` between its parts.

    Raises
    ------
    ImageUnread
        It leads out of the folder, passes a link, is no plain file, or is too large.
    """
    parts = name.split("/")
    if not name or "\0" in name or name.startswith("/") or ".." in parts:
        raise ImageUnread("not below the folder of images")
    parts = [part for part in parts if part not in {"", "."}]
    try:
        held = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as exc:
        raise ImageUnread(_why(exc)) from None
    try:
        for number, part in enumerate(parts, start=1):
            # Each part by itself, so that no link is followed, whoever puts one there meanwhile; a pipe
            # would be waited for.
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            flags |= os.O_DIRECTORY if number < len(parts) else 0
            below = os.open(part, flags, dir_fd=held)
            os.close(held)
            held = below
        return _read(held)
    except OSError as exc:
        raise ImageUnread(_why(exc)) from None
    finally:
        os.close(held)


def _read(descriptor: int) -> bytes:
    about = os.fstat(descriptor)
    if not stat.S_ISREG(about.st_mode):
        raise ImageUnread("not a plain file")
    with os.fdopen(os.dup(descriptor), "rb") as file:
        content = file.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise ImageUnread(f"a file of more than {LARGEST // 2**20} MiB")
    return content


def _why(exc: OSError) -> str:
    if exc.errno in {errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG}:
        # O_DIRECTORY with O_NOFOLLOW says "not a directory" of a link too.
        return "not there, or behind a link"
    return "a link" if exc.errno == errno.ELOOP else "a file that can't be opened"


def decoded(content: bytes) -> Pixels:
    """The image in a file's bytes.

    Raises
    ------
    ImageUnread
        It is none of the formats, damaged, too large, or of several frames.
    EnvironmentFault
        The library for its format is not installed.
    """
    try:
        if content[128:132] == b"DICM":
            return _dicom(content)
        return _picture(content)
    except (ImageUnread, EnvironmentFault):
        raise
    except MemoryError:
        raise ImageUnread("an image that takes more memory than there is") from None
    # What libraries raise for a damaged file is no one family, and quotes what it found.
    except Exception:
        raise ImageUnread("not a PNG, JPEG or DICOM image that can be read") from None


def _bound(height: int, width: int) -> None:
    if height * width > MOST_PIXELS:
        raise ImageUnread(_TOO_MANY)
    if not (height and width):
        raise ImageUnread("an image without pixels")


def _picture(content: bytes) -> Pixels:
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise EnvironmentFault(
            "images need Pillow", remedy="pip install 'silotune[images]'"
        ) from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image: Any = Image.open(io.BytesIO(content), formats=("PNG", "JPEG"))
        except Image.DecompressionBombError:  # Pillow's own bound is higher
            raise ImageUnread(_TOO_MANY) from None
        _bound(image.height, image.width)
        if image.format == "PNG" and getattr(image, "n_frames", 1) > 1:
            raise ImageUnread("one of several frames")
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits, of which Pillow would cut off the upper ones
        return (np.asarray(image, dtype=np.int64).clip(0, 65535) >> 8).astype(np.uint8)
    if image.mode in {"1", "L"}:
        return np.asarray(image.convert("L"))
    if image.mode in {"LA", "La", "PA", "RGBA", "RGBa"} or "transparency" in image.info:
        image = Image.alpha_composite(Image.new("RGBA", image.size), image.convert("RGBA"))
    return np.asarray(image.convert("RGB"))


def _dicom(content: bytes) -> Pixels:
    try:
        import pydicom
    except ImportError:
        raise EnvironmentFault(
            "DICOM images need pydicom", remedy="pip install 'silotune[dicom]'"
        ) from None
    if _DEFLATED in content[:4096]:
        raise ImageUnread("packed within (deflated transfer syntax)")  # and unpacks to any size
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)  # its remarks quote values
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = pydicom.dcmread(io.BytesIO(content))
        _require_readable(found, len(content))
        return _shown(found, np.asarray(found.pixel_array))


def _require_readable(found: Dataset, size: int) -> None:
    """Check what can be known before pixels are unpacked."""
    if "Rows" not in found:
        raise ImageUnread("a DICOM file without an image")
    height, width = int(found.Rows), int(found.Columns)
    _bound(height, width)
    if int(found.get("NumberOfFrames") or 1) != 1:
        raise ImageUnread("one of several frames")
    if str(found.get("PhotometricInterpretation")) not in {"MONOCHROME1", "MONOCHROME2"}:
        raise ImageUnread("a DICOM image in colour")
    if int(found.get("SamplesPerPixel") or 1) != 1:
        raise ImageUnread("a DICOM image in colour")
    syntax = str(found.file_meta.TransferSyntaxUID)
    if syntax == _RLE:
        if size > 2 * height * width * int(found.BitsAllocated) // 8 + _ROOM_OF_RLE:
            raise ImageUnread("longer than its pixels")
    elif syntax not in _PLAIN:
        raise ImageUnread(
            "compressed other than by RLE: unpack it first, with dcmdjpeg for example"
        )


def _shown(found: Dataset, stored: NDArray[Any]) -> Pixels:
    """Stored values as a viewer shows them at first."""
    from pydicom.pixels.processing import apply_modality_lut, apply_voi_lut

    values = np.asarray(apply_modality_lut(stored, found), dtype=np.float64)
    if found.get("VOILUTSequence"):
        bits = int(found.VOILUTSequence[0].LUTDescriptor[2])
        shares = np.asarray(apply_voi_lut(stored, found, index=0), np.float64) / (2**bits - 1)
    elif found.get("WindowWidth") is not None and found.get("WindowCenter") is not None:
        shares = _windowed(values, found)
    else:
        low, high = float(values.min()), float(values.max())
        shares = (values - low) / (high - low or 1.0)
    shares = np.nan_to_num(shares).clip(0.0, 1.0)
    if found.PhotometricInterpretation == "MONOCHROME1":
        shares = 1.0 - shares
    shown: Pixels = np.rint(shares * 255.0).astype(np.uint8)
    return shown


def _windowed(values: NDArray[np.float64], found: Dataset) -> NDArray[np.float64]:
    """The first window, by its function: DICOM PS3.3, C.11.2.1.2 and C.11.2.1.3."""
    centre, width = _first(found.WindowCenter), _first(found.WindowWidth)
    function = str(found.get("VOILUTFunction") or "LINEAR")
    if function == "SIGMOID":
        return np.asarray(1.0 / (1.0 + np.exp(-4.0 * (values - centre) / width)))
    if function == "LINEAR_EXACT":
        return (values - centre) / width + 0.5
    if width <= 1.0:
        return (values > centre - 0.5).astype(np.float64)
    return (values - (centre - 0.5)) / (width - 1.0) + 0.5


def _first(value: Any) -> float:
    return float(value if isinstance(value, (int, float, str)) else value[0])


def channels(pixels: Pixels, number: int) -> Pixels:
    """An image with one or three channels, [height, width, number]."""
    if pixels.ndim == 2:
        return np.repeat(pixels[:, :, None], number, axis=2)
    if number == 3:
        return pixels
    weights = np.array([299, 587, 114], dtype=np.int64)  # of ITU-R BT.601
    return ((pixels.astype(np.int64) @ weights + 500) // 1000).astype(np.uint8)[:, :, None]


def drawn(number: int, *, size: int = 64) -> Pixels:
    """A public picture [size, size, 3], in whole numbers alone: the same on every machine.

    Waves, discs and stripes of a few colours; which ones follows from the number.
    """
    y, x = np.mgrid[0:size, 0:size].astype(np.int64)
    a, b, c = (number * step % 29 + 3 for step in (5, 7, 11))
    disc = (x - size * (a % 5 + 1) // 6) ** 2 + (y - size * (b % 5 + 1) // 6) ** 2
    parts = (
        (x * a + y * b) % (32 * c) * 255 // (32 * c - 1),
        np.where(disc < (size * (c % 7 + 2) // 16) ** 2, 235 - 5 * a, 4 * b),
        (x // (c % 9 + 1) + y // (a % 9 + 1)) % 2 * (150 + 3 * b) + number % 3 * 20,
    )
    turn = number % 3
    return np.stack([parts[(turn + k) % 3] for k in range(3)], axis=2).clip(0, 255).astype(np.uint8)
