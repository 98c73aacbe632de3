"""Spans are learned by a whole private run of three sites: baselines, report and answers."""

import pytest
from typer.testing import CliRunner

from silotune import cli
from silotune.client.model_cache import ModelCache
from silotune.client.site_run import SiteRun
from silotune.errors import PlanInvalid
from silotune.models.layout import initial_adapter
from silotune.plan.plan import Plan, plan_in_words
from silotune.report.report import write_report
from silotune.simulation.run import Settings
from tests.federation import CHOICES, PRIVATE, write_federation
from tests.task_sites import mark_spans
from tests.whole_run import play

TOKENS = {
    "model.task": "token_classification", "model.labels": ["ILL", "SIDE"], "data.max_length": 16,
    "optimizer.site.head_lr": 0.3,
}  # fmt: skip


@pytest.fixture(scope="module")
def federation(tmp_path_factory, bert_folder):
    """The notes of `write_federation`, three of them in each, with their illnesses and sides marked."""
    made = write_federation(tmp_path_factory.mktemp("tokens"), bert_folder)
    mark_spans(made.folder)
    return made


@pytest.fixture(scope="module")
def ran(federation):
    return play(federation, "tokens", settings=Settings(workers=2, baselines=True), **TOKENS)


def test_the_run_and_its_baselines_are_scored_by_whole_entities(ran):
    found = ran.read_json("results.json")
    methods = {m["key"]: m for m in found["methods"]}
    assert set(methods) == {
        "base", "federated", "own", "pooled", "probe_federated", "probe_pooled", "personal",
    }  # fmt: skip
    for method in methods.values():
        assert {"entity_f1", "entity_recall", "entity_precision"} <= set(method["test"])
        assert all(row["n"] > 0 for row in method["by_site"].values())


def test_the_report_shows_entity_f1(ran):
    write_report(ran.root)
    assert "entity F1" in (ran.root / "report.html").read_text()


def test_its_adapter_marks_what_it_finds_in_texts_of_any_length(ran):
    text = "lupus of the left side 7. " * 12
    result = CliRunner().invoke(
        cli.app, ["predict", str(ran.root), "--redact", "--threshold", "0.2"], input=text
    )
    assert result.exit_code == 0, result.output
    assert "[ILL]" in result.stdout or "[SIDE]" in result.stdout


def test_long_records_take_several_windows_and_a_site_trains_on_them(federation):
    plan = federation.plan.override({**PRIVATE, **TOKENS})
    site, *_ = federation.sites
    part = SiteRun(
        site, state=federation.folder / "s", plan=plan, run="r", models=ModelCache(CHOICES)
    )
    assert part.training.encoded.sequences.max() > 1
    trainer = part.training.alone()
    start = initial_adapter(trainer.layout, plan)
    for number in (1, 5):  # of the head alone, of everything
        assert trainer.round(start, number).flat.any()


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"model.pooling": "last"}, "model.pooling: token_classification has a head on every"),
        ({"data.max_length": 8}, "data.max_length: token_classification needs windows of at"),
        ({"model.labels": []}, "model.labels: token_classification needs at least one label"),
        ({"model.task": "text_classification", "data.max_windows": 3}, "reads no text in windows"),
    ],
)
def test_what_such_a_plan_cannot_have_is_refused_by_name(federation, settings, problem):
    with pytest.raises(PlanInvalid, match=problem):
        federation.plan.override({**TOKENS, **settings})


def test_one_label_is_enough_and_the_plan_says_in_words_what_is_found(federation):
    plan = federation.plan.override({**TOKENS, "model.labels": ["ILL"], "data.max_windows": 3})
    words = dict(plan_in_words(plan))
    assert "tuned to find ILL in a text" in words["Model"]
    assert "texts of up to 3 windows of 16 tokens" in words["Data"]
    assert Plan.from_canonical(plan.canonical()) == plan
