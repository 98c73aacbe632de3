"""Secure rounds through the simulation's grid: real sites, real training, dropouts in every phase."""

import json
from pathlib import Path

import numpy as np
import pytest

from silotune.client.model_cache import ModelCache
from silotune.errors import QuorumLost
from silotune.events.view import RunView
from silotune.models.layout import initial_adapter
from silotune.privacy import certificate
from silotune.privacy.ledger import Ledger
from silotune.rounds.rounds import RoundLoop
from silotune.rounds.run_directory import RunDirectory
from silotune.simulation.grid import WorkerGrid
from silotune.simulation.pool import SiteSlot
from silotune.simulation.program import payload_for
from silotune.strategies import strategy_for
from tests.federation import CHOICES, PRIVATE, write_federation
from tests.forked import forked_workers
from tests.simulation.plain_rounds import plainly, random_faults, replied

SECURE = {
    "aggregation.secure": True,
    "aggregation.cohort": 5,
    "aggregation.threshold": 3,
    "rounds.min_sites": 3,
    "rounds.evaluate_every": 0,
}
FIVE = ("alpha", "beta", "delta", "epsilon", "gamma")


@pytest.fixture(scope="module")
def federation(tmp_path_factory, bert_folder):
    return write_federation(tmp_path_factory.mktemp("secure"), bert_folder, names=FIVE)


class Play:
    """One run with failing sites, without processes."""

    def __init__(self, federation, name, *, faults=(), workers=0, **overrides):
        self.plan = federation.plan.override({**PRIVATE, **SECURE, **overrides})
        folder = federation.folder / name
        folder.mkdir()
        self.directory = RunDirectory.create(folder, "secure", plan_toml="")
        self.directory.write_json("resolved.json", {})
        self.states = [self.directory.site(site.name) for site in federation.sites]
        payload = payload_for(
            self.plan,
            run="run",
            sites=federation.sites,
            states=self.states,
            choices=CHOICES,
            shared=folder,
        )
        slots = [SiteSlot(site.name) for site in federation.sites]
        with WorkerGrid(
            "tests.simulation.secure_program:build",
            {**payload, "faults": list(faults)},
            slots,
            workers=workers,
        ) as grid:
            grid.wait_until_ready()
            loop = RoundLoop(plan=self.plan, run="run", grid=grid, store=self.directory)
            self.adapter = loop.execute()
            grid.inspect_all({"op": "finish"}, {})

    def events(self, kind):
        return [event for event in self.directory.events if event["event"] == kind]

    def phases(self, phase):
        """Sites that came to a phase, by round."""
        found = {}
        for event in self.events("site_phase"):
            if event["phase"] == phase:
                found.setdefault(event["round"], set()).add(event["site"])
        return found

    def cells(self, number):
        """Where each site came to in a round, as the pages show it."""
        view = RunView("run")
        view.extend(self.directory.events)
        return {site: cell.phase for site, cell in view.rounds[number].cells.items()}

    def replied(self):
        """Sites whose update is in the sum, by round."""
        return replied(self.directory.events)


def test_ten_rounds_with_dropouts_in_every_phase_equal_the_plain_run(federation, tmp_path):
    faults = random_faults(FIVE, 10, seed=3)
    played = Play(federation, "dropouts", faults=faults, **{"rounds.number": 10})
    present = played.replied()
    assert len(present) == 10
    assert any(len(sites) < 5 for sites in present.values())
    plain = plainly(federation.sites, played.plan, present, tmp_path)
    # The sum is rounded to steps of 2**-15 clip norms or so; Adam carries that on for ten rounds.
    start = initial_adapter(
        strategy_for(played.plan, layout=_layout(federation, played.plan)).layout, played.plan
    )
    moved = np.abs(plain - start).max()
    assert np.abs(played.adapter - plain).max() < 2e-4 * moved


def _layout(federation, plan):
    models = ModelCache(CHOICES)
    return models.for_plan(plan, base=str(plan.model.base)).model.layout


def test_a_round_takes_two_exchanges_and_the_first_two_more(federation):
    played = Play(federation, "calm", **{"rounds.number": 4})
    assert [event["exchanges"] for event in played.events("round_finished")] == [4, 2, 2, 2]
    assert not played.events("site_failed")
    everybody = {number: set(FIVE) for number in (1, 2, 3, 4)}
    assert played.phases("masked") == played.phases("unmasked") == everybody
    assert played.cells(4) == dict.fromkeys(FIVE, "done")


def test_a_dropout_costs_one_exchange_and_the_site_is_back_a_round_later(federation):
    played = Play(federation, "back", faults=["beta 2 masked"], **{"rounds.number": 4})
    assert [event["exchanges"] for event in played.events("round_finished")] == [4, 3, 2, 2]
    present = played.replied()
    assert [("beta" in present[n]) for n in (1, 2, 3, 4)] == [True, False, False, True]
    assert played.cells(2) == {**dict.fromkeys(FIVE, "done"), "beta": "failed"}


def test_a_void_round_opens_nothing_keeps_its_charge_and_the_next_goes_on(federation):
    faults = [f"{site} 2 masked" for site in ("alpha", "beta", "gamma")]
    played = Play(federation, "void", faults=faults, **{"rounds.number": 4})
    (void,) = played.events("round_void")
    assert (void["round"], void["code"]) == (2, "ST-428")
    first, second, third, _ = (played.directory.load_adapter(n) for n in (1, 2, 3, 4))
    assert all((first[name] == second[name]).all() for name in first)
    assert any((third[name] != second[name]).any() for name in first)
    failed = dict.fromkeys(("alpha", "beta", "gamma"), "failed")
    assert played.cells(2) == {**failed, "delta": "dropped", "epsilon": "dropped"}
    charged = {}
    for state in played.states:
        ledger = Ledger(state / "ledger.sqlite", create=False)
        charged[state.name] = len(ledger.events("notes"))
        ledger.close()
    # Those who sent a masked update in round 2 paid for it, though it was never opened.
    sent = {"delta", "epsilon"}
    assert all(charged[name] == 4 for name in sent)
    assert all(charged[name] in {2, 3} for name in charged.keys() - sent)


def test_after_three_void_rounds_the_run_stops(federation):
    faults = [f"{s} {n} masked" for s in ("alpha", "beta", "gamma") for n in (2, 3, 4)]
    faults += [f"{s} {n} keys" for s in ("alpha", "beta", "gamma") for n in (2, 3, 4)]
    with pytest.raises(QuorumLost, match="3 secure rounds in a row"):
        Play(federation, "voids", faults=faults, **{"rounds.number": 6})


@pytest.mark.parametrize(
    "overrides",
    [
        {"aggregation.encoding": "uint16"},
        {"rounds.local_steps": 2, "aggregation.weights": "equal"},
        {"rounds.local_steps": 2, "optimizer.server.name": "none"},
        {"aggregation.strategy": "ffa"},
        {"aggregation.strategy": "rolora"},
        {"aggregation.weights": "equal"},
    ],
    ids=str,
)
def test_linear_strategies_weights_and_encodings_give_the_plain_run(
    federation, overrides, tmp_path, request
):
    name = request.node.callspec.id.translate({ord(c): "-" for c in " {}':,./"})
    played = Play(federation, name, **{"rounds.number": 3, **overrides})
    everybody = {number: set(FIVE) for number in (1, 2, 3)}
    assert played.replied() == everybody
    plain = plainly(federation.sites, played.plan, everybody, tmp_path)
    start = initial_adapter(_layout(federation, played.plan), played.plan)
    moved = np.abs(plain - start).max()
    coarse = overrides.get("aggregation.encoding") == "uint16"
    assert np.abs(played.adapter - plain).max() < (3e-2 if coarse else 2e-4) * moved


def test_uint16_halves_the_upload(federation):
    sizes = {}
    for encoding in ("uint32", "uint16"):
        played = Play(
            federation, encoding, **{"rounds.number": 2, "aggregation.encoding": encoding}
        )
        sizes[encoding] = {event["bytes"] for event in played.events("site_replied")}
    (wide,), (narrow,) = sizes["uint32"], sizes["uint16"]  # two head-only rounds
    assert wide == 2 * narrow


# --- shared noise ---------------------------------------------------------------------------------

SHARED = {**SECURE, "privacy.noise": "shared", "rounds.number": 3}


def test_shared_noise_gives_the_central_guarantee_with_any_number_of_workers(federation):
    played = Play(federation, "shared", **SHARED)
    for name in FIVE:
        body = certificate.verify(played.directory.site(name) / "certificate.json").body
        assert body.epsilon == pytest.approx(8.0, rel=1e-3)
        assert body.aggregation.shared_noise
        rows = {row.colluding: row.epsilon for row in body.exposures}
        # Threshold 3 of 5: one colluding site would split the quorum, so none is tolerated.
        assert set(rows) == {0, -1}
        assert rows[0] == body.epsilon
        assert rows[-1] > 1.3 * rows[0]
    assert len({event["sigma"] for event in played.events("site_joined")}) == 1
    # What each site computes in is on record: "auto" may be another format on another machine.
    assert {event["dtype"] for event in played.events("site_joined")} == {"float32"}
    with forked_workers():
        again = Play(federation, "shared-2", workers=2, **SHARED)
    assert again.adapter.tobytes() == played.adapter.tobytes()


def test_the_run_directory_says_how_the_run_was_aggregated(federation):
    played = Play(federation, "told", **{"rounds.number": 2})
    finished = played.events("round_finished")
    assert all(event["saturated"] == 0 for event in finished)
    text = json.dumps([*played.directory.events])
    assert "seed" not in text  # no secret of the protocol in any event


def test_sealed_state_is_all_that_a_round_leaves_on_a_sites_disk(federation):
    played = Play(federation, "disk", **{"rounds.number": 3})
    for state in played.states:
        files = sorted(Path(state / "rounds").iterdir())
        assert len(files) <= 2
        for file in files:
            assert file.stat().st_mode & 0o077 == 0
            assert b"secrets" not in file.read_bytes()


@pytest.mark.parametrize("noise", ["local", "shared"])
def test_secure_rounds_of_drawn_sites_are_the_plain_ones_and_each_site_pays_for_its_own(
    federation, noise, tmp_path
):
    drawn = {"rounds.sites": 3, "aggregation.cohort": 3, "rounds.number": 6}
    played = Play(federation, f"drawn-{noise}", **drawn, **{"privacy.noise": noise})
    cohorts = {event["round"]: set(event["cohort"]) for event in played.events("round_started")}
    assert {len(cohort) for cohort in cohorts.values()} == {3}
    assert set().union(*cohorts.values()) == set(FIVE)
    assert played.replied() == played.phases("unmasked") == cohorts
    assert not played.events("site_failed")
    # Keys of the next round ride on the messages of this one, also for those who are not in this one.
    assert [event["exchanges"] for event in played.events("round_finished")] == [4, 2, 2, 2, 2, 2]
    for state in played.states:
        ledger = Ledger(state / "ledger.sqlite", create=False)
        assert len(ledger.events("notes")) == sum(state.name in sites for sites in cohorts.values())
        ledger.close()
    if noise == "local":
        plain = plainly(federation.sites, played.plan, cohorts, tmp_path)
        start = initial_adapter(_layout(federation, played.plan), played.plan)
        assert np.abs(played.adapter - plain).max() < 2e-4 * np.abs(plain - start).max()
