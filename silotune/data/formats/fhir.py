"""FHIR bulk exports: NDJSON, one resource a line, in one file or in the parts of a folder (R4, R4B, R5).

A record is a resource of one kind. Its columns:

``text``
    What people wrote. A DocumentReference's attachment that is inline (base64) and of the type
    text/plain, else text/html or XHTML as plain text; a DiagnosticReport's conclusion and such an
    attachment; a Condition's ``code`` in words and its notes; an Observation's value in words and notes.
``patient``
    The reference to the patient as one text (`patient_of`).
``encounter``, ``id``
    Likewise, and the resource's own.
``Condition...``, ``Observation...``
    A path (`FieldPath`) into *another* resource of the same encounter: ``true`` if one of them has
    something there, ``false`` if none has, empty for a record without an encounter.
any other path
    The first plain value that stands there.

What its author took back is not trained on: a status of error, a superseded document, an older version
of the same id, a document that another one replaces. What is `contained` in a resource is never read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

from silotune.data.formats.attachments import Unread, text_of_attachments
from silotune.data.formats.gathering import Gathering, Versions
from silotune.data.formats.paths import FieldPath, text_of_scalar
from silotune.data.parts import open_part
from silotune.data.shape import Shape
from silotune.data.site import Resource
from silotune.data.table import Table
from silotune.errors import ColumnMissing, DatasetUnreadable

LONGEST_LINE = 64 * 2**20
"""Bytes of a line; what is longer is left out, and read past without being kept."""

_TAKEN_BACK = {
    "DocumentReference": ("superseded", "entered-in-error"),
    "DiagnosticReport": ("entered-in-error", "cancelled"),
    "Observation": ("entered-in-error", "cancelled"),
    "Condition": ("entered-in-error", "refuted"),
}
_TAKEN_BACK_REASON = "its status says superseded, cancelled or entered in error"
_UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_REFERENCE = re.compile(r"(?:^|/)([A-Z][A-Za-z]+)/([A-Za-z0-9.\-]{1,64})(?:/_history/[^/]+)?$")


@dataclass(frozen=True)
class _Joined:
    """A column that looks at other resources of the same encounter."""

    resource: str
    path: FieldPath


def read(path: Path, wanted: Collection[str] | None, shape: Shape) -> Table:
    """The records of an export; see the module for the columns.

    Raises
    ------
    DatasetUnreadable
        There is no file, or nothing in it is a resource (with `strict`: any line is not).
    ColumnMissing
        A column is no path.
    """
    export = _Export(path, _COLUMNS if wanted is None else wanted, shape.resource)
    for row, found in _resources(export.gathering, (shape.resource,)):
        export.take(row, found)
    table = export.gathering.table(shape.rule, without=export.versions.older())
    if shape.strict:
        export.require_resources(path, table)
    return table


class _Export:
    """One kind of resource of an export on its way into a table."""

    def __init__(self, path: Path, columns: Collection[str], kind: Resource) -> None:
        self.gathering, self.versions = Gathering(path, columns), Versions()
        self._kind, self._seen = kind, 0
        self._own, joined = _columns(self.gathering.names, kind)
        self._having = _encounters(self.gathering, joined) if joined else {}

    def take(self, row: int, found: dict[str, Any]) -> None:
        """Give a resource to the table, or say why not."""
        self._seen += 1
        name = found.get("id")
        if isinstance(name, str) and name:
            # A version that was taken back takes the older ones with it.
            self.versions.add(f"{self._kind}/{name}", row, time=_changed(found))
        if _is_taken_back(found, self._kind):
            self.gathering.leave_out(row, _TAKEN_BACK_REASON)
            return
        for target in _replaced_by(found):
            self.versions.take_back(target)
        try:
            values = [self._value(column, found) for column in self.gathering.names]
        except Unread as exc:
            self.gathering.leave_out(row, str(exc))
        else:
            self.gathering.add(row, values)

    def _value(self, column: str, found: dict[str, Any]) -> str:
        if column in self._own:
            return self._own[column](found)
        encounter = encounter_of(found)
        if not encounter:
            return ""
        return "true" if encounter in self._having[column] else "false"

    def require_resources(self, path: Path, table: Table) -> None:
        """Refuse a file that is not what it should be."""
        for fault in table.faults.found:
            if fault.problem in (_NO_JSON, _TOO_LONG):
                raise DatasetUnreadable(f"{path}: {fault}")
        if not self._seen:
            raise DatasetUnreadable(
                f"{path} has no {self._kind}: the format fhir is NDJSON, one resource a line",
                remedy="Check path and resource of the dataset. Of a Bundle, write each resource on a "
                "line of its own: jq -c '.entry[].resource' bundle.json > export.ndjson",
            )


def _columns(
    names: Collection[str], kind: Resource
) -> tuple[dict[str, Callable[[dict[str, Any]], str]], dict[str, _Joined]]:
    """How each column is read: from the resource itself, or from others of its encounter."""
    own: dict[str, Callable[[dict[str, Any]], str]] = {}
    joined: dict[str, _Joined] = {}
    for name in names:
        if name in _COLUMNS:
            own[name] = _COLUMNS[name]
            continue
        try:
            path = FieldPath.parse(name)
        except ValueError as exc:
            raise ColumnMissing(str(exc)) from None
        other = path.steps[0][0]
        if other in ("Condition", "Observation") and other != kind:
            joined[name] = _Joined(other, path)
        elif other[:1].isupper():
            raise ColumnMissing(
                f"{name!r}: a path begins with a field of {kind} or, to look at other resources of "
                "the same encounter, with Condition or Observation"
            )
        else:
            own[name] = _value_at(path)
    return own, joined


def _value_at(path: FieldPath) -> Callable[[dict[str, Any]], str]:
    def value(found: dict[str, Any]) -> str:
        return _plain(path.first(found))

    return value


def _plain(value: Any) -> str:
    """A plain value as text that has a UTF-8 form: JSON can spell half a character."""
    text = text_of_scalar(value)
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


# --- lines --------------------------------------------------------------------------------------

_NO_JSON = "not a JSON object"
_TOO_LONG = f"a line of more than {LONGEST_LINE // 2**20} MiB"


def _resources(
    gathering: Gathering, kinds: Collection[str], *, note: bool = True
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Resources of some kinds, with their rows; `note` whether lines that are none are counted."""
    marks = [f'"{kind}"'.encode() for kind in kinds]
    for part in gathering.parts():
        with open_part(part) as stream:
            for number, line in enumerate(_lines(stream), start=1):
                if line is None:
                    found, reason = None, _TOO_LONG
                elif not (line := line.strip()):
                    continue
                elif line.startswith(b"{") and not any(mark in line for mark in marks):
                    continue  # another resource, for sure, and most lines of an export are
                else:
                    found, reason = _object(line), _NO_JSON
                if found is None:
                    if note:
                        gathering.leave_out(gathering.row(number), reason)
                elif found.get("resourceType") in kinds:
                    yield gathering.row(number), found


def _lines(stream: BinaryIO) -> Iterator[bytes | None]:
    """The lines of a file; None for one that is too long."""
    while line := stream.readline(LONGEST_LINE + 1):
        if len(line) <= LONGEST_LINE:
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = stream.readline(2**20)
        yield None


_DECODER = json.JSONDecoder(parse_int=str, parse_float=str)  # numbers keep their digits


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        found = _DECODER.decode(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):  # deeper than Python's own limit
        return None
    return found if isinstance(found, dict) else None


# --- references ---------------------------------------------------------------------------------


def patient_of(resource: dict[str, Any]) -> str:
    """``Patient/ID`` for every way to refer to one patient; empty if it refers to none.

    ``Patient/ID``, an absolute URL and a version of either are one text; so are ``urn:uuid:ID`` and a
    ``Patient/ID`` of that UUID. Two servers' patients of one ID become one unit: to protect two people
    as one is safe, to take one for two is not. For that reason a reference that only has an identifier,
    or that leads to a contained resource, is none.
    """
    reference = resource.get("subject", resource.get("patient"))
    return _reference(reference, "Patient")


def encounter_of(resource: dict[str, Any]) -> str:
    """``Encounter/ID`` of a resource's first encounter, empty without one."""
    context = resource.get("context")
    places = [resource.get("encounter"), context]
    if isinstance(context, dict):  # R4's DocumentReference
        places.insert(1, context.get("encounter"))
    for place in places:
        for member in place if isinstance(place, list) else [place]:
            if found := _reference(member, "Encounter"):
                return found
    return ""


def _reference(value: Any, kind: str) -> str:
    text = value.get("reference") if isinstance(value, dict) else None
    if not isinstance(text, str):
        return ""
    text = text.strip()
    if text.lower().startswith("urn:uuid:") and value.get("type") in (None, kind):
        match = _UUID.fullmatch(text[9:])
        return f"{kind}/{match[0].lower()}" if match else ""
    found = _REFERENCE.search(text)
    if found is None or found[1] != kind:
        return ""
    name = found[2]
    return f"{kind}/{name.lower() if _UUID.fullmatch(name) else name}"


# --- what was taken back ------------------------------------------------------------------------

_VERIFIED = FieldPath.parse("verificationStatus.coding.code")
_REPLACES = FieldPath.parse("relatesTo[code=replaces].target")
_REPLACES_R5 = FieldPath.parse("relatesTo[code.coding.code=replaces].target")


def _is_taken_back(resource: dict[str, Any], kind: str) -> bool:
    found = [resource.get("status"), resource.get("docStatus")]
    if kind == "Condition":
        found = _VERIFIED.all(resource)
    return any(status in _TAKEN_BACK[kind] for status in found if isinstance(status, str))


def _replaced_by(resource: dict[str, Any]) -> Iterator[str]:
    if "relatesTo" in resource:
        for path in (_REPLACES, _REPLACES_R5):
            for target in path.all(resource):
                if found := _reference(target, "DocumentReference"):
                    yield found


def _changed(resource: dict[str, Any]) -> float:
    """When this version was made, in seconds; minus infinity if it doesn't say."""
    meta = resource.get("meta")
    text = meta.get("lastUpdated") if isinstance(meta, dict) else None
    if not isinstance(text, str):
        return float("-inf")
    try:
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError, OSError):
        return float("-inf")


def _encounters(gathering: Gathering, joined: dict[str, _Joined]) -> dict[str, frozenset[str]]:
    """For each joined column, the encounters that have something there."""
    found: dict[str, set[str]] = {name: set() for name in joined}
    kinds = {column.resource for column in joined.values()}
    for _, resource in _resources(gathering, kinds, note=False):
        kind = resource["resourceType"]
        encounter = encounter_of(resource)
        if not encounter or _is_taken_back(resource, kind):
            continue
        for name, column in joined.items():
            if column.resource == kind and column.path.all({kind: resource}):
                found[name].add(encounter)
    return {name: frozenset(encounters) for name, encounters in found.items()}


# --- texts --------------------------------------------------------------------------------------


def _text(resource: dict[str, Any]) -> str:
    return _TEXTS[str(resource["resourceType"])](resource)


def _document(resource: dict[str, Any]) -> str:
    return text_of_attachments(_ATTACHMENTS.all(resource))


def _report(resource: dict[str, Any]) -> str:
    conclusion = _plain(_CONCLUSION.first(resource))
    forms = _FORMS.all(resource)
    try:
        attached = text_of_attachments(forms) if forms else ""
    except Unread:
        if not conclusion:
            raise
        attached = ""
    return _joined([conclusion, attached], "\n\n")


def _condition(resource: dict[str, Any]) -> str:
    name = _plain(_CODE_TEXT.first(resource)) or _plain(_CODE_DISPLAY.first(resource))
    return _joined([name, *map(_plain, _NOTES.all(resource))], "\n")


def _observation(resource: dict[str, Any]) -> str:
    value = _plain(_VALUE_STRING.first(resource)) or _plain(_VALUE_TEXT.first(resource))
    return _joined([value, *map(_plain, _NOTES.all(resource))], "\n")


def _joined(parts: list[str], by: str) -> str:
    return by.join(part for part in parts if part.strip())


_ATTACHMENTS = FieldPath.parse("content.attachment")
_FORMS = FieldPath.parse("presentedForm")
_CONCLUSION = FieldPath.parse("conclusion")
_CODE_TEXT, _CODE_DISPLAY = FieldPath.parse("code.text"), FieldPath.parse("code.coding.display")
_NOTES = FieldPath.parse("note.text")
_VALUE_STRING = FieldPath.parse("valueString")
_VALUE_TEXT = FieldPath.parse("valueCodeableConcept.text")
_TEXTS: dict[str, Callable[[dict[str, Any]], str]] = {
    "DocumentReference": _document,
    "DiagnosticReport": _report,
    "Condition": _condition,
    "Observation": _observation,
}
_COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "text": _text,
    "patient": patient_of,
    "encounter": encounter_of,
    "id": lambda resource: _plain(resource.get("id")),
}
