"""`lora.start`: a run goes on with an earlier one's adapter, and what both cost a site adds up."""

import json

import numpy as np
import pytest

from silotune.models.start import require_start, start_adapter
from silotune.plan.plan import Plan
from silotune.privacy.certificate import verify
from silotune.privacy.ledger import LEDGER_FILE, Ledger
from silotune.privacy.tally import epsilon_of
from silotune.simulation import run
from silotune.simulation.grid import WorkerGrid
from tests.commands.commanded import PRIVATE, newest, words
from tests.commands.terminal import shown
from tests.federation import write_federation

SETTINGS = {
    **PRIVATE,
    "rounds.number": 2,
    "optimizer.site.head_rounds": 0,
    "privacy.epsilon": 4.0,
    "plan.seed": None,
}


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    monkeypatch.setattr(run, "WorkerGrid", lambda *a, **k: WorkerGrid(*a, **{**k, "workers": 0}))


@pytest.fixture(scope="module")
def federation(tmp_path_factory, bert_folder):
    return write_federation(tmp_path_factory.mktemp("going-on"), bert_folder)


@pytest.fixture(scope="module")
def first(federation):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "WorkerGrid", lambda *a, **k: WorkerGrid(*a, **{**k, "workers": 0}))
        assert shown("json", *words(federation, **SETTINGS)).code == 0
    return newest(federation)


def identity(directory):
    return json.loads((directory.final_adapter / "silotune.json").read_text())["adapter_sha256"]


def going_on(directory, **more):
    start = {"adapter": str(directory.root), "sha256": identity(directory)}
    return {**SETTINGS, "lora.start": start, **more}


def plan_of(federation, settings):
    return Plan.load(federation.plan_path, settings)


@pytest.fixture(scope="module")
def second(federation, first):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "WorkerGrid", lambda *a, **k: WorkerGrid(*a, **{**k, "workers": 0}))
        found = shown("json", *words(federation, **going_on(first)))
    assert found.code == 0, found.errors
    return newest(federation)


def test_the_first_round_begins_at_the_earlier_adapter(federation, first):
    plan = plan_of(federation, going_on(first))
    arrays = first.load_adapter(2)
    layout = federation.runs()[0].training.layout()
    assert np.array_equal(start_adapter(layout, plan), layout.pack(arrays))


def test_a_certificate_adds_up_what_both_runs_cost_a_site(federation, first, second):
    alone, both = (
        verify(directory.site("alpha") / "certificate.json").body for directory in (first, second)
    )
    assert alone.together is None
    assert both.epsilon == pytest.approx(alone.epsilon)
    twice = epsilon_of({part.event: 2 * part.times for part in alone.mechanisms}, delta=alone.delta)
    assert both.together == pytest.approx(twice)
    assert alone.epsilon < both.together < 2 * alone.epsilon
    assert "with the runs before it" in both.statement


def test_what_was_held_out_once_is_held_out_again(first, second):
    """Fingerprints are keyed by a site's secret, which decides what is held out."""
    found = first.read_json("records.json")
    assert all(found.values())
    assert second.read_json("records.json") == found


def test_a_search_that_gives_all_its_runs_one_split_keeps_that_of_the_start(federation, first):
    secrets = {site.name: bytes(32) for site in federation.sites}
    found = run.simulate(
        federation.plan_path,
        runs=federation.folder / "searched",
        settings=run.Settings(workers=1),
        listener=lambda event: None,
        overrides=going_on(first),
        secrets=secrets,
    )
    assert found.read_json("records.json") == first.read_json("records.json")


def test_a_sites_ledger_holds_both_runs(first, second):
    ledger = Ledger(second.site("alpha") / LEDGER_FILE, create=False)
    assert {a.run for a in ledger.runs("notes") if a.charged} == {first.name, second.name}
    ledger.close()


def test_the_card_names_its_ancestor(first, second):
    assert identity(first) in (second.final_adapter / "README.md").read_text()
    assert identity(first) != identity(second)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"lora.start": {"adapter": "nowhere", "sha256": "0" * 64}}, "no folder"),
        ({"lora.r": 4}, "lora.r"),
        ({"lora.alpha": 3.0}, "lora.alpha"),
        ({"lora.scaling": "rslora"}, "lora.scaling"),
        ({"model.labels": ["yes", "no"]}, "model.labels"),
        ({"lora.last_layers": 1}, "other layers"),
        ({"aggregation.strategy": "ffa"}, "never sends"),
        ({"aggregation.head": "local", "optimizer.site.head_rounds": 0}, "never sends"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_before_any_site_is_asked(
    federation, first, change, reason
):
    found = shown("plain", *words(federation, **going_on(first, **change)))
    assert found.code != 0
    assert reason in " ".join(found.errors.split())


def test_another_adapter_than_the_plan_names_is_refused(federation, first):
    start = {"adapter": str(first.root), "sha256": "0" * 64}
    found = shown("plain", *words(federation, **{**SETTINGS, "lora.start": start}))
    assert found.code != 0
    assert identity(first) in "".join(found.errors.split())


def test_plan_check_looks_at_the_start(federation, first, tmp_path):
    plan = plan_of(federation, going_on(first))
    assert require_start(plan) is not None
    sets = [
        f"--set=lora.start.adapter={json.dumps(str(first.root))}",
        f"--set=lora.start.sha256={json.dumps('0' * 64)}",
    ]
    found = shown("plain", "plan", "check", str(federation.plan_path), *sets)
    assert found.code != 0
    assert "lora.start.sha256" in found.errors
