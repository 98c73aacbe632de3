"""Wrote the golden files: state of every kind that this package keeps, made by one build.

``python -m tests.golden.make`` makes what is missing and leaves what is there: a golden file is a
promise that every later release reads it. A new format gets a new name here, and a migration; the old
file stays. All keys and passphrases in them are public and protect nothing.
"""

import json
import sqlite3
import tempfile
from pathlib import Path

from tests.golden import (
    evaluations,
    make_coordinator,
    make_runs,
    make_site,
    read_coordinator,
    read_runs,
    read_site,
    values,
)
from tests.golden.registry import GOLDEN, READERS, WRITERS, private_copy, told_by

PARTS = (
    evaluations,
    make_coordinator,
    make_runs,
    make_site,
    read_coordinator,
    read_runs,
    read_site,
    values,
)
"""Modules that register writers and readers."""


def tidy(folder):
    """Leave what lies there once the processes have ended: databases in one file, and no locks."""
    for path in folder.rglob("*.sqlite"):
        with sqlite3.connect(path) as database:
            database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        database.close()
    for path in [p for p in folder.rglob("*") if p.is_file()]:
        if not path.stat().st_size or path.name.endswith("-shm"):
            path.unlink()


def main():
    book = GOLDEN / "expected.json"
    expected = json.loads(book.read_text()) if book.exists() else {}
    for name, write in WRITERS.items():
        if (GOLDEN / name).exists():
            continue
        with tempfile.TemporaryDirectory() as scratch:
            made = Path(scratch) / name
            if not made.suffix:
                made.mkdir(mode=0o700)
            write(made)
            tidy(made)
            private_copy(made, GOLDEN / name)
        print("made", name)
    for name in READERS:
        if name not in expected:
            with tempfile.TemporaryDirectory() as scratch:
                expected[name] = told_by(name, GOLDEN / name, Path(scratch) / "copy")
    book.write_text(json.dumps(expected, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
