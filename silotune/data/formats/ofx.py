"""OFX bank statements: version 1 (SGML) and version 2 (XML), of banks, cards and investment accounts.

A record is a posted transaction (STMTTRN), with the columns of `silotune.data.formats.camt053`:
``text`` is name and memo without repeats, ``account`` the number, ``type`` TRNTYPE, ``id`` FITID.

It is read by its tags alone: in version 1 a value's tag need not be closed, and that is all in which
the versions differ here. So there is no XML parser and no entity but HTML's and numbers.

A transaction that a later one corrects or deletes, or that was downloaded twice, is left out.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import BinaryIO

from silotune.data.formats.camt053 import COLUMNS, account_of
from silotune.data.formats.gathering import Gathering, Versions, require_known
from silotune.data.formats.html_text import unescaped
from silotune.data.parts import open_part
from silotune.data.shape import Shape
from silotune.data.table import Table
from silotune.errors import DatasetUnreadable

MOST_TEXT = 2**17
"""Bytes of a value (OFX allows 255); a file with more of them and no tag is not OFX."""

MOST_VALUES = 200
"""Values of one transaction; those beyond it are not read."""

_CHUNK = 2**16
_TAG = re.compile(r"(/?)([A-Za-z][A-Za-z0-9.]*)\s*/?>")
_WRAPPED = {"![CDATA[": "]]>", "!--": "-->"}
_STATEMENTS = frozenset(("STMTRS", "CCSTMTRS", "INVSTMTRS"))
_CODE_PAGES = ("cp12", "windows-12", "iso-8859-", "iso8859-")
_CODEC = re.compile(rb"CHARSET:\s*([\w-]+)|encoding\s*=\s*[\"']([\w-]+)[\"']", re.IGNORECASE)


_TOO_LONG = f"not OFX: {MOST_TEXT // 1024} KiB without a tag"


class _OfxBroken(Exception):
    """The file is not OFX from here on."""


def read(path: Path, wanted: Collection[str] | None, shape: Shape) -> Table:
    """The transactions of one file, or of the files of a folder.

    Raises
    ------
    DatasetUnreadable
        There is no file, one declares a document type, or none is OFX (with `strict`: one is not).
    ColumnMissing
        A column is not of this format.
    """
    columns = COLUMNS if wanted is None else wanted
    require_known(columns, COLUMNS, str(path))
    gathering, versions = Gathering(path, columns), Versions()
    for part in gathering.parts():
        try:
            with open_part(part) as stream:
                for transaction in _transactions(_tags(stream, part)):
                    _take(transaction, gathering, versions)
        except _OfxBroken as exc:
            gathering.break_off(str(exc), strict=shape.strict)
    return gathering.table(shape.rule, without=versions.older())


def _take(found: dict[str, str], gathering: Gathering, versions: Versions) -> None:
    row, account = gathering.row(), found["account"]
    if corrected := found.get("CORRECTFITID"):
        versions.take_back(f"{account} {corrected}")
        if found.get("CORRECTACTION", "").upper() == "DELETE":
            gathering.leave_out(row, "it only deletes another transaction")
            return
    name, other, memo = (found.get(tag, "") for tag in ("FITID", "NAME", "MEMO"))
    if name:
        versions.add(f"{account} {name}", row)
    day = found.get("DTPOSTED", "")[:8]
    values = {
        "text": memo if memo.startswith(other) else f"{other} {memo}".strip(),
        "account": account,
        "amount": found.get("TRNAMT", ""),
        "currency": found.get("CURSYM") or found["CURDEF"],
        "date": f"{day[:4]}-{day[4:6]}-{day[6:]}" if len(day) == 8 else "",
        "counterparty": other,
        "type": found.get("TRNTYPE", "").upper(),
        "id": name,
    }
    gathering.add(row, [values[column] for column in gathering.names])


class _Cursor:
    """Where in a file a tag stands: the statement's account, and the transaction that is open."""

    def __init__(self) -> None:
        self.current: dict[str, str] | None = None
        self.is_ofx = False
        self._account = self._currency = self._whose = ""

    def ended_by(self, closing: bool, tag: str) -> dict[str, str] | None:
        """The transaction that ends at this tag, if one does."""
        if tag != "STMTTRN" and tag not in _STATEMENTS:
            return None
        ended, self.current = self.current, None
        if tag in _STATEMENTS:
            self._account = self._currency = self._whose = ""
        elif not closing:
            self.current = {"account": self._account, "CURDEF": self._currency}
        return ended

    def take(self, closing: bool, tag: str, value: str) -> None:
        """Keep a value where it belongs."""
        self.is_ofx |= tag == "OFX"
        if tag.endswith(("ACCTFROM", "ACCTTO")):
            self._whose = "" if closing else tag
        elif closing or not value:
            return
        elif self.current is not None:
            if len(self.current) < MOST_VALUES:
                self.current.setdefault(tag, value)
        elif tag == "ACCTID" and self._whose.endswith("FROM"):
            self._account = account_of(value)
        elif tag == "CURDEF":
            self._currency = value


def _transactions(tags: Iterator[tuple[bool, str, str]]) -> Iterator[dict[str, str]]:
    """Each STMTTRN as its values by tag, with ``account`` and CURDEF of its statement."""
    place = _Cursor()
    for closing, tag, value in tags:
        if ended := place.ended_by(closing, tag):
            yield ended
        place.take(closing, tag, value)
    if not place.is_ofx:
        raise _OfxBroken("no OFX file")
    if place.current is not None:
        raise _OfxBroken("cut off within a transaction")


def _tags(stream: BinaryIO, part: Path) -> Iterator[tuple[bool, str, str]]:
    """Each tag in order: whether it closes, its name, and the value behind it."""
    closing, tag, value, size = False, "", [""], 0
    end = ""  # of what stands within CDATA or a comment
    for piece in _pieces(stream):
        size += len(piece) + 1
        if size > MOST_TEXT:
            raise _OfxBroken(_TOO_LONG)
        mark = "" if end else next((mark for mark in _WRAPPED if piece.startswith(mark)), "")
        match = None if end or mark else _TAG.match(piece)
        if match is not None:
            yield closing, tag, "".join(value).strip()
            closing, tag, size = bool(match[1]), match[2].upper(), len(piece)
            value = [unescaped(piece[match.end() :])]
        elif end or mark:
            text = piece[len(mark) :] if mark else f"<{piece}"
            end = end or _WRAPPED[mark]
            inside, closed, rest = text.partition(end)
            value.append(inside if end == "]]>" else "")
            value.append(unescaped(rest))
            end = "" if closed else end
        elif piece[:8].upper() == "!DOCTYPE":
            raise DatasetUnreadable(
                f"{part} declares a document type (DOCTYPE), which OFX files don't have"
            )
        else:
            value.append("<" + unescaped(piece))  # of a bank that doesn't escape it
    yield closing, tag, "".join(value).strip()


def _pieces(stream: BinaryIO) -> Iterator[str]:
    """The text behind each ``<``, from a stream that may be endless."""
    raw, codec, ended = b"", "", False
    while not ended:
        chunk = stream.read(_CHUNK)
        ended = not chunk
        raw += chunk
        codec = codec or _codec(raw)
        *whole, raw = raw.split(b"<")
        if len(raw) > MOST_TEXT:
            raise _OfxBroken(_TOO_LONG)
        for piece in [*whole, raw] if ended else whole:
            yield _decoded(piece, codec)


def _codec(head: bytes) -> str:
    """The code page that a header names (``CHARSET:1252``, ``encoding="ISO-8859-1"``)."""
    match = _CODEC.search(head[:4096])
    name = (match[1] or match[2]).decode().lower() if match else ""
    name = f"cp{name}" if name.isdigit() else name
    try:
        return codecs.lookup(name).name if name.startswith(_CODE_PAGES) else "cp1252"
    except LookupError:
        return "cp1252"


def _decoded(piece: bytes, codec: str) -> str:
    """Banks write UTF-8 whatever the header says; what is none is in the code page of the header."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return piece.decode(codec, "replace")
