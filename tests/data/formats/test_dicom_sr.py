from pathlib import Path

import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian

from silotune.data.formats import dicom_sr
from silotune.data.formats.dicom_sr import COLUMNS
from silotune.errors import DatasetUnreadable
from tests.data.formats.reading import faults, read

REAL = Path(pydicom.__file__).parent / "data" / "test_files"
BASIC_TEXT = "1.2.840.10008.5.1.4.1.1.88.11"
SECRET = "Mrs Smith has gout"


def of(path, *columns, **keys):
    return read(path, columns or ("text",), format="dicom_sr", **keys)


def code(meaning, value="1"):
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, "99X", meaning
    return Sequence([item])


def item(kind, name, relation="CONTAINS", **values):
    found = Dataset()
    found.RelationshipType, found.ValueType = relation, kind
    found.ConceptNameCodeSequence = code(name)
    for key, value in values.items():
        setattr(found, key, value)
    return found


def write(
    path, *items, instance="1.2.3", predecessor=None, syntax=ExplicitVRLittleEndian, kind=BASIC_TEXT
):
    report = Dataset()
    report.SOPClassUID, report.SOPInstanceUID, report.StudyInstanceUID = kind, instance, "1.2"
    report.SpecificCharacterSet = "ISO_IR 192"
    report.PatientID, report.PatientName = "P 7", "Smith^Mary"
    report.CompletionFlag, report.VerificationFlag, report.ValueType = (
        "COMPLETE",
        "VERIFIED",
        "CONTAINER",
    )
    report.ConceptNameCodeSequence = code("CT head", "24725-4")
    report.ContentSequence = Sequence(items)
    if predecessor:
        instance, series, study = Dataset(), Dataset(), Dataset()
        instance.ReferencedSOPInstanceUID = predecessor
        series.ReferencedSOPSequence = Sequence([instance])
        study.ReferencedSeriesSequence = Sequence([series])
        report.PredecessorDocumentsSequence = Sequence([study])
    report.file_meta = FileMetaDataset()
    report.file_meta.TransferSyntaxUID = syntax
    report.save_as(path, enforce_file_format=True)
    return path


def test_a_report_reads_as_its_author_laid_it_out_without_the_author(tmp_path):
    measured, unit = Dataset(), code("millimeter", "mm")
    measured.NumericValue, measured.MeasurementUnitsCodeSequence = "4.5", unit
    findings = item("CONTAINER", "Findings", ContentSequence=Sequence([
        item("TEXT", "Finding", TextValue="Größe unverändert"),
        item("NUM", "Diameter", MeasuredValueSequence=Sequence([measured])),
        item("CODE", "Morphology", "HAS PROPERTIES", ConceptCodeSequence=code("Mass")),
    ]))  # fmt: skip
    observer = item("PNAME", "Observer", "HAS OBS CONTEXT", PersonName="House^Gregory")
    institution = item("TEXT", "Organization", "HAS OBS CONTEXT", TextValue="St Elsewhere")
    path = write(tmp_path / "r.dcm", observer, institution, findings)
    table = of(path, *COLUMNS)
    assert {name: column[0] for name, column in table.columns.items()} == {
        "text": "Findings\nGröße unverändert\nDiameter: 4.5 mm\nMorphology: Mass",
        "patient": "P 7",
        "study": "1.2",
        "id": "1.2.3",
        "title": "CT head",
        "code": "24725-4",
        "completion": "COMPLETE",
        "verification": "VERIFIED",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "title", "said"),
    [("test-SR.dcm", "Diagnosis", "A mass of"), ("reportsi.dcm", "Document Title", "Enter text")],
)
def test_real_reports_are_read(name, title, said):
    table = of(REAL / name, "title", "text")
    assert table.columns["title"] == [title]
    assert said in table.columns["text"][0]


def test_a_report_replaces_its_predecessors_and_images_are_passed_over(tmp_path):
    folder = tmp_path / "reports"
    folder.mkdir()
    write(folder / "1.dcm", item("TEXT", "x", TextValue="old"), instance="1.1")
    write(folder / "2.dcm", item("TEXT", "x", TextValue="new"), instance="1.2", predecessor="1.1")
    (folder / "image.dcm").write_bytes((REAL / "CT_small.dcm").read_bytes())
    table = of(folder)
    assert table.columns["text"] == ["new"]
    assert list(faults(table)) == ["replaced by another version of the same record"]


def test_a_file_that_is_no_dicom_is_counted_and_nothing_of_it_is_said(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(dicom_sr, "LARGEST", 2**20)
    folder = tmp_path / "reports"
    folder.mkdir()
    good = write(folder / "1.dcm", item("TEXT", "x", TextValue=SECRET))
    raw = good.read_bytes()
    (folder / "2.dcm").write_text(SECRET)
    (folder / "3.dcm").write_bytes(raw[:-30])
    (folder / "4.dcm").write_bytes(raw.replace(b"1.2.3", b"Smith"))
    (folder / "5.dcm").write_bytes(raw + b"\0" * 2**20)
    write(
        folder / "6.dcm", item("TEXT", "x", TextValue=SECRET), syntax=DeflatedExplicitVRLittleEndian
    )
    table = of(folder)
    assert set(table.columns["text"]) <= {SECRET, ""}
    reasons = set(faults(table))
    assert (
        "packed within (deflated transfer syntax), and nothing behind it was read, from" in reasons
    )
    assert "a file of more than 1 MiB, and nothing behind it was read, from" in reasons
    assert "Smith" not in f"{table.faults} {capfd.readouterr()}"
    with pytest.raises(DatasetUnreadable) as caught:
        of(folder, strict=True)
    assert "Smith" not in str(caught.value)


def test_a_tree_that_is_deep_is_no_trouble(tmp_path):
    inner = item("TEXT", "x", TextValue="deep")
    for _ in range(60):
        inner = item("CONTAINER", "c", ContentSequence=Sequence([inner]))
    assert of(write(tmp_path / "r.dcm", inner)).columns["text"][0].endswith("c\ndeep")


def test_pydicom_is_an_extra(tmp_path, monkeypatch):
    path = write(tmp_path / "r.dcm")
    monkeypatch.setitem(__import__("sys").modules, "pydicom", None)
    with pytest.raises(DatasetUnreadable, match="needs pydicom") as caught:
        of(path)
    assert "silotune[dicom]" in caught.value.remedy
