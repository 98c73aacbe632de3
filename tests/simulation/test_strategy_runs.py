"""Whole simulations of strategies that do more than average one vector."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from silotune.errors import QuorumLost
from silotune.models.base import load_model
from silotune.plan.plan import Plan
from silotune.simulation import run
from silotune.simulation.grid import WorkerGrid
from silotune.simulation.run import Settings, resume, simulate
from tests.federation import PRIVATE, write_federation

SEVERAL = {"rounds.local_steps": 2, "optimizer.server.name": "none"}


class Stopped(Exception):
    pass


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    """The very same messages, without a second process: these tests are about what is in them."""
    monkeypatch.setattr(run, "WorkerGrid", lambda *a, **k: WorkerGrid(*a, **{**k, "workers": 0}))


def play(federation, name, *, stop_after=None, private=False, **overrides):
    def listen(event):
        if event["event"] == "round_finished" and event["round"] == stop_after:
            raise Stopped

    settings = {**(PRIVATE if private else {}), "rounds.number": 4, **overrides}
    return simulate(
        federation.plan_path,
        runs=federation.folder / name,
        settings=Settings(workers=1),
        listener=listen,
        overrides=settings,
    )


def adapters(directory):
    return [
        {name: a.tobytes() for name, a in load_file(directory.adapter_of_round(n)).items()}
        for n in directory.adapter_rounds()
    ]


def evaluations(directory, view="simulator"):
    return [e for e in directory.events if e["event"] == "evaluated" and e["view"] == view]


@pytest.fixture(scope="module")
def federation(tmp_path_factory, bert_folder):
    return write_federation(tmp_path_factory.mktemp("strategies"), bert_folder)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("fedsa", {"aggregation.strategy": "fedsa"}),
        (
            "scaffold",
            {"aggregation.strategy": "scaffold", "optimizer.site.local": "sgd", **SEVERAL},
        ),
        ("flexlora", {"aggregation.strategy": "flexlora", **SEVERAL}),
    ],
)
def test_a_run_stopped_and_resumed_ends_as_the_whole_one(federation, name, settings):
    whole = play(federation, f"{name}-whole", **settings)
    with pytest.raises(Stopped):
        play(federation, f"{name}-halved", stop_after=3, **settings)
    (path,) = (federation.folder / f"{name}-halved").iterdir()
    halved = resume(path, settings=Settings(workers=1), listener=lambda event: None)
    assert adapters(halved) == adapters(whole)
    last = [e.get("personal", e["pooled"]) for e in (evaluations(d)[-1] for d in (whole, halved))]
    assert last[0] == last[1]


def test_kept_parts_are_reported_beside_the_shared_model(federation):
    directory = play(federation, "personal", private=True, **{"aggregation.strategy": "fedsa"})
    last = evaluations(directory)[-1]
    assert set(last["personal"]["sites"]) == set(last["sites"]) == {"alpha", "beta", "gamma"}
    start = load_file(directory.adapter_of_round(1))
    final = load_file(directory.adapter_of_round(4))
    assert all(not a.any() for n, a in final.items() if "lora_B" in n)
    assert all((a != start[n]).any() for n, a in final.items() if "lora_A" in n)
    for site in ("alpha", "beta", "gamma"):
        files = list((directory.site(site) / "memory").iterdir())
        assert files and all(f.stat().st_mode & 0o777 == 0o600 for f in files)
    spent = directory.read_json("privacy.json")["sites"]["alpha"]["epsilon"]
    assert spent == pytest.approx(8.0, rel=1e-3)


def test_personal_metrics_are_released_as_one_mechanism(federation):
    directory = play(
        federation,
        "released",
        private=True,
        **{"aggregation.strategy": "fedsa", "privacy.metrics_share": 0.2},
    )
    released = evaluations(directory, view="released")
    assert released and {"personal_accuracy"} & set(released[-1]["pooled"])
    assert directory.read_json("privacy.json")["sites"]["beta"]["epsilon"] <= 8.0


@pytest.fixture
def uneven(tmp_path, bert_folder):
    """Three sites, the second of which trains rank 1 only."""
    federation = write_federation(tmp_path, bert_folder)
    config = federation.folder / "beta" / "site.toml"
    config.write_text(config.read_text() + "\n[resources]\nmax_rank = 1\n")
    return federation


def test_a_site_of_a_smaller_rank_takes_part_with_flexlora(uneven):
    directory = play(uneven, "flexlora", **{"aggregation.strategy": "flexlora", **SEVERAL})
    sizes = {
        e["site"]: e["bytes"]
        for e in directory.events
        if e["event"] == "site_replied" and e["round"] == 4
    }
    plan = Plan.from_canonical(json.dumps(directory.read_json("resolved.json")["plan"]))
    layout = load_model(plan, device="cpu", attention="eager", dtype="float32").layout
    trained = {"A", "B", "head"}
    whole = sum(s.stop - s.start for s in layout.spans(trained))
    small = sum(s.stop - s.start for s in layout.at_rank(1).spans(trained))
    assert sizes == {"alpha": 4 * whole, "beta": 4 * small, "gamma": 4 * whole}
    assert small < whole
    assert directory.final_adapter.is_dir()


def test_other_strategies_refuse_a_site_of_a_smaller_rank(uneven):
    with pytest.raises(QuorumLost, match="ST-518"):
        play(uneven, "refused", **{"rounds.min_sites": 3})


def test_client_level_privacy_by_the_coordinator_is_said_to_trust_it(federation):
    site = {
        "privacy.mode": "site",
        "privacy.epsilon": 8.0,
        "privacy.delta": 1e-4,
        "privacy.clip": 0.5,
        "privacy.site": {"noise": "coordinator", "quantile": 0.5},
        "aggregation.weights": "equal",
        **SEVERAL,
    }
    directory = play(federation, "trusted", **site, **{"plan.seed": None})
    privacy = directory.read_json("privacy.json")
    assert privacy["private"] is False  # what the sites send is not
    assert "against everybody but the coordinator" in privacy["statement"]
    assert not privacy["sites"]


def test_client_level_privacy_by_the_sites_is_charged_and_certified(federation):
    site = {
        "privacy.mode": "site",
        "privacy.epsilon": 8.0,
        "privacy.delta": 1e-4,
        "privacy.clip": 0.5,
        "privacy.site": {"noise": "site"},
        "aggregation.weights": "equal",
        **SEVERAL,
    }
    directory = play(federation, "local", **site, **{"plan.seed": None})
    privacy = directory.read_json("privacy.json")
    assert privacy["private"] is True
    facts = privacy["sites"]["alpha"]
    assert facts["epsilon"] == pytest.approx(8.0, rel=1e-3)
    assert (facts["rate"], facts["steps"]) == (1.0, 4)
    from silotune.privacy import certificate

    body = certificate.verify(directory.site("alpha") / "certificate.json").body
    assert "all records of this site together" in body.statement
    # The noise: sigma times twice the norm on every coordinate; of 4 rounds the last.
    first, last = (load_file(directory.adapter_of_round(n)) for n in (3, 4))
    moved = np.concatenate([(last[n] - first[n]).ravel() for n in last])
    want = facts["sigma"] * 2 * 0.5 / np.sqrt(3)
    assert moved.std() == pytest.approx(want, rel=0.5)
