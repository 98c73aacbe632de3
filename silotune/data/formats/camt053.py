"""ISO 20022 bank statements: camt.053, every version.

A record is a booked transaction: each of an entry's details (TxDtls), or the entry. Its columns:

``text``
    The unstructured remittance information, the additional information of a structured one and of the
    transaction; without any of them, the additional information of the entry.
``account``
    IBAN or number of the statement's account, without spaces and dashes, in capitals: the privacy unit.
    The bank's code is not part of it: two accounts of one number are protected as one.
``amount``, ``currency``
    With a minus if it is debited, in the digits of the file.
``date``, ``counterparty``, ``type``, ``id``
    The day it was booked; the other side's name; ISO's transaction code (``PMNT-RCDT-ESCT``) or the
    bank's; the bank's reference.

Entries that are pending or for information are left out, and so is a statement that was read before.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from xml.etree.ElementTree import Element

from silotune.data.formats.gathering import Gathering, require_known
from silotune.data.formats.xml_records import XmlBroken, records, text_at, text_of_element
from silotune.data.parts import open_part
from silotune.data.shape import Shape
from silotune.data.table import Table

COLUMNS = ("text", "account", "amount", "currency", "date", "counterparty", "type", "id")

_HEAD = frozenset(("Id", "ElctrncSeqNb", "LglSeqNb", "StmtPgntn", "FrToDt", "Acct"))
_NAMES_IT = ("Id", "ElctrncSeqNb", "LglSeqNb", "StmtPgntn/PgNb", "FrToDt")


def read(path: Path, wanted: Collection[str] | None, shape: Shape) -> Table:
    """The transactions of one file, or of the files of a folder.

    Raises
    ------
    DatasetUnreadable
        There is no file, one declares a document type, or none has a statement (with `strict`: one has
        none or is broken).
    ColumnMissing
        A column is not of this format.
    """
    columns = COLUMNS if wanted is None else wanted
    require_known(columns, COLUMNS, str(path))
    gathering = Gathering(path, columns)
    seen: set[tuple[str, ...]] = set()
    for part in gathering.parts():
        try:
            _read_part(part, gathering, seen)
        except XmlBroken as exc:
            gathering.break_off(str(exc), strict=shape.strict)
    return gathering.table(shape.rule)


def _read_part(part: Path, gathering: Gathering, seen: set[tuple[str, ...]]) -> None:
    statement = None
    with open_part(part) as stream:
        for holder, child in records(part, stream, {"Stmt"}):
            if child is None:
                statement = _Statement(holder, seen)
            elif child.tag == "Ntry":
                assert statement is not None
                statement.take(child, gathering)
            elif child.tag in _HEAD and holder.find(child.tag) is None:
                holder.append(child)
    if statement is None:
        raise XmlBroken("no camt.053 file: without a statement (Stmt)")


class _Statement:
    """One statement: what stands in front of its entries is read when the first of them comes."""

    def __init__(self, head: Element, seen: set[tuple[str, ...]]) -> None:
        self._head, self._seen = head, seen
        self._account: str | None = None
        self._known = False

    def take(self, entry: Element, gathering: Gathering) -> None:
        """Give the transactions of an entry to the table, or say why not."""
        if self._account is None:
            self._account = self._begin()
        reason = None
        if self._known:
            reason = "its statement was read before"
        elif (text_at(entry, "Sts/Cd") or text_at(entry, "Sts") or "BOOK") != "BOOK":
            reason = "not booked yet, or for information only"
        details = entry.findall("NtryDtls/TxDtls")
        for transaction in details or [Element("TxDtls")]:
            row = gathering.row()
            if reason is not None:
                gathering.leave_out(row, reason)
                continue
            found = _values(entry, transaction, alone=len(details) < 2)
            found["account"] = self._account
            gathering.add(row, [found[name] for name in gathering.names])

    def _begin(self) -> str:
        number = text_at(self._head, "Acct/Id/IBAN") or text_at(self._head, "Acct/Id/Othr/Id")
        account = account_of(number)
        name = (account, *(text_at(self._head, path) for path in _NAMES_IT))
        self._known = name in self._seen
        self._seen.add(name)
        return account


def account_of(number: str) -> str:
    """One text for every spelling of an account's number."""
    return re.sub(r"[\s\-]", "", number).upper()


def _values(entry: Element, details: Element, *, alone: bool) -> dict[str, str]:
    direction = text_at(details, "CdtDbtInd") or text_at(entry, "CdtDbtInd")
    amount = details.find("Amt")
    if amount is None:
        amount = details.find("AmtDtls/TxAmt/Amt")
    if amount is None and alone:  # an entry's amount is the sum of its details
        amount = entry.find("Amt")
    digits = "" if amount is None else text_of_element(amount)
    other = "RltdPties/Dbtr" if direction == "CRDT" else "RltdPties/Cdtr"
    return {
        "text": _remittance(details) or text_at(entry, "AddtlNtryInf"),
        "amount": f"-{digits}" if digits and direction == "DBIT" else digits,
        "currency": "" if amount is None else amount.get("Ccy", ""),
        "date": (text_at(entry, "BookgDt/Dt") or text_at(entry, "BookgDt/DtTm"))[:10],
        "counterparty": text_at(details, f"{other}/Nm") or text_at(details, f"{other}/Pty/Nm"),
        "type": _code(details) or _code(entry),
        "id": text_at(details, "Refs/AcctSvcrRef") or text_at(entry, "AcctSvcrRef"),
    }


def _remittance(details: Element) -> str:
    places = ("RmtInf/Ustrd", "RmtInf/Strd/AddtlRmtInf", "AddtlTxInf")
    found = (text_of_element(line) for place in places for line in details.findall(place))
    return " ".join(text for text in found if text)


def _code(element: Element) -> str:
    parts = ("Domn/Cd", "Domn/Fmly/Cd", "Domn/Fmly/SubFmlyCd")
    iso = "-".join(filter(None, (text_at(element, f"BkTxCd/{part}") for part in parts)))
    return iso or text_at(element, "BkTxCd/Prtry/Cd")
