"""Every pairing of engine, secured sum and model by the command line, and one round of each strategy.

The output's form and the baselines go round within it, so that each meets every engine, sum and model.
"""

import itertools
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest

from silotune.errors import PlanInvalid, RunDirectoryInvalid
from silotune.plan.strategies import STRATEGIES
from silotune.simulation import run
from silotune.simulation.grid import WorkerGrid
from tests.commands.commanded import MODELS, SECURE, SECURED, causal_federation, newest, words
from tests.commands.terminal import FORMS, shown
from tests.federation import PRIVATE, write_federation

pytestmark = pytest.mark.slow

NAMES = ("alpha", "beta", "gamma", "kappa", "omega", "sigma", "zeta")
PAIRINGS = [
    (engine, secured, model, FORMS[number % 3], number % 2 == 0)
    for number, (engine, secured, model) in enumerate(
        itertools.product(("processes", "ray"), SECURED, MODELS)
    )
]


@pytest.fixture(scope="module")
def federations(tmp_path_factory, bert_folder, llama_folder):
    classes = write_federation(tmp_path_factory.mktemp("classes"), bert_folder)
    causal = causal_federation(tmp_path_factory.mktemp("causal"), llama_folder)
    return {"head": classes, "lora": classes, "causal": causal}


@pytest.mark.parametrize(("engine", "secured", "model", "form", "baselines"), PAIRINGS)
def test_every_pairing_goes_to_its_end(federations, engine, secured, model, form, baselines):
    federation = federations[model]
    command = words(federation, **{**SECURED[secured], **MODELS[model]})
    more = ["--baselines"] if baselines else []
    found = shown(form, *command, f"--engine={engine}", "--workers=2", *more)
    assert found.code == 0, found.text + found.errors
    directory = newest(federation)
    methods = [method["key"] for method in directory.read_json("results.json")["methods"]]
    assert methods[0] == "federated"
    assert ("pooled" in methods) == baselines
    assert directory.final_adapter.is_dir()
    assert directory.report_path.is_file()
    kinds = [event["event"] for event in directory.events]
    assert kinds.count("round_finished") == 3
    assert ("site_phase" in kinds) == (secured != "none")
    if form == "json":
        assert found.facts["finished"]
    else:
        assert "3 rounds finished" in found.text


@pytest.mark.parametrize("secured", SECURED)
def test_a_run_that_was_killed_is_resumed_by_its_command(federations, secured):
    federation = federations["lora"]
    settings = {**SECURED[secured], **MODELS["lora"], "rounds.number": 8}
    whole = shown("json", *words(federation, **settings), "--workers=1").facts["run_directory"]
    start = [sys.executable, "-c", "from silotune.cli import main; main()"]
    process = subprocess.Popen(
        [*start, *words(federation, **settings), "--workers=1"], stdout=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline:
            time.sleep(0.02)
            with suppress(RunDirectoryInvalid):  # it is just being made
                cut = newest(federation)
                finished = [e for e in cut.events if e["event"] == "round_finished"]
                if not whole.endswith(cut.root.name) and len(finished) >= 2:
                    break
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    found = shown("plain", "simulate", f"--resume={cut.root}")
    assert found.code == 0, found.errors
    final = "adapters/final/adapter_model.safetensors"
    assert (cut.root / final).read_bytes() == (cut.root.parent / whole / final).read_bytes()


# --- strategies -----------------------------------------------------------------------------------

MODES = {
    "none": {},
    "record": PRIVATE,
    "site": {
        **{"privacy.mode": "site", "privacy.epsilon": 8.0, "privacy.delta": 1e-4},
        **{"privacy.clip": 1.0, "privacy.site": {"noise": "coordinator"}},
        **{"rounds.local_steps": 2, "aggregation.weights": "equal"},
    },
}
SUMS = {
    "bare": {},
    "secure": {
        **SECURE,
        **{"aggregation.cohort": 7, "aggregation.threshold": 5, "rounds.min_sites": 5},
    },
}
SEVERAL = {"rounds.local_steps": 2, "optimizer.server.name": "none"}
VOTES = {"aggregation.weights": "equal"}
NEEDS = {
    "flexlora": SEVERAL,
    "scaffold": {**SEVERAL, "optimizer.site.local": "sgd"},
    "median": VOTES,
    "geometric_median": VOTES,
    "trimmed_mean": {**VOTES, "aggregation.trim": 0.2},
    "multi_krum": {**VOTES, "aggregation.byzantine": 1, "aggregation.selected": 3},
    "norm_bound": {"aggregation.bound": 1.0},
}


@pytest.fixture(scope="module")
def seven(tmp_path_factory, bert_folder):
    return write_federation(tmp_path_factory.mktemp("seven"), bert_folder, names=NAMES)


def settings_of(strategy, mode, secured):
    one = {"rounds.number": 1, "rounds.min_sites": 7, "optimizer.site.head_rounds": 0}
    named = {"aggregation.strategy": strategy, **NEEDS.get(strategy, {})}
    bound = {"aggregation.update_bound": 1.0} if (mode, secured) == ("none", "secure") else {}
    return {**one, **named, **MODES[mode], **SUMS[secured], **bound}


COMBINATIONS = list(itertools.product(STRATEGIES, MODES, SUMS))


@pytest.mark.parametrize(("strategy", "mode", "secured"), COMBINATIONS)
def test_every_combination_that_a_plan_may_name_runs_a_round(
    seven, strategy, mode, secured, monkeypatch
):
    monkeypatch.setattr(run, "WorkerGrid", lambda *a, **k: WorkerGrid(*a, **{**k, "workers": 0}))
    settings = settings_of(strategy, mode, secured)
    try:
        seven.plan.override(settings)
        accepted = True
    except PlanInvalid:
        accepted = False
    found = shown("json", *words(seven, **settings))
    assert (found.code == 0) == accepted, found.errors
    if accepted:
        assert found.facts["rounds_finished"] == 1
        assert len(found.facts["sites_trained"]) == 7
    else:
        assert "ST-1" in found.errors


def test_each_strategy_is_accepted_with_and_without_privacy(seven):
    accepted = set()
    for strategy, mode, secured in COMBINATIONS:
        try:
            seven.plan.override(settings_of(strategy, mode, secured))
            accepted.add((strategy, mode, secured))
        except PlanInvalid:
            continue
    for strategy in STRATEGIES:
        assert {(strategy, "none", "bare"), (strategy, "record", "bare")} <= accepted
    assert ("fedavg", "record", "secure") in accepted
    assert ("fedavg", "site", "bare") in accepted
