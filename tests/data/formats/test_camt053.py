import gzip

import pytest

from silotune.data.formats.camt053 import COLUMNS
from silotune.errors import ColumnMissing, DatasetUnreadable
from tests.data.formats.reading import faults, read

SECRET = "Rent for Mrs Smith"


def entry(text=SECRET, *, status="BOOK", direction="DBIT", more="", details=None):
    if details is None:
        details = f"""<TxDtls><Refs><AcctSvcrRef>R1</AcctSvcrRef></Refs>
          <RltdPties><Dbtr><Nm>Payer</Nm></Dbtr><Cdtr><Nm>Landlord</Nm></Cdtr></RltdPties>
          <RmtInf><Ustrd>{text}</Ustrd><Ustrd>March</Ustrd></RmtInf></TxDtls>"""
    return f"""<Ntry><Amt Ccy="EUR">812.50</Amt><CdtDbtInd>{direction}</CdtDbtInd><Sts>{status}</Sts>
      <BookgDt><Dt>2026-03-02</Dt></BookgDt>
      <BkTxCd><Domn><Cd>PMNT</Cd><Fmly><Cd>ICDT</Cd><SubFmlyCd>ESCT</SubFmlyCd></Fmly></Domn></BkTxCd>
      <NtryDtls>{details}</NtryDtls><AddtlNtryInf>SEPA transfer</AddtlNtryInf>{more}</Ntry>"""


def statement(*entries, account="<IBAN>DE89 3704 0044 0532 0130 00</IBAN>", name="S1"):
    return f"""<Stmt><Id>{name}</Id><ElctrncSeqNb>7</ElctrncSeqNb><CreDtTm>2026-03-03T05:00:00</CreDtTm>
      <Acct><Id>{account}</Id><Svcr><FinInstnId><BIC>X</BIC></FinInstnId></Svcr></Acct>
      <Bal><Amt Ccy="EUR">1</Amt></Bal>{"".join(entries)}</Stmt>"""


def write(path, *statements, version="02", head=""):
    space = f"urn:iso:std:iso:20022:tech:xsd:camt.053.001.{version}"
    path.write_text(
        f'<?xml version="1.0" encoding="UTF-8"?>{head}<Document xmlns="{space}"><BkToCstmrStmt>'
        f"<GrpHdr><MsgId>M</MsgId></GrpHdr>{''.join(statements)}</BkToCstmrStmt></Document>"
    )
    return path


def of(path, *columns, **keys):
    return read(path, columns or ("text",), format="camt053", **keys)


def test_a_transaction_its_account_and_what_is_known_of_it(tmp_path):
    table = of(write(tmp_path / "s.xml", statement(entry())), *COLUMNS)
    assert {name: column[0] for name, column in table.columns.items()} == {
        "text": f"{SECRET} March",
        "account": "DE89370400440532013000",
        "amount": "-812.50",
        "currency": "EUR",
        "date": "2026-03-02",
        "counterparty": "Landlord",
        "type": "PMNT-ICDT-ESCT",
        "id": "R1",
    }


def test_later_versions_and_prefixes_of_the_namespace_are_read_alike(tmp_path):
    later = entry(status="<Cd>BOOK</Cd>", direction="CRDT").replace(
        "<Dbtr><Nm>Payer</Nm></Dbtr>", "<Dbtr><Pty><Nm>Payer</Nm></Pty></Dbtr>"
    )
    path = write(tmp_path / "s.xml", statement(later), version="08")
    prefixed = path.read_text().replace("<", "<n:").replace("<n:/", "</n:").replace("<n:?", "<?")
    path.write_text(prefixed.replace("xmlns=", "xmlns:n="))
    table = of(path, "text", "counterparty", "amount")
    assert table.columns == {
        "text": [f"{SECRET} March"],
        "counterparty": ["Payer"],
        "amount": ["812.50"],
    }


def test_each_detail_of_a_batch_is_a_record_with_its_own_amount(tmp_path):
    details = "".join(
        f"""<TxDtls><AmtDtls><TxAmt><Amt Ccy="EUR">{n}.00</Amt></TxAmt></AmtDtls>
        <RmtInf><Strd><AddtlRmtInf>part {n}</AddtlRmtInf></Strd></RmtInf></TxDtls>"""
        for n in (1, 2)
    )
    sums = "<TxDtls><AddtlTxInf>no amount</AddtlTxInf></TxDtls>" * 2
    path = write(tmp_path / "s.xml", statement(entry(details=details), entry(details=sums)))
    assert of(path, "text", "amount").columns == {
        "text": ["part 1", "part 2", "no amount", "no amount"],
        "amount": ["-1.00", "-2.00", "", ""],
    }


def test_an_entry_without_details_is_a_record(tmp_path):
    table = of(write(tmp_path / "s.xml", statement(entry(details=""))), "text", "amount")
    assert table.columns == {"text": ["SEPA transfer"], "amount": ["-812.50"]}


def test_accounts_without_an_iban_have_their_number(tmp_path):
    account = "<Othr><Id>12-34 5</Id></Othr>"
    table = of(write(tmp_path / "s.xml", statement(entry(), account=account)), "account")
    assert table.columns["account"] == ["12345"]


def test_only_what_is_booked_is_used_and_each_statement_once(tmp_path):
    folder = tmp_path / "statements"
    folder.mkdir()
    write(
        folder / "1.xml",
        statement(entry("a"), entry("b", status="PDNG"), entry("c", status="INFO")),
    )
    with gzip.open(folder / "2.xml.gz", "wt") as file:
        file.write(
            write(
                tmp_path / "x", statement(entry("a")), statement(entry("d"), name="S2")
            ).read_text()
        )
    table = of(folder)
    assert table.columns["text"] == ["a March", "d March"]
    assert {reason: len(rows) for reason, rows in faults(table).items()} == {
        "not booked yet, or for information only": 2,
        "its statement was read before": 1,
    }


ENTITIES = '<!DOCTYPE Document [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;"><!ENTITY c "&b;&b;&b;">]>'
EXTERNAL = '<!DOCTYPE Document [<!ENTITY a SYSTEM "file:///etc/passwd">]>'
REMOTE = '<!DOCTYPE Document SYSTEM "http://127.0.0.1:1/x.dtd">'


@pytest.mark.parametrize("head", [ENTITIES, EXTERNAL, REMOTE])
@pytest.mark.parametrize("kind", ["camt053", "i2b2"])
@pytest.mark.parametrize("strict", [False, True])
def test_a_file_that_declares_entities_is_refused(tmp_path, head, kind, strict):
    path = write(tmp_path / "s.xml", statement(entry("&a;")), head=head)
    with pytest.raises(DatasetUnreadable, match="declares a document type") as caught:
        read(path, ["text"], format=kind, strict=strict)
    assert caught.value.code == "ST-203"


def test_what_stands_before_a_broken_end_is_used_and_the_rest_is_told(tmp_path):
    path = write(tmp_path / "s.xml", statement(entry("a"), entry("b")))
    path.write_text(path.read_text()[:-200] + f"<Ntry>{SECRET}")
    table = of(path)
    assert table.columns["text"] == ["a March"]
    (reason,) = faults(table)
    assert reason.startswith("not well-formed XML from line")
    with pytest.raises(DatasetUnreadable, match="not well-formed") as caught:
        of(path, strict=True)
    assert SECRET not in f"{reason} {caught.value}"


def test_one_broken_file_among_others_does_not_stop_a_site(tmp_path):
    folder = tmp_path / "statements"
    folder.mkdir()
    (folder / "1.xml").write_text(SECRET)
    write(folder / "2.xml", statement(entry("a")))
    table = of(folder)
    assert table.columns["text"] == ["a March"]
    assert "row 1 of 1.xml" in str(table.faults.found[0])
    (folder / "2.xml").write_text("<Document/>")
    with pytest.raises(DatasetUnreadable):
        of(folder)


def test_a_column_that_statements_do_not_have_is_told_with_those_they_have(tmp_path):
    with pytest.raises(ColumnMissing, match=r"no column 'iban'.*are text, account, amount"):
        of(write(tmp_path / "s.xml", statement(entry())), "iban")
