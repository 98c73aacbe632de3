"""Books as they are after years: an audit log and a ledger with many lines, written in a moment."""

import json
import os

from silotune.privacy.events import gaussian_event, to_json
from silotune.privacy.ledger import Ledger
from silotune.privacy.ledger_table import _INSERT, LedgerEntry, Row
from silotune.trust.audit import Line
from silotune.trust.chain import GENESIS

_THEN = "2026-01-01T00:00:00.000+00:00"


def write_audit_log(path, *, lines):
    """An audit log of so many lines, that of ``alpha``."""
    place = GENESIS
    with _private(path) as file:
        for number in range(lines):
            kind = "answered" if number else "opened"
            fields = (
                {"run": "r", "round": number, "type": "train"} if number else {"owner": "alpha"}
            )
            line = Line.after(place, time=_THEN, kind=kind, fields=fields)
            file.write(line.to_bytes())
            place = line.head
    _head(path, vars(place))


def write_ledger(path, *, rows, rounds=49):
    """A ledger of so many rows: runs of so many rounds each."""
    ledger = Ledger(path, to_disk=False)
    base = LedgerEntry("charge", "d", "r", _THEN, plan_sha256="ab" * 32)
    event, budget = str(to_json(gaussian_event(40.0))), '{"delta": 1e-05, "epsilon": 1000000.0}'
    head, database = GENESIS, ledger._table._db
    database.execute("BEGIN IMMEDIATE")
    for number in range(rows):
        turn = number % (rounds + 1)
        changes = {"run": f"r{number // (rounds + 1)}", "event": event}
        if turn:
            changes |= {"round": turn, "release": "update", "payload_sha256": "cd" * 32}
        else:
            changes |= {"kind": "reserve", "budget": budget}
        row = Row.after(head, LedgerEntry(**{**vars(base), **changes}))
        database.execute(_INSERT, row.as_dict())
        head = row.head
    database.execute("COMMIT")
    ledger.close()
    _head(path, vars(head))


def _head(path, content):
    with _private(path.with_name(path.name + ".head")) as file:
        file.write(json.dumps(content).encode())


def _private(path):
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb")
