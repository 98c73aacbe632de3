"""Reading a million records of each format, against pandas' own reading of the CSV.

Each reading is a process of its own: seconds of processor time from the first byte on, and the most
memory that it took. pandas reads the three columns that a plan needs, as text (`dtype=str`), which is
what silotune gives; what it takes to guess types is shown beside. Readers take turns, and medians are
told.

    python benchmarks/reading.py            # a million records, three turns: some five minutes
    python benchmarks/reading.py --quick    # 100,000 records, one turn
    python benchmarks/reading.py --json     # the last line is one JSON object
"""

from __future__ import annotations

import argparse
import base64
import csv
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

WORDS = [f"word{n}" for n in range(4000)]
COLUMNS = ["note", "outcome", "patient"]
ENTRIES = {
    "csv": {"format": "csv", "path": "t.csv"},
    "csv.gz": {"format": "csv", "path": "t.csv.gz"},
    "jsonl": {"format": "jsonl", "path": "t.jsonl"},
    "parquet": {"format": "parquet", "path": "t.parquet"},
    "fhir": {"format": "fhir", "path": "t.ndjson"},
}
PATHS = {"note": "text", "outcome": "category.coding.code", "patient": "patient"}
PANDAS = {"pandas": {"dtype": str}, "pandas, types guessed": {}}
TARGET = 1.5


def write(folder: Path, number: int) -> None:
    """The same records as CSV, packed CSV, JSON lines, Parquet and FHIR."""
    import gzip

    import pandas as pd

    draw = random.Random(0)
    with (
        (folder / "t.csv").open("w", newline="") as table,
        (folder / "t.jsonl").open("w") as lines,
        (folder / "t.ndjson").open("w") as export,
    ):
        writer = csv.writer(table)
        writer.writerow([*COLUMNS, "ward"])
        for n in range(number):
            note = " ".join(draw.choices(WORDS, k=8)) + ', "quoted"' * (n % 20 == 0)
            row = [note, "yes" if n % 3 else "no", str(100_000 + n // 3), f"ward {n % 50}"]
            writer.writerow(row)
            lines.write(json.dumps(dict(zip([*COLUMNS, "ward"], row, strict=True))) + "\n")
            export.write(json.dumps(document(n, *row[:3])) + "\n")
    content = (folder / "t.csv").read_bytes()
    (folder / "t.csv.gz").write_bytes(gzip.compress(content, 6))
    pd.read_csv(folder / "t.csv", dtype=str).to_parquet(folder / "t.parquet")


def document(number: int, note: str, outcome: str, patient: str) -> dict[str, object]:
    """A record as a FHIR resource."""
    data = base64.b64encode(note.encode()).decode()
    return {
        "resourceType": "DocumentReference",
        "id": f"d{number}",
        "status": "current",
        "category": [{"coding": [{"code": outcome}]}],
        "subject": {"reference": f"Patient/{patient}"},
        "content": [{"attachment": {"contentType": "text/plain", "data": data}}],
    }


def read(name: str, folder: Path) -> tuple[float, float]:
    """Processor seconds and megabytes of one reading in this process."""
    if name in PANDAS:
        import pandas as pd

        start = time.process_time()
        found = len(pd.read_csv(folder / "t.csv", usecols=COLUMNS, **PANDAS[name]))
    else:
        from silotune.data.site import DatasetConfig
        from silotune.data.sources import read_dataset

        entry = {**ENTRIES[name], "columns": {"text": "note"}, "declared_units": 1}
        dataset = DatasetConfig.model_validate_json(json.dumps(entry))
        wanted = list(PATHS.values()) if name == "fhir" else COLUMNS
        import pyarrow.csv
        import pyarrow.parquet  # noqa: F401 - as pandas, it is imported before the clock runs

        start = time.process_time()
        found = len(read_dataset(dataset, folder=folder, columns=wanted).rows)
    seconds = time.process_time() - start
    assert found
    # Not ru_maxrss, which begins with the memory of the process that started this one.
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x)
    return seconds, int(line.split()[1]) / 1024


def measured(folder: Path, turns: int) -> dict[str, dict[str, float]]:
    """Medians by reader."""
    names = [*PANDAS, *ENTRIES]
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for _ in range(turns):
        for name in names:
            call = [sys.executable, __file__, "--read", name, "--folder", str(folder)]
            told = subprocess.run(call, capture_output=True, text=True, check=True, env=os.environ)
            seconds, megabytes = json.loads(told.stdout)
            found[name].append((seconds, megabytes))
    return {
        name: {
            "seconds": statistics.median(seconds for seconds, _ in runs),
            "megabytes": statistics.median(megabytes for _, megabytes in runs),
        }
        for name, runs in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="100,000 records, one turn")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--read", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.read:
        sys.stdout.write(json.dumps(read(given.read, given.folder)))
        return
    number, turns = (100_000, 1) if given.quick else (1_000_000, 3)
    with tempfile.TemporaryDirectory() as scratch:
        write(Path(scratch), number)
        found = measured(Path(scratch), turns)
    base = found["pandas"]
    if not given.json:
        versions = ", ".join(f"{name} {version(name)}" for name in ("pandas", "pyarrow"))
        print(f"{number:,} records, {turns} turns; {versions}")
        for name, of in found.items():
            ratio, room = of["seconds"] / base["seconds"], of["megabytes"] / base["megabytes"]
            print(
                f"{name:>24} {of['seconds']:7.2f} s {of['megabytes']:6.0f} MB  x{ratio:.2f} x{room:.2f}"
            )
        print(f"csv: at most {TARGET} times pandas in both is the aim")
    else:
        print(json.dumps({"records": number, "readers": found}))


if __name__ == "__main__":
    main()
