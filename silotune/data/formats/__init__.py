"""Records as hospitals and banks exchange them, as columns of text: one file a format."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

from silotune.data.formats import camt053, dicom_sr, fhir, i2b2, ofx
from silotune.data.shape import Shape
from silotune.data.table import Table

READERS: dict[str, Callable[[Path, Collection[str] | None, Shape], Table]] = {
    "fhir": fhir.read,
    "i2b2": i2b2.read,
    "camt053": camt053.read,
    "ofx": ofx.read,
    "dicom_sr": dicom_sr.read,
}
"""By format: a reader of a file, or of a folder as a whole, since a record may replace another's."""
