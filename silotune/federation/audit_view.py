"""Audit logs as an auditor reads them: selected lines, exports, and two sides compared."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from silotune.federation.audit_line import Line, signed_head
from silotune.federation.audit_log import AUDIT_FILE, COUNTER_SIGNED, WITNESSED, AuditLog
from silotune.federation.errors import AuditLogDamaged

ExportFormat = Literal["jsonl", "csv"]


def open_log(place: Path) -> AuditLog:
    """The audit log at a file, or in a state folder; it must be there.

    Raises
    ------
    AuditLogDamaged
        No log there, or not a whole one.
    """
    return AuditLog(place / AUDIT_FILE if place.is_dir() else place)


def select(
    lines: Iterable[Line], *, kind: str = "", run: str = "", since: str = "", until: str = ""
) -> list[Line]:
    """Lines of a kind, of a run, and between two times (ISO 8601, compared as text in UTC)."""
    return [
        line
        for line in lines
        if (not kind or line.kind == kind)
        and (not run or line.fields.get("run") == run)
        and line.time >= since
        and (not until or line.time <= until)
    ]


def export(lines: Sequence[Line], form: ExportFormat) -> str:
    """Lines as JSON lines, byte for byte as they are in the log, or as CSV for a spreadsheet."""
    if form == "jsonl":
        return "".join(line.to_bytes().decode() for line in lines)
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(["seq", "time", "kind", "particulars", "hash"])
    for line in lines:
        particulars = json.dumps(dict(line.fields), sort_keys=True)
        writer.writerow([line.seq, line.time, line.kind, particulars, line.hash])
    return out.getvalue()


def compare(log: AuditLog, other: AuditLog) -> int:
    """Hold a log against what the other side signed of it.

    Returns
    -------
    int
        Heads of `log` that the other side's log has signed and that are in `log`.

    Raises
    ------
    AuditLogDamaged
        `log` lacks or contradicts a line that the other side has signed, or shows a signature
        that the other side has no memory of.
    """
    lines = log.lines()
    places, remembered = {line.place for line in lines}, set()
    signed = [line for line in other.lines() if line.kind == COUNTER_SIGNED]
    # A coordinator's log is witnessed by every site: only what `other` signs with is its business.
    keys = {line.fields.get("key") for line in signed}
    for line in signed:
        if line.fields.get("log") == log.owner:
            head = signed_head(line)
            if (head.seq, head.hash) not in places:
                raise AuditLogDamaged(
                    f"{other.path} counter-signed line {head.seq} of {log.owner!r}, "
                    f"and {log.path} does not have that line"
                )
            remembered.add((head.seq, head.hash))
    for line in lines:
        if line.kind == WITNESSED and line.fields.get("key") in keys:
            head = signed_head(line)
            if (head.seq, head.hash) not in remembered and head.seq <= _newest(remembered):
                raise AuditLogDamaged(
                    f"{other.path} lacks the counter-signature over line {head.seq} that "
                    f"{log.path} shows"
                )
    return len(remembered)


def _newest(places: Iterable[tuple[int, str]]) -> int:
    return max((seq for seq, _ in places), default=0)
