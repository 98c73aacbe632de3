"""`silotune evaluate --site`: the records that a run held out, by the site's split, and no others."""

import csv
import json
import shutil

import pytest

from silotune.data.declared import SECRET_FILE, own_secret
from silotune.data.records import Split, load_records
from silotune.data.site import SiteConfig
from silotune.inference import evaluation
from silotune.inference.evaluated import ModelEvaluation
from silotune.inference.held_out import HeldOut
from silotune.rounds.run_directory import RunDirectory
from silotune.rounds.trained import find_trained
from silotune.trust.vault import Vault
from tests.commands.commanded import newest, words
from tests.commands.terminal import shown
from tests.commands.test_predict import finished
from tests.federation import write_federation


@pytest.fixture(scope="module")
def made(tmp_path_factory, bert_folder):
    return write_federation(tmp_path_factory.mktemp("federation"), bert_folder, patients=True)


def kept(state, secret=b"one secret of thirty-two bytes 1"):
    """The secret of a site's split in a state folder."""
    return own_secret(state, Vault(state), new=secret)


@pytest.fixture(scope="module")
def run(made, bert_folder):
    """A finished run that knows the sites' splits, as a simulation leaves it."""
    root = finished(
        made.folder / "runs", bert_folder, plan__seed=None, privacy__unit="patient",
        privacy__max_records_per_unit=2, model__labels=["no", "yes"], data__dataset="notes",
        data__test_share=0.3, data__validation_share=0.2,
    )  # fmt: skip
    for site in made.sites:
        kept(RunDirectory.open(root).site(site.name))
    return root


@pytest.fixture
def site(made):
    return made.sites[0].folder


@pytest.fixture
def looked_at(monkeypatch):
    """What an evaluation is given, by what it is called."""
    seen, look = {}, evaluation.look

    def watching(models, source, **settings):
        assert isinstance(source, HeldOut)
        blocks = list(source.some())
        seen[source.title] = [e["text"] for some in blocks for e in some.examples]
        return look(models, source, **settings)

    monkeypatch.setattr(evaluation, "look", watching)
    return seen


def texts_of(site, plan, secret):
    """The site's texts by their side of the split."""
    config = SiteConfig.load(site / "site.toml")
    records = load_records(config, plan, roles=plan.roles, secret=secret)
    return {s: [records.examples[row]["text"] for row in records.rows(s)] for s in Split}


def evaluated(run, site, *more):
    told = shown("json", "evaluate", str(run), "--site", str(site), "--draws", "100", *more)
    assert told.code == 0, told.errors
    return ModelEvaluation.model_validate_json(told.text)


def plan_of(run):
    return find_trained(run).plan


@pytest.mark.parametrize("path", ["", "adapters/final"])
def test_the_runs_test_part_is_evaluated_and_its_validation_part_chooses(
    run, site, looked_at, path
):
    state = run / "sites" / site.name
    sides = texts_of(site, plan_of(run), kept(state))
    found = evaluated(run / path, site)
    assert found.records == len(sides[Split.TEST]) > 0
    assert found.units < found.records and found.unit_column == "patient"
    assert [*looked_at.values()] == [sides[Split.TEST], sides[Split.VALIDATION]]
    for part in (found.temperature.parts, found.threshold.parts):
        assert part.how == "the validation part"
        assert (part.chosen_on, part.scored_on) == (len(sides[Split.VALIDATION]), found.records)
    assert site.name in found.data and "test" in found.data


def test_no_record_of_training_is_among_them_and_another_secret_would_take_some(
    run, site, looked_at
):
    state = run / "sites" / site.name
    trained_on = set(texts_of(site, plan_of(run), kept(state))[Split.TRAIN])
    evaluated(run, site)
    assert not trained_on & {text for texts in looked_at.values() for text in texts}
    other = texts_of(site, plan_of(run), b"another secret")
    assert trained_on & set(other[Split.TEST])


def test_the_state_of_a_site_knows_the_split_where_the_run_is_not_here(
    run, made, tmp_path, looked_at
):
    site = tmp_path / "site"
    shutil.copytree(made.sites[1].folder, site)
    adapter = tmp_path / "adapter"
    shutil.copytree(run / "adapters" / "final", adapter)
    told = shown("plain", "evaluate", str(adapter), "--site", str(site))
    assert told.code == 60 and "ST-662" in told.errors and not looked_at
    assert not (site / "state").exists(), "no secret is made up"
    secret = kept(site / "state", b"one secret of thirty-two bytes 2")
    evaluated(adapter, site)
    assert next(iter(looked_at.values())) == texts_of(site, plan_of(run), secret)[Split.TEST]


def test_a_run_whose_secret_is_gone_is_refused_even_where_the_site_has_another(run, made, tmp_path):
    other = tmp_path / "run"
    shutil.copytree(run, other)
    site = tmp_path / "site"
    shutil.copytree(made.sites[0].folder, site)
    kept(site / "state", b"one secret of thirty-two bytes 2")
    name = SiteConfig.load(site / "site.toml").name
    (other / "sites" / name / SECRET_FILE).unlink()
    told = shown("plain", "evaluate", str(other), "--site", str(site))
    assert told.code == 60 and "ST-662" in told.errors


@pytest.mark.parametrize(
    "more",
    [("--data", "a.csv"), ("--column", "text=note"), ("--unit", "patient")],
)
def test_what_the_site_says_is_not_said_again(run, site, more):
    told = shown("plain", "evaluate", str(run), "--site", str(site), *more)
    assert told.code == 2 and more[0] in told.errors


def test_groups_are_those_of_the_dataset(run, site):
    told = shown("plain", "evaluate", str(run), "--site", str(site), "--group", "ward")
    assert told.code == 20 and "ST-204" in told.errors


def test_neither_a_file_nor_a_site_is_refused(run):
    told = shown("plain", "evaluate", str(run))
    assert told.code == 2 and "--site" in told.errors


def test_a_dataset_that_says_the_split_itself_needs_no_secret(run, made, tmp_path, looked_at):
    site, adapter = tmp_path / "site", tmp_path / "adapter"
    shutil.copytree(made.sites[0].folder, site)
    shutil.copytree(run / "adapters" / "final", adapter)
    with (site / "notes.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row["side"] = "test" if row["patient"].endswith("1") else "train"
    with (site / "notes.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    text = (site / "site.toml").read_text()
    (site / "site.toml").write_text(text.replace('text = "note"', 'text = "note"\nsplit = "side"'))
    found = evaluated(adapter, site)
    (texts,) = looked_at.values()
    assert texts == [row["note"] for row in rows if row["side"] == "test"]
    assert found.temperature.parts.how == "half of the units"


def test_draws_are_shown_while_they_are_drawn(run, site):
    told = shown("terminal", "evaluate", str(run), "--site", str(site), "--draws", "200")
    assert told.code == 0 and "drawing for intervals" in told.text and "/200" in told.text
    assert "drawing" not in shown("plain", "evaluate", str(run), "--site", str(site)).errors
    facts = shown("json", "evaluate", str(run), "--site", str(site), "--draws", "100").text
    assert json.loads(facts)["draws"] == 100


@pytest.mark.slow
def test_a_simulation_leaves_what_tells_its_test_part(tmp_path, bert_folder, looked_at):
    made = write_federation(tmp_path, bert_folder, patients=True)
    told = shown("plain", *words(made, **{"rounds.number": 2, "plan.seed": None}))
    assert told.code == 0, told.errors
    run = newest(made)
    for site in made.sites:
        config, state = SiteConfig.load(site.folder / "site.toml"), run.site(site.name)
        secret = own_secret(state, Vault(state))
        trained_on = set(texts_of(site.folder, plan_of(run.root), secret)[Split.TRAIN])
        looked_at.clear()  # sites may have the same text
        found = evaluated(run.root, config.folder)
        assert found.records and trained_on
        assert not trained_on & {text for texts in looked_at.values() for text in texts}
