"""The same records in every format, trained with one seed: the same adapter, bit for bit."""

import base64
import csv
import json
from itertools import count
from pathlib import Path
from typing import get_args
from xml.sax.saxutils import escape

import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian

from silotune.data.site import Format
from tests.data.written import FIXED, WRITERS, source_of
from tests.federation import PRIVATE, write_federation
from tests.whole_run import final, play

TABLE = {"text": "note", "label": "chronic", "unit": "patient"}


def write_fhir(place, rows):
    with (place / "notes.ndjson").open("w") as file:
        for number, (text, label, patient) in enumerate(rows):
            data = base64.b64encode(text.encode()).decode()
            file.write(json.dumps({
                "resourceType": "DocumentReference", "id": str(number), "status": "current",
                "type": {"coding": [{"system": "urn:kind", "code": label}]},
                "subject": {"reference": f"Patient/{patient}"},
                "content": [{"attachment": {"contentType": "text/plain", "data": data}}],
            }) + "\n")  # fmt: skip
    columns = {"text": "text", "label": "type.coding[system=urn:kind].code", "unit": "patient"}
    return {"format": "fhir", "path": "notes.ndjson"}, columns


def write_i2b2(place, rows):
    facts = "".join(
        f"<observation><event_id>{number}</event_id><patient_id>{patient}</patient_id>"
        f"<concept_cd>{label}</concept_cd><observation_blob>{escape(text)}</observation_blob></observation>"
        for number, (text, label, patient) in enumerate(rows)
    )
    (place / "notes.xml").write_text(
        f"<patient_data><observation_set>{facts}</observation_set></patient_data>"
    )
    columns = {"text": "text", "label": "concept_cd", "unit": "patient"}
    return {"format": "i2b2", "path": "notes.xml"}, columns  # fmt: skip


def write_camt053(place, rows):
    """One statement a row: an account's transactions need not stand together."""
    statements = "".join(
        f"<Stmt><Id>{number}</Id><Acct><Id><Othr><Id>{patient}</Id></Othr></Id></Acct><Ntry><Sts>BOOK</Sts>"
        f"<BkTxCd><Prtry><Cd>{label}</Cd></Prtry></BkTxCd><NtryDtls><TxDtls><RmtInf><Ustrd>{escape(text)}"
        "</Ustrd></RmtInf></TxDtls></NtryDtls></Ntry></Stmt>"
        for number, (text, label, patient) in enumerate(rows)
    )
    (place / "notes.xml").write_text(
        f"<Document><BkToCstmrStmt>{statements}</BkToCstmrStmt></Document>"
    )
    columns = {"text": "text", "label": "type", "unit": "account"}
    return {"format": "camt053", "path": "notes.xml"}, columns  # fmt: skip


def write_ofx(place, rows):
    statements = "".join(
        f"<STMTRS><BANKACCTFROM><ACCTID>{patient}</BANKACCTFROM><STMTTRN><TRNTYPE>{label}<FITID>{number}"
        f"<MEMO>{escape(text)}</STMTTRN></STMTRS>\n"
        for number, (text, label, patient) in enumerate(rows)
    )
    (place / "notes.ofx").write_text(f"OFXHEADER:100\n\n<OFX>{statements}</OFX>")
    columns = {"text": "text", "label": "type", "unit": "account"}
    return {"format": "ofx", "path": "notes.ofx", "labels": {"NO": "no", "YES": "yes"}}, columns


def write_dicom_sr(place, rows):
    (place / "reports").mkdir()
    for number, (text, label, patient) in enumerate(rows):
        said, title, report = Dataset(), Dataset(), Dataset()
        said.RelationshipType, said.ValueType, said.TextValue = "CONTAINS", "TEXT", text
        title.CodeValue, title.CodingSchemeDesignator, title.CodeMeaning = label, "99X", "Note"
        report.SOPClassUID, report.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.88.11", f"1.2.{number}"
        report.PatientID, report.ValueType = patient, "CONTAINER"
        report.ConceptNameCodeSequence = Sequence([title])
        report.ContentSequence = Sequence([said])
        report.file_meta = FileMetaDataset()
        report.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        pydicom.dcmwrite(place / "reports" / f"{number:04}.dcm", report, enforce_file_format=True)
    columns = {"text": "text", "label": "code", "unit": "patient"}
    return {"format": "dicom_sr", "path": "reports"}, columns


EXCHANGED = {
    "fhir": write_fhir,
    "i2b2": write_i2b2,
    "camt053": write_camt053,
    "ofx": write_ofx,
    "dicom_sr": write_dicom_sr,
}


def rewrite(folder: Path, kind: str) -> None:
    """Keep the records of every site in another format."""
    for place in (path.parent for path in sorted(folder.glob("*/site.toml"))):
        with (place / "notes.csv").open(newline="") as file:
            _, *rows = csv.reader(file)
        # An account's number has no dashes and no small letters.
        named = {
            unit: f"P{number:04}"
            for number, unit in zip(count(), dict.fromkeys(r[2] for r in rows))
        }
        rows = [(text, label, named[unit]) for text, label, unit in rows]
        if kind in WRITERS:
            columns = dict(zip(TABLE.values(), map(list, zip(*rows, strict=True)), strict=True))
            entry, columns = source_of(kind, place, columns), TABLE
        else:
            entry, columns = EXCHANGED[kind](place, rows)
        names = entry.pop("labels", {})
        head, rest = (place / "site.toml").read_text().split('format = "csv"\npath = "notes.csv"\n')
        rest = rest[: rest.index("[datasets.notes.columns]")]
        lines = [f"{key} = {json.dumps(value)}" for key, value in entry.items()]
        tables = {"columns": columns, "labels": names, "budget": {"epsilon": 9.0, "delta": 1e-3}}
        for table, values in tables.items():
            if values:
                lines += [] if table != "columns" else [rest]
                lines.append(f"[datasets.notes.{table}]")
                lines += [f"{key} = {json.dumps(value)}" for key, value in values.items()]
        (place / "site.toml").write_text(head + "\n".join(lines) + "\n")


def test_every_format_is_among_those_that_are_trained_on():
    assert {*WRITERS, *EXCHANGED} == set(get_args(Format)) == {*WRITERS, *FIXED}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_same_records_give_the_same_adapter_whatever_their_format(tmp_path, bert_folder):
    adapters, left_out = {}, {}
    for kind in get_args(Format):
        made = write_federation(
            tmp_path / kind, bert_folder, patients=True, names=("alpha", "beta")
        )
        rewrite(made.folder, kind)
        shares = {"rounds.number": 5, "privacy.unit": "patient", "privacy.max_records_per_unit": 2}
        directory = play(made, "runs", **PRIVATE, **shares)
        adapters[kind] = final(directory)
        left_out[kind] = directory.read_json("results.json")
    assert len(adapters["csv"]) > 4
    different = [kind for kind, adapter in adapters.items() if adapter != adapters["csv"]]
    assert different == []
