"""What is wrong with a record of these formats is told by file and reason, never by what it holds."""

import json
import logging

import pytest
from typer.testing import CliRunner

from silotune.cli import app
from silotune.data.site import SiteConfig
from tests.data.written import FIXED

CANARY = "MrsSmithHasGout"

GOOD_NOTE = {
    "resourceType": "DocumentReference", "id": "1", "status": "current",
    "subject": {"reference": "Patient/1"}, "type": {"coding": [{"code": "no"}]},
    "content": [{"attachment": {"contentType": "text/plain", "data": "ZmluZQ=="}}],
}  # fmt: skip
BAD_NOTES = [
    {**GOOD_NOTE, "id": "2", "content": [{"attachment": {"contentType": "text/plain", "data": CANARY}}]},
    {**GOOD_NOTE, "id": "3", "content": [{"attachment": {"contentType": CANARY, "data": "ZmluZQ=="}}]},
    {**GOOD_NOTE, "id": CANARY, "subject": {"reference": f"#{CANARY}"}},
    {**GOOD_NOTE, "id": "5", "meta": {"lastUpdated": CANARY}, "status": "entered-in-error"},
]  # fmt: skip

ENTRY = (
    "<Ntry><Amt>{0}</Amt><Sts>{1}</Sts><BkTxCd><Prtry><Cd>no</Cd></Prtry></BkTxCd>"
    "<AddtlNtryInf>{2}</AddtlNtryInf></Ntry>"
)
STATEMENT = "<Document><BkToCstmrStmt><Stmt><Acct><Id><IBAN>DE1</IBAN></Id></Acct>{}"
FACT = (
    "<observation><patient_id>{0}</patient_id><concept_cd>no</concept_cd>"
    "<observation_blob>{1}</observation_blob></observation>"
)
OFX = "OFXHEADER:100\n\n<OFX><STMTRS><BANKACCTFROM><ACCTID>1</BANKACCTFROM>"

FILES = {
    "fhir": [
        "\n".join([*map(json.dumps, [GOOD_NOTE, *BAD_NOTES]), f'{{"DocumentReference": "{CANARY}']),
        CANARY,
    ],
    "camt053": [
        STATEMENT.format(ENTRY.format(1, "BOOK", "fine") + ENTRY.format(CANARY, CANARY, CANARY)),
        CANARY,
    ],
    "i2b2": [
        "<patient_data><observation_set>"
        + FACT.format(1, "fine")
        + FACT.format("", CANARY)
        + f"<{CANARY}></a>",
        f"<ROOT><{CANARY}/></ROOT>",
    ],
    "ofx": [
        f"{OFX}<STMTTRN><TRNTYPE>NO<MEMO>fine</STMTTRN><STMTTRN><TRNTYPE>{CANARY}<MEMO>{CANARY}",
        CANARY,
    ],
    "dicom_sr": [CANARY, f"{'x' * 128}DICM{CANARY}"],
}
"""By format: files with one good record (of DICOM: none) and bad ones that hold the canary."""

COLUMNS = {
    "fhir": ("type.coding.code", "patient"),
    "camt053": ("type", "account"),
    "i2b2": ("concept_cd", "patient"),
    "ofx": ("type", "account"),
    "dicom_sr": ("code", "patient"),
}


def test_every_format_with_columns_of_its_own_has_its_bad_records_here():
    assert set(FILES) == set(COLUMNS) == FIXED


def site_of(folder, kind):
    records = folder / "records"
    records.mkdir()
    for number, content in enumerate(FILES[kind]):
        (records / f"part{number}").write_text(content)
    label, unit = COLUMNS[kind]
    (folder / "site.toml").write_text(
        f'name = "s"\n[datasets.notes]\nformat = "{kind}"\npath = "records"\nunit = "patient"\n'
        f'declared_units = 50\n[datasets.notes.columns]\ntext = "text"\nlabel = "{label}"\n'
        f'unit = "{unit}"\n'
    )
    (folder / "site.toml").chmod(0o600)
    return SiteConfig.load(folder / "site.toml")


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize(
    "command", [["site", "doctor", "--config"], ["data", "check"]], ids=["doctor", "check"]
)
@pytest.mark.parametrize("options", [[], ["--json"]], ids=["table", "json"])
def test_the_commands_tell_where_and_nothing_that_stands_there(
    tmp_path, capfd, caplog, kind, command, options
):
    site_of(tmp_path, kind)
    with caplog.at_level(logging.DEBUG):
        argv = ["--debug", *command, str(tmp_path / "site.toml"), *options]
        shown = CliRunner().invoke(app, argv)
    if options:  # a table breaks words
        assert "part" in f"{shown.output} {shown.exception}"
    for place in (shown.output, repr(shown.exception), caplog.text, *capfd.readouterr()):
        assert CANARY not in place
