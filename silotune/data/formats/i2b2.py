"""XML of i2b2: the notes of its challenges (now n2c2), and observations of its patient data object.

A record is, by what the file is:

- a ``RECORD`` of ``ROOT`` or a ``doc`` of ``docs`` (challenges of 2006 and 2008: many notes in a file);
- the file itself, if its root has a ``TEXT`` (2012, 2014, 2018: a folder with a file for each note);
- an ``observation`` of an ``observation_set`` (a patient data object, as the hive's cells export it).

Its columns:

``text``
    ``TEXT``; of an observation its ``observation_blob``, or ``tval_char`` if that is a text value.
``patient``
    ``patient_id`` or ``patient_num``; of a file the part of its name before the first ``-``
    (``110-02.xml`` is the second note of patient 110); of a RECORD or doc its number, since these
    files name no patients.
``record``
    The number of the record, the name of the file, or the observation's event.
any other path
    The text below the record at ``A/B``, or the attribute ``A/@b``: ``SMOKING/@STATUS``,
    ``TAGS/ABDOMINAL/@met``, ``concept_cd``; ``A[@b='c']/B`` picks by an attribute.

An observation that stands in the files again (the same event, patient, concept, time and instance) is
used once, as it was last.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from pathlib import Path
from xml.etree.ElementTree import Element

from silotune.data.formats.gathering import Gathering, Versions
from silotune.data.formats.xml_records import XmlBroken, records, text_at
from silotune.data.parts import open_part
from silotune.data.shape import Shape
from silotune.data.table import Table
from silotune.errors import ColumnMissing

COLUMNS = ("text", "patient", "record")

_NAME = r"[\w.\-]+"
_STEP = rf"{_NAME}(?:\[@{_NAME}='[^']*'\])?"
_PATH = re.compile(rf"(?:{_STEP}/)*(?:{_STEP}|@{_NAME})")

# Holders of records, and what else is large in a patient data object.
_HOLDERS = frozenset(("ROOT", "docs", "observation_set", "patient_set", "event_set", "concept_set"))
_RECORDS = frozenset(("RECORD", "doc", "observation"))
_FACT = ("event_id", "patient_id", "concept_cd", "observer_cd", "start_date", "modifier_cd",
         "instance_num")  # fmt: skip
_OLD_NAMES = {
    "event_id": "encounter_num",
    "patient_id": "patient_num",
    "observer_cd": "provider_id",
}


def read(path: Path, wanted: Collection[str] | None, shape: Shape) -> Table:
    """The records of one file, or of the files of a folder.

    Raises
    ------
    DatasetUnreadable
        There is no file, one declares a document type, or none has a record (with `strict`: one has
        none or is broken).
    ColumnMissing
        A column is no path.
    """
    columns = COLUMNS if wanted is None else wanted
    for column in columns:
        if not _PATH.fullmatch(column):
            raise ColumnMissing(f"{column!r} is no path such as SMOKING/@STATUS")
    gathering, versions = Gathering(path, columns), Versions()
    for part in gathering.parts():
        found = False
        try:
            for record in _records(part):
                found = True
                row = gathering.row()
                if record.tag == "observation" and _fact(record, "event_id"):
                    versions.add("\0".join(_fact(record, name) for name in _FACT), row)
                gathering.add(row, [_value(record, part, name) for name in gathering.names])
            if not found:
                raise XmlBroken("no i2b2 file: without a RECORD, doc, TEXT or observation")
        except XmlBroken as exc:
            gathering.break_off(str(exc), strict=shape.strict)
    return gathering.table(shape.rule, without=versions.older())


def _records(part: Path) -> Iterator[Element]:
    """The records of a file; of one that is a note, its root."""
    note: Element | None = None
    with open_part(part) as stream:
        for holder, child in records(part, stream, _HOLDERS, root=True):
            if child is None:
                continue
            if child.tag in _RECORDS:
                yield child
            elif holder.tag not in _HOLDERS:
                note = holder
                if child.tag in ("TEXT", "TAGS") and note.find(child.tag) is None:
                    note.append(child)
    if note is not None and note.find("TEXT") is not None:
        yield note


def _value(record: Element, part: Path, column: str) -> str:
    if column == "text":
        return _text(record)
    if column == "patient":
        if record.tag == "observation":
            return _fact(record, "patient_id")
        return _number(record) if record.tag in _RECORDS else part.name.split(".")[0].split("-")[0]
    if column == "record":
        if record.tag == "observation":
            return _fact(record, "event_id")
        return _number(record) if record.tag in _RECORDS else part.name.split(".")[0]
    return text_at(record, column)


def _text(record: Element) -> str:
    if record.tag != "observation":
        return text_at(record, "TEXT") or text_at(record, "text")
    value = text_at(record, "tval_char") if text_at(record, "valuetype_cd") == "T" else ""
    return text_at(record, "observation_blob") or value


def _number(record: Element) -> str:
    return record.get("ID") or record.get("id") or ""


def _fact(observation: Element, name: str) -> str:
    return text_at(observation, name) or text_at(observation, _OLD_NAMES.get(name, name))
