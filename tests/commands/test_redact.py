"""`silotune predict --redact` as its user meets it: marks where something was, all else as it is."""

import csv
import json
import re

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from silotune import cli
from silotune.inference.redaction import redacted
from silotune.models.spans import TextSpan
from tests.commands.test_predict import finished

LABELS = ["NAME", "DATE"]
NOTE = (
    "  acute injury of the left eye,\r\n\tseen again; diabetes \u200b stage 4 of the kidney. \n" * 3
)
MARK = re.compile(r"\[(?:NAME|DATE)\]")


@pytest.fixture(scope="module")
def finder(tmp_path_factory, bert_folder):
    """A run whose random adapter finds some words of any text."""
    return finished(
        tmp_path_factory.mktemp("runs"), bert_folder, "token_classification",
        model__labels=LABELS, data__max_length=24,
    )  # fmt: skip


def said(run, *words, given: str | None = None):
    result = CliRunner().invoke(
        cli.app, ["predict", str(run), *words], input=None if given is None else given.encode()
    )
    assert result.exit_code == 0, result.output
    return result


def kept(shown: str, text: str) -> bool:
    """Whether `shown` is `text` with some parts replaced by marks."""
    between = [re.escape(part) for part in MARK.split(shown)]
    return re.fullmatch(r"\S(?:.*?\S)?".join(between), text, re.S) is not None


def test_one_text_comes_back_byte_for_byte_but_for_its_marks(finder):
    ran = said(finder, "--redact", given=NOTE)
    marks = MARK.findall(ran.stdout)
    assert marks
    assert kept(ran.stdout_bytes.decode(), NOTE)
    told = dict(reversed(pair.split()) for pair in ran.stderr.strip()[6:-1].split(", "))
    assert {label: str(marks.count(f"[{label}]")) for label in told} == told


def test_a_lower_threshold_leaves_less_of_the_text(finder):
    texts = [
        said(finder, "--redact", "--threshold", at, given=NOTE).stdout_bytes.decode()
        for at in ("0", "1")
    ]
    assert not re.search(r"\w", MARK.sub("", texts[0]))
    assert texts[1] == NOTE


@pytest.mark.parametrize("end", ["csv", "jsonl", "parquet"])
def test_a_file_has_the_redacted_text_in_the_place_of_the_text_and_all_else_as_it_was(
    finder, tmp_path, end
):
    rows = [{"id": "7", "note": NOTE}, {"id": "8", "note": ""}, {"id": "9", "note": "diabetes"}]
    source = tmp_path / "notes.csv"
    with source.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["id", "note"])
        writer.writeheader()
        writer.writerows(rows)
    out = tmp_path / f"out.{end}"
    told = said(
        finder, "--redact", "--threshold", "0.4", "--data", str(source), "--out", str(out),
        "--column", "note", "--json",
    ).stdout  # fmt: skip
    if end == "parquet":
        found = pq.read_table(out).to_pylist()
    elif end == "csv":
        with out.open(newline="", encoding="utf-8") as file:
            found = list(csv.DictReader(file))
    else:
        found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["id"] for row in found] == ["7", "8", "9"]
    assert kept(found[0]["note"], NOTE)
    assert found[0]["note"] != NOTE
    assert found[1]["note"] == ""
    assert "acute injury of the left eye" not in out.read_bytes().decode("utf-8", "replace")
    marks = MARK.findall("".join(row["note"] for row in found))
    assert sum(json.loads(told)["found"].values()) == len(marks)
    spans = found[0]["prediction"]
    spans = json.loads(spans) if isinstance(spans, str) else spans
    assert all(set(span) == {"start", "end", "label"} for span in spans)


def test_texts_of_a_table_come_back_one_a_record_and_as_json_without_the_text(finder):
    given = "".join(json.dumps({"text": text}) + "\n" for text in ("diabetes", "", "left eye"))
    lines = said(finder, "--redact", "--json", given=given).stdout.splitlines()
    assert [set(json.loads(line)) for line in lines] == [{"redacted", "found"}] * 3
    assert json.loads(lines[1])["redacted"] == ""


def test_a_run_that_finds_nothing_in_texts_is_refused_by_name(tmp_path, bert_folder):
    run = finished(tmp_path, bert_folder)
    for words in (["--redact"], ["--threshold", "0.2"]):
        ran = CliRunner().invoke(cli.app, ["predict", str(run), "a text", *words])
        assert ran.exit_code == 2
        assert "text_classification finds nothing in a text" in " ".join(ran.output.split())


def test_marks_stand_where_spans_were():
    text = "Ann Lee, 3 May"
    spans = [TextSpan(9, 14, "DATE"), TextSpan(0, 7, "NAME")]
    assert redacted(text, spans) == "[NAME], [DATE]"
    assert redacted(text, []) == text
