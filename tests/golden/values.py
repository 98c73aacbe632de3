"""Golden: which side of the split the values of every source are on, under each rule of values."""

import csv
import datetime
import decimal
import json
import sqlite3

import pyarrow as pa
import pyarrow.parquet as pq

from silotune.data.declared import own_secret
from silotune.data.records import load_records
from silotune.data.site import SiteConfig
from silotune.plan.plan import Plan
from silotune.trust.vault import Vault
from tests.golden.registry import makes, reads

ROWS = 40
DAY = datetime.date(2024, 2, 1)
MOMENT = datetime.datetime(2024, 2, 1, 8, 30)
COLUMNS = {
    "code": ([f"{n:05}" for n in range(ROWS)], pa.string()),
    "number": ([1000 + n for n in range(ROWS)], pa.int64()),
    "whole": ([1000.0 + n for n in range(ROWS)], pa.float64()),
    "part": ([n + 0.25 for n in range(ROWS)], pa.float64()),
    "exact": ([decimal.Decimal(25 * n).scaleb(-2) for n in range(ROWS)], pa.decimal128(9, 2)),
    "day": ([DAY + datetime.timedelta(n) for n in range(ROWS)], pa.date32()),
    "moment": ([MOMENT + datetime.timedelta(hours=n) for n in range(ROWS)], pa.timestamp("ns")),
}
FILES = {"csv": "t.csv", "jsonl": "t.jsonl", "parquet": "t.parquet"}


def write_sources(folder):
    table = pa.table({name: pa.array(v, kind) for name, (v, kind) in COLUMNS.items()})
    pq.write_table(table, folder / "t.parquet")
    # As pandas writes them.
    rows = [
        [str(value) for value in row] for row in zip(*(v for v, _ in COLUMNS.values()), strict=True)
    ]
    with (folder / "t.csv").open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])
    kept = ("number", "whole", "part")
    with (folder / "t.jsonl").open("w") as file:
        for number, row in enumerate(rows):
            record = dict(zip(COLUMNS, row, strict=True))
            record.update({name: COLUMNS[name][0][number] for name in kept})
            file.write(json.dumps(record) + "\n")
    with sqlite3.connect(folder / "t.db") as base:
        base.execute("CREATE TABLE t (code TEXT, number INTEGER, whole REAL, part REAL, exact TEXT, "
                     "day TEXT, moment TEXT)")  # fmt: skip
        typed = [
            [row[0], *(COLUMNS[name][0][n] for name in kept), *row[4:]]
            for n, row in enumerate(rows)
        ]
        base.executemany(f"INSERT INTO t VALUES ({', '.join('?' * len(COLUMNS))})", typed)
    base.close()


def site_of(folder):
    datasets = {}
    for kind in (*FILES, "sql"):
        for column in COLUMNS:
            where = {"url": "sqlite:///t.db", "query": "SELECT * FROM t"}
            datasets[f"{kind}-{column}"] = {
                "format": kind,
                **({"path": FILES[kind]} if kind in FILES else where),
                "unit": "patient",
                "declared_units": ROWS,
                "columns": {"text": "code", "label": "code", "unit": column},
            }
    return SiteConfig.from_mapping({"name": "s", "datasets": datasets}, folder=folder)


def sides_in(folder):
    """A digit for the side of each record, by source and column."""
    site = site_of(folder)
    secret = own_secret(folder / "state", Vault(folder / "state"))
    found = {}
    for name in site.datasets:
        plan = Plan.from_mapping(
            {
                "plan": {"name": "p", "purpose": "golden"},
                "model": {
                    "base": "b",
                    "task": "text_classification",
                    "labels": [f"{n:05}" for n in range(ROWS)],
                },
                "data": {"dataset": name},
                "rounds": {"number": 1},
                "privacy": {"mode": "none", "unit": "patient", "rate": 0.5},
            }
        )
        records = load_records(site, plan, roles={"text", "label"}, secret=secret)
        found[name] = "".join(map(str, records.split.tolist()))
    return found


@makes("values_1")
def values_1(folder):
    """A site as it was before there was a second rule: its secret is 32 bytes and nothing else."""
    write_sources(folder)
    own_secret(folder / "state", Vault(folder / "state"), new=bytes(range(32)))


@makes("values_2")
def values_2(folder):
    write_sources(folder)
    secret = b"silotune values 2\0" + bytes(range(32))
    own_secret(folder / "state", Vault(folder / "state"), new=secret)


@reads("values_1")
@reads("values_2")
def sides(folder):
    return sides_in(folder)
