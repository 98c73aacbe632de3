"""Roles whose value is a list: one text whatever the source, and faults that tell nothing."""

from __future__ import annotations

import csv
import json
import sqlite3

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from silotune.cli import app
from silotune.client.training.look import look
from silotune.client.training.messages import AskLook
from silotune.data.roles import read_roles
from silotune.data.site import SiteConfig, load_sites
from silotune.data.structured import spans_text, words_text
from silotune.errors import SiteConfigInvalid
from silotune.models.spans import TextSpan, spans_in, written

NOTE = "Seen by Dr. Ménière on 3 May."
SPANS = [{"start": 12, "end": 19, "label": "NAME"}, {"start": 23, "end": 28, "label": "DATE"}]
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ménière?\n"}]
MOVED = [{**s, "start": s["start"] + 2, "end": s["end"] + 2} for s in SPANS]
ROWS = [
    {"note": f"  {NOTE} ", "found": MOVED, "chat": CHAT},
    {"note": "Nothing.", "found": [], "chat": [{"role": "user", "content": "5"}]},
]


def any_label(label: str) -> str:
    return label


def site_of(folder, source, *, columns=None, **said) -> SiteConfig:
    named = columns or {"text": "note", "spans": "found", "messages": "chat"}
    dataset = {**source, "declared_units": 50, "columns": named, **said}
    return SiteConfig.from_mapping({"name": "s", "datasets": {"notes": dataset}}, folder=folder)


def read(folder, source, **more):
    site = site_of(folder, source, **more)
    dataset = site.datasets["notes"]
    roles = {str(role): column for role, column in dataset.columns.by_role().items()}
    return read_roles(dataset, folder=folder, roles=roles)


def lines(folder, rows) -> dict[str, str]:
    (folder / "t.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return {"format": "jsonl", "path": "t.jsonl"}


def as_texts(rows):
    return [{k: v if isinstance(v, str) else json.dumps(v) for k, v in r.items()} for r in rows]


def write_csv(folder):
    with (folder / "t.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(ROWS[0]))
        writer.writeheader()
        writer.writerows(as_texts(ROWS))
    return {"format": "csv", "path": "t.csv"}


def write_json(folder):
    (folder / "t.json").write_text(json.dumps(ROWS))
    return {"format": "json", "path": "t.json"}


def write_parquet(folder):
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "t.parquet")
    return {"format": "parquet", "path": "t.parquet"}


def write_columns(folder):
    """A list of objects as `datasets` writes it: an object of lists."""
    keys = ("start", "end", "label")
    rows = [{**r, "found": {k: [s[k] for s in r["found"]] for k in keys}} for r in ROWS]
    pq.write_table(pa.Table.from_pylist(rows), folder / "t.parquet")
    return {"format": "parquet", "path": "t.parquet"}


def write_sql(folder):
    with sqlite3.connect(folder / "t.db") as base:
        base.execute("CREATE TABLE t (note, found, chat)")
        base.executemany("INSERT INTO t VALUES (:note, :found, :chat)", as_texts(ROWS))
    base.close()
    return {"format": "sql", "url": "sqlite:///t.db", "query": "SELECT * FROM t"}


WRITERS = {
    "nested lines": lambda folder: lines(folder, ROWS),
    "lines of text": lambda folder: lines(folder, as_texts(ROWS)),
    "lists of three": lambda folder: lines(
        folder, [{**r, "found": [list(s.values()) for s in r["found"]]} for r in ROWS]
    ),
    "csv": write_csv,
    "json": write_json,
    "parquet": write_parquet,
    "object of lists": write_columns,
    "sql": write_sql,
}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_list_is_one_text_in_every_source_and_spans_count_the_text_without_its_spaces(
    kind, tmp_path
):
    table = read(tmp_path, WRITERS[kind](tmp_path))
    assert table.faults.found == []
    assert table.columns["text"] == [NOTE, "Nothing."]
    assert table.columns["spans"] == [
        '[{"start":12,"end":19,"label":"NAME"},{"start":23,"end":28,"label":"DATE"}]', "[]",
    ]  # fmt: skip
    assert [NOTE[s.start : s.end] for s in spans_in(table.columns["spans"][0])] == [
        "Ménière", "3 May",
    ]  # fmt: skip
    assert table.columns["messages"] == [
        '[{"role":"user","content":"Hi"},{"role":"assistant","content":"Ménière?\\n"}]',
        '[{"role":"user","content":"5"}]',
    ]


BAD = {
    "column 'found': a span that is empty, or not within the text": [
        [[0, 99, "NAME"]], [[3, 3, "NAME"]], [[4, 5, "NAME"]], [[8, 4, "NAME"]],
    ],
    "column 'found': spans that overlap": [[[0, 4, "NAME"], [3, 6, "DATE"]]],
    "column 'found': no list of start, end and label": [
        "SECRET", {"start": 1}, [[1, 2]], [{"start": "x", "end": 2, "label": "NAME"}],
        [{"start": -1, "end": 2, "label": "NAME"}], [{"start": 1, "end": 2, "label": None}], 7,
        [{"start": True, "end": 2, "label": "NAME"}], {"start": [1], "end": [], "label": []},
    ],
    "column 'found': a span whose label is not one of model.labels": [[[0, 4, "SECRET"]]],
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD)
def test_a_record_with_unfit_spans_is_left_out_counted_and_never_quoted(fault, tmp_path):
    good = {"note": "Seen here", "found": [[0, 4, "NAME"]]}
    rows = [good, *({"note": "Seen here", "found": found} for found in BAD[fault]), good]
    table = read(
        tmp_path, lines(tmp_path, rows), columns={"text": "note", "spans": "found"},
        labels=["NAME", "DATE"],
    )  # fmt: skip
    assert table.rows == [1, len(rows)]
    (found,) = table.faults.found
    assert str(found).startswith(fault)
    assert "SECRET" not in str(found)
    assert len(found.rows) == len(BAD[fault])


def test_a_chat_with_an_unknown_role_is_left_out_counted_and_never_quoted(tmp_path):
    odd = [{"role": "SECRET", "content": "a"}, {"role": "assistant", "content": "SECRET"}]
    rows = [{"chat": CHAT}, {"chat": odd}, {"chat": []}, {"chat": CHAT}]
    table = read(tmp_path, lines(tmp_path, rows), columns={"messages": "chat"})
    assert table.rows == [1, 4]
    told = sorted(map(str, table.faults.found))
    assert told == [
        "column 'chat': a turn whose role is none of system, user, assistant in row 2",
        "column 'chat': no list of role and content in row 3",
    ]


@pytest.mark.parametrize(
    ("columns", "good", "bad"),
    [
        ({"messages": "a"}, {"a": CHAT}, {"a": [{"role": "user", "content": "x\ud800"}]}),
        ({"words": "a", "tags": "b"}, {"a": ["x"], "b": ["O"]}, {"a": ["\ud800"], "b": ["O"]}),
        ({"text": "a", "labels": "b"}, {"a": "x", "b": ["y"]}, {"a": "x", "b": ["\ud800"]}),
    ],
)
def test_half_a_character_that_json_in_a_cell_spells_is_a_fault_of_that_record(
    columns, good, bad, tmp_path
):
    """It has no UTF-8 form: all records of a site that has one would fail with it."""
    table = read(tmp_path, lines(tmp_path, as_texts([good, bad])), columns=columns)
    assert table.rows == [1]
    (fault,) = table.faults.found
    column = "b" if "labels" in columns else "a"
    assert str(fault) == f"column {column!r}: not plain text in row 2"


def test_no_list_of_spans_is_no_annotation_and_an_empty_list_is_one(tmp_path):
    rows = [{"note": "a", "found": None}, {"note": "b", "found": []}, {"note": "c"}]
    table = read(tmp_path, lines(tmp_path, rows), columns={"text": "note", "spans": "found"})
    assert table.columns["spans"] == ["", "[]", ""]


def test_the_site_names_labels_of_spans_and_those_that_it_wants_none_of_are_no_entities(tmp_path):
    rows = [{"note": "Bob, 7", "found": [[0, 3, "per"], [5, 6, "age"]]}]
    columns = {"text": "note", "spans": "found"}
    labels = {"per": "NAME", "age": ""}
    table = read(tmp_path, lines(tmp_path, rows), columns=columns, labels=labels)
    assert spans_in(table.columns["spans"][0]) == [TextSpan(0, 3, "NAME")]


TAGGED = {
    "IOB2": ["O", "B-NAME", "I-NAME", "B-NAME", "O", "B-DATE"],
    "IOB1": ["O", "I-NAME", "I-NAME", "B-NAME", "O", "I-DATE"],
    "BIOES": ["O", "B-NAME", "E-NAME", "S-NAME", "O", "S-DATE"],
    "BILOU": ["O", "B-NAME", "L-NAME", "U-NAME", "O", "U-DATE"],
}


@pytest.mark.parametrize("scheme", TAGGED)
def test_words_and_tags_become_a_text_and_its_spans(scheme, tmp_path):
    words = ["Seen", "Ann", "Lee", "Bob", "on", "Monday"]
    source = lines(tmp_path, [{"tokens": words, "ner": TAGGED[scheme]}])
    table = read(tmp_path, source, columns={"words": "tokens", "tags": "ner"})
    (text,), (spans,) = table.columns["text"], table.columns["spans"]
    assert set(table.columns) == {"text", "spans"}
    assert [(text[s.start : s.end], s.label) for s in spans_in(spans)] == [
        ("Ann Lee", "NAME"), ("Bob", "NAME"), ("Monday", "DATE"),
    ]  # fmt: skip


def test_not_one_tag_for_each_word_is_a_fault_of_that_record(tmp_path):
    rows = [{"w": ["a", "b"], "t": ["O"]}, {"w": ["a"], "t": ["O"]}]
    table = read(tmp_path, lines(tmp_path, rows), columns={"words": "w", "tags": "t"})
    assert table.rows == [2]
    assert str(table.faults.found[0]) == "column 'w': not one tag for each word in row 1"


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ({"text": "{a} {b}", "spans": "s"}, "text is one column"),
        ({"text": "a", "words": "b"}, "text and words say the same"),
        ({"words": "a", "tags": "b", "text": "c"}, "text and words say the same"),
        ({"text": "a", "tags": "b"}, "tags need words"),
        ({"spans": "a"}, "spans need text"),
    ],
)
def test_columns_that_contradict_each_other_are_refused(columns, problem):
    with pytest.raises(SiteConfigInvalid, match=problem):
        site_of(None, {"format": "csv", "path": "t.csv"}, columns=columns)


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@given(texts, st.data())
def test_what_a_span_marks_is_the_same_before_and_after_the_spaces_around_a_text_are_gone(
    text, data
):
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, len(text)))
    if not (marked := text[start:end].strip()):
        return
    value = json.dumps([{"start": start, "end": end, "label": "X"}])
    (found,) = spans_in(spans_text(value, text, any_label))
    assert text.strip()[found.start : found.end] == marked


@given(st.lists(st.tuples(texts, st.sampled_from(["O", "B-X", "I-X", "I-Y"])), max_size=6))
def test_words_give_spans_that_are_within_their_text_and_apart(pairs):
    words, tags = [w for w, _ in pairs], [t for _, t in pairs]
    text, spans = words_text(json.dumps(words), json.dumps(tags), any_label)
    again = spans_text(spans, text, any_label)
    assert again == written(spans_in(spans)) == spans


def test_words_would_not_follow_augmentation_where_spans_count_characters():
    with pytest.raises(
        SiteConfigInvalid, match="augmentation changes words, which spans would not"
    ):
        site_of(
            None, {"format": "csv", "path": "t.csv"}, columns={"text": "a", "spans": "b"},
            augmentation={"copies": 1, "drop": 0.1},
        )  # fmt: skip


def test_a_file_with_nested_spans_is_divided_into_sites_that_read_them(tmp_path):
    source = tmp_path / "all.jsonl"
    source.write_text("\n".join(json.dumps({**row, "id": n}) for n, row in enumerate(ROWS * 30)))
    ran = CliRunner().invoke(
        app,
        ["partition", str(source), str(tmp_path / "sites"), "--column", "text=note",
         "--column", "spans=found", "--column", "messages=chat", "--column", "unit=id",
          "--unit", "person", "--sites", "2"],
    )  # fmt: skip
    assert ran.exit_code == 0, ran.output
    for site in load_sites(tmp_path / "sites"):
        (dataset,) = site.datasets.values()
        roles = {"text": "note", "spans": "found"}
        table = read_roles(dataset, folder=site.folder, roles=roles)
        assert {len(spans_in(spans)) for spans in table.columns["spans"]} == {0, 2}


def test_the_doctors_look_tells_of_spans_by_place_and_count(tmp_path):
    rows = [*ROWS, {"note": "Ménière", "found": [[0, 99, "NAME"]]}, {"note": "Ménière"}]
    site = site_of(tmp_path, lines(tmp_path, rows), columns={"text": "note", "spans": "found"})
    raw = json.dumps({"name": "s", "datasets": {"notes": dataset_of(site)}})
    found = look(AskLook(site=raw, folder=str(tmp_path), rule=2))
    assert found.records == 3
    assert found.left_out == (
        "column 'found': a span that is empty, or not within the text in row 3",
        "column 'found': empty spans in row 4",
    )


def dataset_of(site):
    (dataset,) = site.datasets.values()
    return dataset.model_dump(mode="json", exclude_unset=True)
