import io
import time
import tracemalloc
from pathlib import Path

import pytest

from silotune.data.formats import ofx
from silotune.data.formats.camt053 import COLUMNS
from silotune.errors import DatasetUnreadable
from tests.data.formats.reading import faults, read

SECRET = "Mrs Smith's pills"
SGML = """OFXHEADER:100
DATA:OFXSGML
VERSION:102
SECURITY:NONE
ENCODING:USASCII
CHARSET:1252
COMPRESSION:NONE
OLDFILEUID:NONE
NEWFILEUID:NONE

<OFX><SIGNONMSGSRSV1><SONRS><STATUS><CODE>0<SEVERITY>INFO</STATUS><LANGUAGE>ENG</SONRS></SIGNONMSGSRSV1>
<BANKMSGSRSV1><STMTTRNRS><TRNUID>1<STMTRS><CURDEF>USD
<BANKACCTFROM><BANKID>99<ACCTID>452-687<ACCTTYPE>CHECKING</BANKACCTFROM>
<BANKTRANLIST><DTSTART>20260301<DTEND>20260331
<STMTTRN><TRNTYPE>DEBIT<DTPOSTED>20260302120000.000[-5:EST]<TRNAMT>-34.51<FITID>487
<NAME>PHARMACY<MEMO>PHARMACY Mrs Smith's pills</STMTTRN>
<STMTTRN><TRNTYPE>CREDIT<DTPOSTED>20260303<TRNAMT>0.10<FITID>488<NAME>A&amp;B<MEMO>interest
</STMTTRN>
</BANKTRANLIST><LEDGERBAL><BALAMT>1</LEDGERBAL></STMTRS></STMTTRNRS></BANKMSGSRSV1></OFX>
"""
XML = """<?xml version="1.0" encoding="UTF-8"?>
<?OFX OFXHEADER="200" VERSION="211" SECURITY="NONE" OLDFILEUID="NONE" NEWFILEUID="NONE"?>
<OFX><CREDITCARDMSGSRSV1><CCSTMTTRNRS><CCSTMTRS><CURDEF>USD</CURDEF>
<CCACCTFROM><ACCTID>452 687</ACCTID></CCACCTFROM>
<BANKTRANLIST><STMTTRN><TRNTYPE>DEBIT</TRNTYPE><DTPOSTED>20260302</DTPOSTED><TRNAMT>-34.51</TRNAMT>
<FITID>487</FITID><NAME>PHARMACY</NAME><MEMO><![CDATA[PHARMACY Mrs Smith's pills]]></MEMO></STMTTRN>
<STMTTRN><TRNTYPE>CREDIT</TRNTYPE><DTPOSTED>20260303</DTPOSTED><TRNAMT>0.10</TRNAMT><FITID>488</FITID>
<NAME>A&amp;B</NAME><!-- <NAME>no</NAME> --><MEMO>interest</MEMO>
<BANKACCTTO><ACCTID>1</ACCTID></BANKACCTTO>
</STMTTRN></BANKTRANLIST></CCSTMTRS></CCSTMTTRNRS></CREDITCARDMSGSRSV1></OFX>
"""


def of(path, *columns, **keys):
    return read(path, columns or ("text",), format="ofx", **keys)


def write(path, text):
    path.write_text(text)
    return path


@pytest.mark.parametrize("content", [SGML, XML], ids=["1", "2"])
def test_both_versions_give_the_same_records(tmp_path, content):
    assert of(write(tmp_path / "s.ofx", content), *COLUMNS).columns == {
        "text": [f"PHARMACY {SECRET}", "A&B interest"],
        "account": ["452687", "452687"],
        "amount": ["-34.51", "0.10"],
        "currency": ["USD", "USD"],
        "date": ["2026-03-02", "2026-03-03"],
        "counterparty": ["PHARMACY", "A&B"],
        "type": ["DEBIT", "CREDIT"],
        "id": ["487", "488"],
    }


def test_a_second_statement_does_not_inherit_the_first_ones_account(tmp_path):
    second = "<STMTTRNRS><STMTRS><BANKTRANLIST><STMTTRN><MEMO>x</STMTTRN></BANKTRANLIST></STMTRS>"
    path = write(tmp_path / "s.ofx", SGML.replace("</BANKMSGSRSV1>", f"{second}</BANKMSGSRSV1>"))
    assert of(path, "account").columns["account"] == ["452687", "452687", ""]


def test_a_transaction_that_was_downloaded_twice_or_corrected_is_used_once(tmp_path):
    folder = tmp_path / "statements"
    folder.mkdir()
    write(folder / "1.ofx", SGML)
    correction = (
        "<STMTTRN><FITID>500<CORRECTFITID>487<CORRECTACTION>REPLACE<MEMO>corrected</STMTTRN>"
    )
    deletion = "<STMTTRN><FITID>501<CORRECTFITID>488<CORRECTACTION>DELETE<MEMO>x</STMTTRN>"
    once = "<STMTTRN><FITID>490<MEMO>last</STMTTRN>"
    write(folder / "2.ofx", SGML.replace("</BANKTRANLIST>", f"{once}{once}</BANKTRANLIST>"))
    assert of(folder).columns["text"] == [f"PHARMACY {SECRET}", "A&B interest", "last"]
    write(
        folder / "3.ofx", SGML.replace("</BANKTRANLIST>", f"{correction}{deletion}</BANKTRANLIST>")
    )
    table = of(folder)
    assert table.columns["text"] == ["last", "corrected"]
    assert len(faults(table)["it only deletes another transaction"]) == 1


@pytest.mark.parametrize(
    ("header", "raw"),
    [("1252", "Café".encode("cp1252")), ("1252", "Café".encode()), ("NONE", b"Caf\xe9")],
)
def test_code_pages_are_read_and_so_is_utf8_whatever_the_header_says(tmp_path, header, raw):
    content = SGML.replace("CHARSET:1252", f"CHARSET:{header}").encode().replace(b"interest", raw)
    (tmp_path / "s.ofx").write_bytes(content)
    assert of(tmp_path / "s.ofx").columns["text"][1] == "A&B Café"


def test_a_bank_that_does_not_escape_is_read_too(tmp_path):
    path = write(tmp_path / "s.ofx", SGML.replace("interest", "a < b & c"))
    assert of(path).columns["text"][1] == "A&B a < b & c"


def test_what_is_no_ofx_or_is_cut_off_is_told_without_its_content(tmp_path):
    path = write(tmp_path / "s.ofx", SGML[: SGML.index("interest")])
    table = of(path)
    assert table.columns["text"] == [f"PHARMACY {SECRET}"]
    assert faults(table) == {
        "cut off within a transaction, and nothing behind it was read, from": [2]
    }
    for text in (SECRET, "", "<html><p>log in</p></html>"):
        with pytest.raises(DatasetUnreadable, match="no OFX file") as caught:
            of(write(path, text))
        assert "Smith" not in str(caught.value)


@pytest.mark.parametrize("content", [SGML, XML], ids=["1", "2"])
def test_a_document_type_is_refused(tmp_path, content):
    bomb = '<!DOCTYPE OFX [<!ENTITY a "ha"><!ENTITY b "&a;&a;">]>\n<OFX>'
    with pytest.raises(DatasetUnreadable, match="DOCTYPE"):
        of(write(tmp_path / "s.ofx", content.replace("<OFX>", bomb)))


@pytest.mark.parametrize(
    "part",
    [
        b"A",
        b"<",
        b"<![CDATA[",
        b"<!--",
        b"<OFX><STMTTRN><MEMO><![CDATA[" + b"<" * 99,
        b"&#9",
        b"<A" * 9,
    ],
)
def test_a_file_without_end_is_left_in_bounded_memory(part):
    class Endless(io.RawIOBase):
        def read(self, size=-1):
            return part * (size // len(part))

    tracemalloc.start()
    begun = time.process_time()
    with pytest.raises(ofx._OfxBroken, match="without a tag"):
        list(ofx._transactions(ofx._tags(Endless(), Path("s.ofx"))))
    assert time.process_time() - begun < 5
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 24 * 2**20


def test_a_transaction_with_too_many_values_keeps_the_first_of_them(tmp_path):
    many = "".join(f"<X{n}>{n}" for n in range(100_000))
    path = write(tmp_path / "s.ofx", SGML.replace("<MEMO>interest", f"<MEMO>interest{many}"))
    assert of(path).columns["text"][1] == "A&B interest"
