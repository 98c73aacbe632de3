"""DICOM structured reports: the radiologist's text, one file a report.

A record is a file of a structured report's SOP class; images beside it are passed over. The columns:

``text``
    The headings, texts, codes in words and measurements below the title, one a line, in order. Who
    reported and how it was acquired (observation and acquisition context) is not part of it.
``patient``, ``study``, ``id``
    Patient ID (without its issuer: two people of one number are protected as one), study, and instance.
``title``, ``code``
    What kind of report it is, in words and as a code.
``completion``, ``verification``
    ``COMPLETE`` or ``PARTIAL``, ``VERIFIED`` or ``UNVERIFIED``.

A report that names its predecessors replaces them.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from silotune.data.formats.gathering import Gathering, Versions, require_known
from silotune.data.parts import open_part
from silotune.data.shape import Shape
from silotune.data.table import Table
from silotune.errors import DatasetUnreadable

if TYPE_CHECKING:
    from pydicom import Dataset

COLUMNS = ("text", "patient", "study", "id", "title", "code", "completion", "verification")

LARGEST = 64 * 2**20
"""Bytes of a report; a larger file is left out unread."""

_MOST_ITEMS = 100_000
_STRUCTURED_REPORTS = "1.2.840.10008.5.1.4.1.1.88."
_DEFLATED = b"1.2.840.10008.1.2.1.99"
_FOLLOWED = frozenset(("CONTAINS", "HAS PROPERTIES", "INFERRED FROM"))


def read(path: Path, wanted: Collection[str] | None, shape: Shape) -> Table:
    """The reports of a file or of a folder.

    Raises
    ------
    DatasetUnreadable
        There is no file, pydicom is not installed, or no file is DICOM.
    ColumnMissing
        A column is not of this format.
    """
    columns = COLUMNS if wanted is None else wanted
    require_known(columns, COLUMNS, str(path))
    gathering, versions = Gathering(path, columns), Versions()
    for part in gathering.parts():
        try:
            report = _report(part)
            if report is None:
                continue
            values = _values(report)
            replaced = list(_predecessors(report))
        except DatasetUnreadable:  # no pydicom, no file
            raise
        # What pydicom raises for a damaged file is no one family, and quotes what it found.
        except Exception as exc:
            reason = str(exc) if isinstance(exc, _Unread) else "not a DICOM file that can be read"
            gathering.break_off(reason, strict=shape.strict)
            continue
        row = gathering.row()
        versions.add(values["id"], row)
        for name in replaced:
            versions.take_back(name)
        gathering.add(row, [values[name] for name in gathering.names])
    table = gathering.table(shape.rule, without=versions.older())
    if shape.strict and not gathering.rows:
        raise DatasetUnreadable(f"{path} has no DICOM structured report")
    return table


class _Unread(Exception):
    """Why a file is not read."""


def _report(part: Path) -> Dataset | None:
    """The data set of a structured report; None for one of another kind."""
    try:
        import pydicom
    except ImportError:
        raise DatasetUnreadable(
            f"{part} needs pydicom", remedy="pip install 'silotune[dicom]'"
        ) from None
    with open_part(part) as stream:
        content = stream.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise _Unread(f"a file of more than {LARGEST // 2**20} MiB")
    if _DEFLATED in content[:4096]:
        raise _Unread("packed within (deflated transfer syntax)")  # and unpacks to any size
    # Its remarks quote values.
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = pydicom.dcmread(io.BytesIO(content), stop_before_pixels=True)
        found.decode()
    kind = str(found.get("SOPClassUID", ""))
    return found if kind.startswith(_STRUCTURED_REPORTS) else None


def _values(report: Dataset) -> dict[str, str]:
    title = _first(report, "ConceptNameCodeSequence")
    return {
        "text": "\n".join(_lines(report)),
        "patient": _text(report, "PatientID"),
        "study": _text(report, "StudyInstanceUID"),
        "id": _text(report, "SOPInstanceUID"),
        "title": "" if title is None else _text(title, "CodeMeaning"),
        "code": "" if title is None else _text(title, "CodeValue"),
        "completion": _text(report, "CompletionFlag"),
        "verification": _text(report, "VerificationFlag"),
    }


def _lines(report: Dataset) -> Iterator[str]:
    """What stands below the report's title, in its order, without recursion."""
    open_items = _below(report)
    seen = 0
    while open_items:
        item = open_items.pop()
        seen += 1
        if seen > _MOST_ITEMS:
            raise _Unread(f"a report of more than {_MOST_ITEMS:,} items")
        if line := _line(item):
            yield line
        open_items.extend(_below(item))


def _below(item: Dataset) -> list[Dataset]:
    """What an item holds of the report itself, the first of it last."""
    found = item.get("ContentSequence") or []
    return [child for child in reversed(found) if _text(child, "RelationshipType") in _FOLLOWED]


def _line(item: Dataset) -> str:
    concept = _first(item, "ConceptNameCodeSequence")
    name = "" if concept is None else _text(concept, "CodeMeaning")
    kind = _text(item, "ValueType")
    if kind == "CONTAINER":
        return name
    if kind == "TEXT":
        return _text(item, "TextValue")
    if kind == "CODE":
        code = _first(item, "ConceptCodeSequence")
        value = "" if code is None else _text(code, "CodeMeaning")
    elif kind == "NUM":
        measured = _first(item, "MeasuredValueSequence")
        unit = None if measured is None else _first(measured, "MeasurementUnitsCodeSequence")
        parts = [
            "" if measured is None else _text(measured, "NumericValue"),
            "" if unit is None else _text(unit, "CodeValue"),
        ]
        value = " ".join(filter(None, parts))
    else:
        return ""
    return f"{name}: {value}" if name and value else value


def _predecessors(report: Dataset) -> Iterator[str]:
    for document in report.get("PredecessorDocumentsSequence") or []:
        for series in document.get("ReferencedSeriesSequence") or []:
            for instance in series.get("ReferencedSOPSequence") or []:
                yield _text(instance, "ReferencedSOPInstanceUID")


def _first(holder: Dataset, name: str) -> Dataset | None:
    found = holder.get(name)
    return found[0] if found else None


def _text(holder: Dataset, name: str) -> str:
    value: Any = holder.get(name)
    return "" if value is None else str(value).strip()
