"""The demonstration's notes: made up, the same again, and their spans exact."""

import re

import pytest
from typer.testing import CliRunner

from silotune import cli
from silotune.data.declared import new_secret
from silotune.data.demo_notes import LABELS, STYLES, example_note, write_notes
from silotune.data.records import load_records
from silotune.data.site import load_sites
from silotune.models.spans import spans_in
from silotune.plan.left_out import left_out
from silotune.plan.plan import Plan


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return write_notes(tmp_path_factory.mktemp("demo") / "notes", patients=12)


@pytest.fixture(scope="module")
def records(demo):
    plan = Plan.load(demo.plan)
    return {
        site.name: load_records(site, plan, roles=plan.roles, secret=new_secret())
        for site in load_sites(demo.plan.parent)
    }


def test_every_note_is_used_and_every_label_occurs_at_every_hospital(demo, records):
    assert [len(found) for found in records.values()] == [
        dict(zip((s.name for s in demo.sites), demo.records, strict=True))[name] for name in records
    ]
    for found in records.values():
        assert found.left_out == ()
        assert found.n_units() == 12
        labels = {span.label for e in found.examples for span in spans_in(e["spans"])}
        assert labels == set(LABELS)


def test_the_plan_leaves_its_numbers_to_the_rules(demo):
    ruled = {number.key for number in left_out(Plan.written_in(demo.plan))}
    assert {"model.centre_texts", "lora.r", "optimizer.site.head_lr"} < ruled
    assert Plan.load(demo.plan).head_rounds == Plan.load(demo.plan).rounds.number


def test_spans_are_exact_and_what_is_no_identifier_is_in_none(records):
    for name, found in records.items():
        for example in found.examples:
            text, spans = example["text"], spans_in(example["spans"])
            for span in spans:
                value = text[span.start : span.end]
                assert value == value.strip()
                assert bool(re.search(r"\d", value)) >= (span.label in {"DATE", "PHONE", "NUMBER"})
                assert not (span.label == "NAME" and re.search(r"\d", value))
            marked = {n for span in spans for n in range(span.start, span.end)}
            for word in ("parkinson", "crohn", "graves", "metformin"):
                for place in re.finditer(word, text.lower()):
                    assert not marked & set(range(*place.span())), name


def test_hospitals_write_dates_in_their_own_ways(records):
    seen = {
        name: {
            re.sub(r"[a-zA-Z]+", "m", re.sub(r"\d", "0", e["text"][s.start : s.end]))
            for e in found.examples
            for s in spans_in(e["spans"])
            if s.label == "DATE"
        }
        for name, found in records.items()
    }
    assert seen["riverside"] == {"00/00/0000", "00/00/00"}
    assert seen["st-hildas"] == {"00 m 0000"}
    assert seen["lindenhof"] == {"00.00.0000", "00.00.00"}


def test_the_same_arguments_give_the_same_bytes_and_the_readme_says_who_made_them_up(
    demo, tmp_path
):
    again = write_notes(tmp_path / "notes", patients=12)
    for place in ("README.txt", *(f"{style.name}/records.csv" for style in STYLES)):
        written = (again.plan.parent / place).read_bytes()
        assert written == (demo.plan.parent / place).read_bytes()
    assert "EVERY NOTE HERE IS MADE UP" in (demo.plan.parent / "README.txt").read_text()
    assert example_note() == example_note()


def test_the_command_says_that_faker_made_the_notes_up_and_what_comes_next(tmp_path):
    place = tmp_path / "notes"
    ran = CliRunner().invoke(cli.app, ["demo", "notes", str(place), "--quick", "--write-only"])
    assert ran.exit_code == 0, ran.output
    said = " ".join(ran.output.split())
    assert "Faker made them up: no patient is in them." in said
    assert "silotune simulate" in said
    plan = Plan.load(place / "plan.toml")
    assert plan.rounds.number <= 40
    assert {site.name for site in load_sites(place)} == {style.name for style in STYLES}
