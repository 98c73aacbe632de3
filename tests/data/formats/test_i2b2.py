import pytest

from silotune.errors import ColumnMissing, DatasetUnreadable
from tests.data.formats.reading import faults, read

SECRET = "Mrs Smith has gout"


def of(path, *columns, **keys):
    return read(path, columns or ("text",), format="i2b2", **keys)


def test_records_of_the_first_challenges(tmp_path):
    path = tmp_path / "smokers.xml"
    path.write_text(
        '<?xml version="1.0" encoding="UTF-8"?><ROOT>'
        '<RECORD ID="641"><SMOKING STATUS="CURRENT SMOKER"></SMOKING><TEXT>\n'
        f'{SECRET} <PHI TYPE="DATE">11/18</PHI> &gt; 2\n</TEXT></RECORD>'
        '<RECORD ID="643"><SMOKING STATUS="UNKNOWN"/><TEXT>well</TEXT></RECORD></ROOT>'
    )
    table = of(path, "text", "patient", "SMOKING/@STATUS", "record")
    assert table.columns == {
        "text": [f"{SECRET} 11/18 > 2", "well"],
        "patient": ["641", "643"],
        "SMOKING/@STATUS": ["CURRENT SMOKER", "UNKNOWN"],
        "record": ["641", "643"],
    }


def test_docs_of_the_obesity_challenge(tmp_path):
    path = tmp_path / "docs.xml"
    path.write_text(
        '<root><docs><doc id="1"><text>one</text></doc><doc id="2"><text>two</text></doc></docs></root>'
    )
    table = of(path, "text", "record")
    assert table.columns == {"text": ["one", "two"], "record": ["1", "2"]}


@pytest.mark.parametrize("root", ["deIdi2b2", "root", "PatientMatching"])
def test_a_folder_with_a_file_for_each_note(tmp_path, root):
    folder = tmp_path / "notes"
    folder.mkdir()
    for name, met in (("110-01", "met"), ("110-02", "not met"), ("111-01", "met")):
        (folder / f"{name}.xml").write_text(
            f"<{root}><TEXT><![CDATA[note {name} a < b]]></TEXT>"
            f"<TAGS><ABDOMINAL met='{met}'/></TAGS></{root}>"
        )
    assert of(folder, "text", "patient", "record", "TAGS/ABDOMINAL/@met").columns == {
        "text": [f"note {name} a < b" for name in ("110-01", "110-02", "111-01")],
        "patient": ["110", "110", "111"],
        "record": ["110-01", "110-02", "111-01"],
        "TAGS/ABDOMINAL/@met": ["met", "not met", "met"],
    }


def observation(event, text, *, patient="9", concept="NOTE:1", old=False):
    names = ("encounter_num", "patient_num") if old else ("event_id", "patient_id")
    return (
        f"<observation><{names[0]} source='E'>{event}</{names[0]}><{names[1]} source='HIVE'>{patient}"
        f"</{names[1]}><concept_cd name='Note'>{concept}</concept_cd><start_date>2026-03-01T08:30:00"
        f"</start_date>{text}</observation>"
    )


@pytest.mark.parametrize("old", [False, True])
def test_observations_of_a_patient_data_object(tmp_path, old):
    path = tmp_path / "pdo.xml"
    path.write_text(
        '<p:patient_data xmlns:p="http://www.i2b2.org/xsd/hive/pdo/1.1/">'
        '<p:patient_set><patient><patient_id source="HIVE">9</patient_id></patient></p:patient_set>'
        "<p:observation_set panel_name='notes'>"
        + observation(1, f"<observation_blob>{SECRET}</observation_blob>", old=old)
        + observation(2, "<valuetype_cd>T</valuetype_cd><tval_char>mild</tval_char>", old=old)
        + observation(3, "<valuetype_cd>N</valuetype_cd><tval_char>E</tval_char>", old=old)
        + observation(1, "<observation_blob>as it was last</observation_blob>", old=old)
        + "</p:observation_set></p:patient_data>"
    )
    table = of(path, "text", "patient", "record", "concept_cd")
    assert table.columns == {
        "text": ["mild", "", "as it was last"],
        "patient": ["9", "9", "9"],
        "record": ["2", "3", "1"],
        "concept_cd": ["NOTE:1", "NOTE:1", "NOTE:1"],
    }
    assert faults(table) == {"replaced by another version of the same record": [1]}


def test_one_note_that_is_no_xml_is_counted_and_not_quoted(tmp_path):
    folder = tmp_path / "notes"
    folder.mkdir()
    (folder / "110-01.xml").write_text(f"<root><TEXT>{SECRET} < 5</TEXT></root>")
    (folder / "110-02.xml").write_text("<root><TEXT>well</TEXT></root>")
    table = of(folder)
    assert table.columns["text"] == ["well"]
    assert "not well-formed XML from line 1" in str(table.faults.found[0])
    assert "in row 1 of 110-01.xml" in str(table.faults.found[0])
    with pytest.raises(DatasetUnreadable, match=r"110-01\.xml") as caught:
        of(folder, strict=True)
    assert "Smith" not in f"{table.faults.found} {caught.value}"


def test_a_file_of_something_else_is_told(tmp_path):
    path = tmp_path / "x.xml"
    path.write_text("<html><body>no</body></html>")
    with pytest.raises(DatasetUnreadable, match="no i2b2 file"):
        of(path)


@pytest.mark.parametrize("column", ["a[", "//x", "a[@b='c", "/x", "a/", "*", "a@b"])
def test_a_column_that_is_no_path_is_told(tmp_path, column):
    path = tmp_path / "x.xml"
    path.write_text("<ROOT><RECORD ID='1'><TEXT>x</TEXT></RECORD></ROOT>")
    with pytest.raises(ColumnMissing):
        of(path, column)
