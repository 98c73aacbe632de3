"""What an exchange of heads costs a site with a long history: its audit log, its ledger.

    python benchmarks/history.py [--lines N] [--rows N] [--before COMMIT] [--folder DIR] [--json]

Writes an audit log of so many lines and a ledger of so many rows, opens both once, as a daemon does,
and times what each exchange does with them: `AuditLog.witness`, and the ledger's head and
`Ledger.witness`. With --before the same calls of an earlier commit of this repository are timed on the
same files, in the same minute. Opening (a full verification) is timed apart: it is done once at start.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]

# Runs in a process of its own, for this build and for the earlier one. At 92fd1e7 each exchange opened
# the ledger anew; a build that keeps it open says so by having `SiteBooks`.
MEASURE = """
import json, inspect, statistics, sys, time
from pathlib import Path
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from silotune.client import clerk
from silotune.trust.audit import AuditLog
from silotune.privacy.ledger import Ledger
folder, calls, lines, rows = Path(sys.argv[1]), *map(int, sys.argv[2:])
key = Ed25519PrivateKey.generate()
public = key.public_key()
keeps = "SiteBooks" in inspect.getsource(clerk)

def timed(call):
    begun = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - begun)

found = {}
if lines:
    found["open_audit_ms"] = timed(lambda: AuditLog(folder / "audit.jsonl"))
    log = AuditLog(folder / "audit.jsonl")
    head = log.head
    signature = head.sign(key)
    found["audit_ms"] = statistics.median(
        timed(lambda: log.witness(head, signature, public)) for _ in range(calls)
    )
if rows:
    path = folder / "ledger.sqlite"
    found["open_ledger_ms"] = timed(lambda: Ledger(path, create=False).close())
    kept = Ledger(path, create=False)
    def exchange():
        ledger = kept if keeps else Ledger(path, create=False)
        head = ledger.head
        ledger.witness(head, head.sign(key), public)
        if not keeps:
            ledger.close()
    found["ledger_ms"] = statistics.median(timed(exchange) for _ in range(calls))
print(json.dumps(found))
"""


def write_history(folder: Path, *, lines: int, rows: int) -> None:
    """An audit log and a ledger as they are after years."""
    from tests.long_history import write_audit_log, write_ledger

    folder.mkdir(parents=True, exist_ok=True)
    write_audit_log(folder / "audit.jsonl", lines=lines)
    write_ledger(folder / "ledger.sqlite", rows=rows)


def measure(folder: Path, *, code: Path, calls: int, lines: int, rows: int) -> dict[str, float]:
    """Milliseconds of the calls of a build, on a copy of the files."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as copy:
        place = shutil.copytree(folder, Path(copy) / "state")
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, str(place), *map(str, (calls, lines, rows))],
            env={**os.environ, "PYTHONPATH": str(code)},
            cwd=code,
            check=True,
            capture_output=True,
            text=True,
        )
    found: dict[str, float] = json.loads(done.stdout)
    return found


def earlier(commit: str, folder: Path) -> Path:
    """The package as it was at a commit."""
    packed = subprocess.run(
        ["git", "-C", str(ROOT), "archive", commit, "silotune"], check=True, capture_output=True
    ).stdout
    folder.mkdir()
    subprocess.run(["tar", "-x", "-C", str(folder)], input=packed, check=True)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lines", type=int, default=100_000)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--before", metavar="COMMIT", help="compare with this commit")
    parser.add_argument("--at", type=int, default=48_000, help="lines of the comparison")
    parser.add_argument("--folder", type=Path, help="on the disk to be measured")
    parser.add_argument("--json", action="store_true", help="last line is one JSON object")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    numbers: dict[str, float] = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        begun = time.perf_counter()
        write_history(folder / "long", lines=options.lines, rows=options.rows)
        print(f"history written in {time.perf_counter() - begun:.0f} s", file=sys.stderr)
        sizes = {"lines": options.lines, "rows": options.rows}
        numbers |= measure(folder / "long", code=ROOT, calls=50, **sizes)
        print(
            f"{options.lines} lines: {numbers['audit_ms']:.2f} ms a call; "
            f"{options.rows} rows: {numbers['ledger_ms']:.2f} ms a call; "
            f"opened once in {numbers['open_audit_ms'] / 1000:.1f} and "
            f"{numbers['open_ledger_ms'] / 1000:.1f} s"
        )
        if options.before:
            write_history(folder / "short", lines=options.at, rows=8_000)
            old = earlier(options.before, folder / "code")
            # Before, after, before: the machine's mood falls on both.
            turns = [
                measure(folder / "short", code=code, calls=n, lines=options.at, rows=8_000)
                for code, n in ((old, 3), (ROOT, 30), (old, 3))
            ]
            for what, size in (("audit", f"{options.at} lines"), ("ledger", "8000 rows")):
                before = statistics.mean(turn[f"{what}_ms"] for turn in (turns[0], turns[2]))
                numbers[f"{what}_before_ms"] = before
                numbers[f"{what}_ratio"] = before / turns[1][f"{what}_ms"]
                print(
                    f"{size}: {before:.0f} ms at {options.before}, "
                    f"{turns[1][f'{what}_ms']:.2f} ms now: {numbers[f'{what}_ratio']:.0f} times faster"
                )
    if options.json:
        print(json.dumps({key: round(value, 3) for key, value in numbers.items()}))


if __name__ == "__main__":
    main()
