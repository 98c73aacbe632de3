"""Files read block by block: every record once, as the file has it, by the texts of training."""

import gzip
import json

import pytest

from silotune.data.sources import read_file
from silotune.data.streams import delimiter_of, format_of, stream
from silotune.errors import ColumnMissing, DatasetUnreadable, RecordInvalid
from tests.data.written import TEXTS, VALUES, write_csv, write_json, write_jsonl, write_parquet

WRITERS = {"csv": write_csv, "jsonl": write_jsonl, "json": write_json, "parquet": write_parquet}


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("size", [1, 2, 100])
def test_blocks_have_the_texts_that_training_reads(tmp_path, kind, size):
    path = tmp_path / f"a.{kind}"
    WRITERS[kind](path, VALUES)
    names = list(VALUES)
    blocks = list(stream(path, format_of(path), size=size))
    assert max(len(block.rows) for block in blocks) == min(size, 3)
    whole = read_file(path, kind=kind)
    assert [row for block in blocks for row in block.rows] == list(whole.rows)
    for name in names:
        found = [text for block in blocks for text in block.texts([name]).columns[name]]
        assert found == list(whole.columns[name])
        if kind in {"csv", "parquet"}:
            assert found == TEXTS[name]


@pytest.mark.parametrize("kind", WRITERS)
def test_records_keep_all_columns_in_their_order(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    WRITERS[kind](path, VALUES)
    for block in stream(path, format_of(path)):
        assert all(list(record) == list(VALUES) for record in block.records)


def test_json_values_stay_what_they_are(tmp_path):
    lines = [{"id": 7, "x": 1.5, "tags": ["a", {"b": None}], "on": True}, {"id": 2**70, "y": None}]
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress("\n\n".join(map(json.dumps, lines)).encode()))
    assert [r for block in stream(path, format_of(path)) for r in block.records] == lines


@pytest.mark.parametrize("sign", [",", ";", "\t", "|"])
def test_a_table_says_what_parts_its_fields(tmp_path, sign):
    path = tmp_path / "a.csv"
    path.write_text(sign.join(["id", '"a,;b"', "text"]) + "\n")
    assert delimiter_of(path) == sign


@pytest.mark.parametrize(
    ("name", "content", "error", "place"),
    [
        ("a.csv", 'id,text\n1,"a\nb"\n2,b,c\n', RecordInvalid, "row 3"),
        ("a.csv", 'id,text\n1,"open\n', DatasetUnreadable, "line 2"),
        ("a.csv", "id,id\n1,2\n", ColumnMissing, "more than once"),
        ("a.jsonl", '{"text": "a"}\n\n[1]\n', DatasetUnreadable, "row 3"),
        ("a.json", '[{"text": "a"}, 1]', DatasetUnreadable, "row 2"),
        ("a.parquet", "nothing of the kind", DatasetUnreadable, "Parquet"),
        ("a.txt", "", DatasetUnreadable, "end of the name"),
    ],
)
def test_a_bad_row_is_refused_by_its_place_without_quoting_it(
    tmp_path, name, content, error, place
):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(error, match=place) as caught:
        list(stream(path, format_of(path)))
    assert "b,c" not in str(caught.value)


def test_what_is_nested_is_no_plain_text_and_refused_by_its_row(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": {"secret": 1}}\n')
    (block,) = stream(path, "jsonl")
    with pytest.raises(RecordInvalid, match="row 2") as caught:
        block.texts(["text"])
    assert "secret" not in str(caught.value)
