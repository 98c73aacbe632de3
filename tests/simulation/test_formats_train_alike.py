"""The same records in another format: the same adapter, bit for bit, when it is seeded."""

from __future__ import annotations

import base64
import csv
import json

import pytest

from tests.data.written import FIXED, WRITERS
from tests.federation import write_federation
from tests.whole_run import final, play

QUICK = ("parquet",)
"""What is tried always; the others take as long each, and are tried with the slow tests."""

OWN = {"i2b2", "camt053", "ofx"}
"""Formats whose records have no text that another format's could have: see tests/data/formats."""

PLACES = {"note": "note", "chronic": "chronic", "patient": "patient"}
IN_FHIR = {"note": "text", "chronic": "category.coding.code", "patient": "patient"}


def read_rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def as_other_programs_have_it(rows):
    """Patients are numbers with a gap and labels are truths, for those that have types."""
    return {
        "note": [row["note"] for row in rows],
        "chronic": [row["chronic"] == "yes" for row in rows],
        "patient": [1000.0 + int(row["patient"].split("-")[1]) for row in rows],
    }


def write_fhir(path, columns):
    with path.open("w") as file:
        for n, (note, chronic, patient) in enumerate(zip(*columns.values(), strict=True)):
            resource = {
                "resourceType": "DocumentReference",
                "id": f"d{n}",
                "status": "current",
                "subject": {"reference": f"Patient/{int(patient)}"},
                "category": [{"coding": [{"code": str(chronic).lower()}]}],
                "content": [
                    {
                        "attachment": {
                            "contentType": "text/plain",
                            "data": base64.b64encode(note.encode()).decode(),
                        }
                    }
                ],
            }
            file.write(json.dumps(resource) + "\n")


def rewritten(federation, kind, *, patients=lambda number: number):
    """The federation's records in another format, and its sites' entries with it."""
    for site in federation.folder.glob("*/site.toml"):
        columns = as_other_programs_have_it(read_rows(site.parent / "notes.csv"))
        columns["patient"] = [patients(number) for number in columns["patient"]]
        (write_fhir if kind == "fhir" else WRITERS[kind])(site.parent / f"t.{kind}", columns)
        where = f'path = "t.{kind}"'
        if kind == "sql":
            where = 'url = "sqlite:///t.sql"\nquery = "SELECT * FROM t"'
        text = site.read_text().replace('"csv"\npath = "notes.csv"', f'"{kind}"\n{where}')
        for name, place in (IN_FHIR if kind == "fhir" else PLACES).items():
            text = text.replace(f'= "{name}"', f'= "{place}"')
        site.write_text(text)
    return federation


def adapter_from(kind, folder, bert_folder, **options):
    federation = write_federation(folder / kind, bert_folder, patients=True)
    asked = {
        "model.labels": ["false", "true"],
        "privacy.unit": "patient",
        "privacy.max_records_per_unit": 2,
    }
    return final(play(rewritten(federation, kind, **options), "runs", **asked))


def test_every_format_is_tried_here_or_has_records_of_its_own():
    assert {"fhir"} >= FIXED - OWN


@pytest.mark.parametrize(
    "kind",
    [
        k if k in QUICK else pytest.param(k, marks=pytest.mark.slow)
        for k in (*WRITERS, "fhir")
        if k != "csv"
    ],
)
def test_an_adapter_does_not_tell_what_format_its_records_had(tmp_path, bert_folder, kind):
    as_reference = {"patients": lambda number: f"Patient/{number:.0f}"}
    by_format = {} if kind != "fhir" else as_reference
    one = adapter_from("csv", tmp_path, bert_folder, **by_format)
    assert one == adapter_from(kind, tmp_path, bert_folder)
