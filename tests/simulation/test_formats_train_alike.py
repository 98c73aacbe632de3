"""The same records in another format: the same adapter, bit for bit, when it is seeded."""

from __future__ import annotations

import base64
import csv
import json
from xml.sax.saxutils import escape

import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian

from tests.data.written import FIXED, WRITERS
from tests.federation import write_federation
from tests.whole_run import final, play

QUICK = ("parquet",)
"""What is tried always; the others take as long each, and are tried with the slow tests."""

PLACES = ("note", "chronic", "patient")


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


def rows_of(columns):
    """Number, text, label and patient of each record, as texts."""
    for number, (note, chronic, patient) in enumerate(zip(*columns.values(), strict=True)):
        name = patient if isinstance(patient, str) else f"{patient:.0f}"
        yield number, note, str(chronic).lower(), name


def write_fhir(path, columns):
    with path.open("w") as file:
        for number, note, chronic, patient in rows_of(columns):
            data = base64.b64encode(note.encode()).decode()
            resource = {
                "resourceType": "DocumentReference",
                "id": f"d{number}",
                "status": "current",
                "subject": {"reference": f"Patient/{patient}"},
                "category": [{"coding": [{"code": chronic}]}],
                "content": [{"attachment": {"contentType": "text/plain", "data": data}}],
            }
            file.write(json.dumps(resource) + "\n")


def write_i2b2(path, columns):
    facts = "".join(
        f"<observation><event_id>{number}</event_id><patient_id>{patient}</patient_id><concept_cd>{chronic}"
        f"</concept_cd><observation_blob>{escape(note)}</observation_blob></observation>"
        for number, note, chronic, patient in rows_of(columns)
    )
    path.write_text(f"<patient_data><observation_set>{facts}</observation_set></patient_data>")


def write_camt053(path, columns):
    """One statement a record: an account's need not stand together."""
    statements = "".join(
        f"<Stmt><Id>{number}</Id><Acct><Id><Othr><Id>{patient}</Id></Othr></Id></Acct><Ntry><Sts>BOOK</Sts>"
        f"<BkTxCd><Prtry><Cd>{chronic}</Cd></Prtry></BkTxCd><AddtlNtryInf>{escape(note)}</AddtlNtryInf>"
        "</Ntry></Stmt>"
        for number, note, chronic, patient in rows_of(columns)
    )
    path.write_text(f"<Document><BkToCstmrStmt>{statements}</BkToCstmrStmt></Document>")


def write_ofx(path, columns):
    statements = "".join(
        f"<STMTRS><BANKACCTFROM><ACCTID>{patient}</BANKACCTFROM><STMTTRN><TRNTYPE>{chronic}"
        f"<FITID>{number}<MEMO>{escape(note)}</STMTTRN></STMTRS>\n"
        for number, note, chronic, patient in rows_of(columns)
    )
    path.write_text(f"OFXHEADER:100\n\n<OFX>{statements}</OFX>")


def write_dicom_sr(path, columns):
    path.mkdir()
    for number, note, chronic, patient in rows_of(columns):
        said, title, report = Dataset(), Dataset(), Dataset()
        said.RelationshipType, said.ValueType, said.TextValue = "CONTAINS", "TEXT", note
        title.CodeValue, title.CodingSchemeDesignator, title.CodeMeaning = chronic, "99X", "Note"
        report.SOPClassUID, report.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.88.11", f"1.2.{number}"
        report.PatientID, report.ValueType = patient, "CONTAINER"
        report.ConceptNameCodeSequence = Sequence([title])
        report.ContentSequence = Sequence([said])
        report.file_meta = FileMetaDataset()
        report.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        pydicom.dcmwrite(path / f"{number:04}.dcm", report, enforce_file_format=True)


EXCHANGED = {
    "fhir": (write_fhir, ("text", "category.coding.code", "patient")),
    "i2b2": (write_i2b2, ("text", "concept_cd", "patient")),
    "camt053": (write_camt053, ("text", "type", "account")),
    "ofx": (write_ofx, ("text", "type", "account")),
    "dicom_sr": (write_dicom_sr, ("text", "code", "patient")),
}
"""Formats with columns of their own: who writes them, and where text, label and unit are."""


def rewritten(federation, kind, *, patients=lambda number: number):
    """The federation's records in another format, and its sites' entries with it."""
    for site in federation.folder.glob("*/site.toml"):
        table = as_other_programs_have_it(read_rows(site.parent / "notes.csv"))
        table["patient"] = [patients(number) for number in table["patient"]]
        write, places = EXCHANGED.get(kind) or (WRITERS[kind], PLACES)
        write(site.parent / f"t.{kind}", table)
        where = f'path = "t.{kind}"'
        if kind == "sql":
            where = 'url = "sqlite:///t.sql"\nquery = "SELECT * FROM t"'
        text = site.read_text().replace('"csv"\npath = "notes.csv"', f'"{kind}"\n{where}')
        head, columns = text.split("[datasets.notes.columns]")
        for name, place in zip(PLACES, places, strict=True):
            columns = columns.replace(f'= "{name}"', f'= "{place}"')
        site.write_text(f"{head}[datasets.notes.columns]{columns}")
    return federation


def adapter_from(kind, folder, bert_folder, **options):
    federation = write_federation(folder / kind, bert_folder, patients=True)
    asked = {
        "model.labels": ["false", "true"],
        "privacy.unit": "patient",
        "privacy.max_records_per_unit": 2,
    }
    return final(play(rewritten(federation, kind, **options), "runs", **asked))


def test_every_format_is_tried_here():
    assert set(EXCHANGED) == FIXED


@pytest.mark.parametrize(
    "kind",
    [
        k if k in QUICK else pytest.param(k, marks=pytest.mark.slow)
        for k in (*WRITERS, *EXCHANGED)
        if k != "csv"
    ],
)
def test_an_adapter_does_not_tell_what_format_its_records_had(tmp_path, bert_folder, kind):
    as_reference = {"patients": lambda number: f"Patient/{number:.0f}"}
    by_format = {} if kind != "fhir" else as_reference
    one = adapter_from("csv", tmp_path, bert_folder, **by_format)
    assert one == adapter_from(kind, tmp_path, bert_folder)
