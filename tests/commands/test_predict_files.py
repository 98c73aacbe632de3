"""`silotune predict --data`: every record back with its answer, in its order, whatever happens."""

import csv
import json
import stat
from datetime import date
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from silotune.inference import answers
from silotune.models.tasks.text_classification import TextClassification
from tests.commands.terminal import shown
from tests.commands.test_predict import finished
from tests.models.model_material import TEXTS

NOTES = [f"{TEXTS[i % len(TEXTS)]} {'eye ' * (i % 3)}{i}".strip() for i in range(600)]


@pytest.fixture(scope="module")
def run(tmp_path_factory, bert_folder):
    return finished(tmp_path_factory.mktemp("runs"), bert_folder)


@pytest.fixture(scope="module")
def expected(run):
    """Answers of the same notes by way of arguments, one JSON object each."""
    found = shown("json", "predict", str(run), *NOTES)
    return [json.loads(line)["prediction"] for line in found.text.splitlines()]


def rows_of(path, delimiter=","):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter=delimiter))


def write_notes(path, notes=NOTES, delimiter=","):
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(["id", "note", "zeros"])
        writer.writerows([number, text, "007"] for number, text in enumerate(notes))
    return path


def require_answers(found, expected, shares):
    assert len(found) == len(expected)
    for row, answer in zip(found, expected, strict=True):
        assert row["prediction"] == answer["label"]
        for label, share in answer["probabilities"].items():
            assert float(shares(row, label)) == pytest.approx(share, abs=2e-4)


def test_a_table_comes_back_with_its_columns_and_answers(run, tmp_path, expected):
    path = write_notes(tmp_path / "notes.csv", delimiter=";")
    told = shown("json", "predict", str(run), "--data", str(path), "--column", "note")
    out = tmp_path / "notes.predictions.csv"
    assert told.facts == {"out": str(out), "records": 600, "empty": 0, "answered_before": 0}
    found = rows_of(out, ";")
    assert list(found[0])[:4] == ["id", "note", "zeros", "prediction"]
    assert [(row["id"], row["note"], row["zeros"]) for row in found] == [
        (str(number), text, "007") for number, text in enumerate(NOTES)
    ]
    require_answers(found, expected, lambda row, label: row[f"probability_{label}"])
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes.csv", "notes.predictions.csv"]


def test_json_lines_keep_their_values_and_get_an_object_of_probabilities(run, tmp_path, expected):
    records = [
        {"n": 2**60 + i, "note": {"text": text}, "tags": [i, None]}
        for i, text in enumerate(NOTES[:9])
    ]
    records[4]["note"] = {"text": " "}
    path, out = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    words = ["--data", str(path), "--out", str(out), "--column", "text=note.text", "--prefix", "m_"]
    told = shown("json", "predict", str(run), *words)
    assert told.facts["empty"] == 1, told
    found = [json.loads(line) for line in out.read_text().splitlines()]
    for number, record in enumerate(records):
        kept = {name: found[number][name] for name in record}
        assert kept == record and list(found[number]) == [
            *record,
            "m_prediction",
            "m_probabilities",
        ]
    assert found[4]["m_prediction"] is found[4]["m_probabilities"] is None
    for number in {*range(9)} - {4}:
        assert found[number]["m_prediction"] == expected[number]["label"]
        assert found[number]["m_probabilities"] == pytest.approx(
            expected[number]["probabilities"], abs=2e-4
        )


def test_parquet_keeps_types_and_gets_typed_answers(run, tmp_path, expected):
    table = pa.table(
        {
            "when": [date(2026, 1, 1 + i) for i in range(20)],
            "amount": pa.array([Decimal("1.50")] * 19 + [None], pa.decimal128(9, 2)),
            "text": NOTES[:20],
            "spans": [[{"start": i}] for i in range(20)],
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    told = shown("plain", "predict", str(run), "--data", str(tmp_path / "a.parquet"))
    assert told.code == 0, told
    found = pq.read_table(tmp_path / "a.predictions.parquet")
    assert found.select(table.column_names).equals(table)
    assert found.schema.field("prediction").type == pa.string()
    assert all(
        field.type == pa.float64()
        for field in found.schema
        if field.name.startswith("probability_")
    )
    require_answers(
        found.to_pylist(), expected[:20], lambda row, label: row[f"probability_{label}"]
    )


@pytest.mark.parametrize("end", ["csv", "parquet", "jsonl"])
@pytest.mark.parametrize("begin", ["csv", "parquet", "jsonl"])
def test_every_format_is_written_from_every_other(run, tmp_path, expected, begin, end):
    texts, path, out = NOTES[:5], tmp_path / f"a.{begin}", tmp_path / f"b.{end}"
    records = [{"k": i, "on": i > 2, "text": text} for i, text in enumerate(texts)]
    if begin == "parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    elif begin == "jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["k", "on", "text"])
            writer.writeheader()
            writer.writerows(records)
    told = shown("plain", "predict", str(run), "--data", str(path), "--out", str(out))
    assert told.code == 0, told
    if end == "parquet":
        found = pq.read_table(out).to_pylist()
        typed = begin != "csv"
        assert [type(found[0][name]) for name in ("k", "on")] == (
            [int, bool] if typed else [str] * 2
        )
    elif end == "jsonl":
        found = [json.loads(line) for line in out.read_text().splitlines()]
    else:
        found = rows_of(out)
    assert [row["text"] for row in found] == texts
    assert [str(row["k"]) for row in found] == list("01234")
    assert [str(row["on"]).lower() for row in found] == ["false"] * 3 + ["true"] * 2
    assert [row["prediction"] for row in found] == [answer["label"] for answer in expected[:5]]


class Killed(BaseException):
    """As SIGKILL: nothing behind it is done."""


@pytest.mark.parametrize("torn", [False, True])
def test_a_killed_run_goes_on_where_it_stopped(run, tmp_path, expected, monkeypatch, torn):
    path, out = write_notes(tmp_path / "notes.csv"), tmp_path / "out.csv"
    words = ["predict", str(run), "--data", str(path), "--column", "note", "--out", str(out)]
    plain, asked = TextClassification.predict, []

    def once(task, model, examples):
        if asked:
            raise Killed
        asked.extend(examples)
        return plain(task, model, examples)

    with monkeypatch.context() as patch:
        patch.setattr(TextClassification, "predict", once)
        with pytest.raises(Killed):
            shown("plain", *words)
    part = tmp_path / "out.csv.part"
    assert not out.exists() and stat.S_IMODE(part.stat().st_mode) == 0o600
    if torn:
        part.write_bytes(part.read_bytes()[:-7])
    seen = []

    def counting(task, model, examples):
        seen.extend(examples)
        return plain(task, model, examples)

    monkeypatch.setattr(TextClassification, "predict", counting)
    told = shown("json", *words)
    assert told.facts["answered_before"] == len(asked) - torn == 256 - torn
    assert len(seen) == 600 - 256 + torn
    require_answers(rows_of(out), expected, lambda row, label: row[f"probability_{label}"])
    assert not part.exists()


@pytest.mark.parametrize("changed", ["input", "model", "roles"])
def test_answers_to_something_else_are_never_continued(
    run, bert_folder, tmp_path, monkeypatch, changed
):
    path, out = write_notes(tmp_path / "notes.csv"), tmp_path / "out.csv"
    words = ["--data", str(path), "--out", str(out)]
    with monkeypatch.context() as patch:
        patch.setattr(answers._Begun, "append", lambda *_: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            shown("plain", "predict", str(run), *words, "--column", "note")
    column, other = "note", run
    if changed == "input":
        write_notes(path, [*NOTES[:-1], "another"])
    elif changed == "model":
        other = finished(tmp_path, bert_folder, seed=6)
    else:
        column = "zeros"
    told = shown("plain", "predict", str(other), *words, "--column", column)
    assert told.code == 60 and "ST-660" in told.errors and f"another {changed}" in told.errors
    assert not out.exists()
    told = shown("plain", "predict", str(other), *words, "--column", column, "--force")
    assert told.code == 0 and out.exists()


def test_nothing_is_answered_where_something_is_wrong_with_the_file(run, tmp_path, monkeypatch):
    monkeypatch.setattr(TextClassification, "predict", lambda *_: pytest.fail("it was asked"))
    path = tmp_path / "a.csv"
    for content, code in (
        ("id,text\n1,a\n2,secret,c\n", "ST-205"),
        ("id,note\n1,secret\n", "ST-204"),
        ("id,text\n", "ST-207"),
        ("id,text,prediction\n1,secret,x\n", "ST-660"),
    ):
        path.write_text(content)
        told = shown("plain", "predict", str(run), "--data", str(path))
        assert code in told.errors and "secret" not in told.errors
        assert [found.name for found in tmp_path.iterdir()] == ["a.csv"]


def test_a_result_is_never_written_over(run, tmp_path):
    path = write_notes(tmp_path / "notes.csv", NOTES[:2])
    (tmp_path / "notes.predictions.csv").write_text("mine")
    told = shown("plain", "predict", str(run), "--data", str(path), "--column", "note")
    assert told.code == 60 and (tmp_path / "notes.predictions.csv").read_text() == "mine"


def test_a_terminal_says_what_was_written(run, tmp_path):
    path = write_notes(tmp_path / "notes.csv", ["eye", "", "ear"])
    told = shown("terminal", "predict", str(run), "--data", str(path), "--column", "note")
    assert told.code == 0
    assert "3 records, 1 of which are empty" in " ".join(told.text.split())


def test_memory_holds_a_block_and_no_file(run, tmp_path, monkeypatch):
    """However many records: no more than one block is ever asked for at a time."""
    path, sizes = write_notes(tmp_path / "notes.csv"), []
    plain = TextClassification.predict
    monkeypatch.setattr(
        TextClassification,
        "predict",
        lambda task, model, given: sizes.append(len(given)) or plain(task, model, given),
    )
    shown("plain", "predict", str(run), "--data", str(path), "--column", "note")
    assert sizes == [256, 256, 88]
