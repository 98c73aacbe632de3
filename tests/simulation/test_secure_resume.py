"""A coordinator that is killed in a secure round finishes it: the same sum, nothing charged twice."""

import itertools

import pytest

from silotune.privacy.ledger import Ledger
from silotune.rounds.rounds import RoundLoop
from silotune.rounds.run_directory import RunDirectory
from silotune.simulation.grid import WorkerGrid
from silotune.simulation.pool import SiteSlot
from silotune.simulation.program import payload_for
from tests.federation import CHOICES, PRIVATE, write_federation
from tests.simulation.plain_rounds import PHASES, replied
from tests.simulation.test_secure_simulation import FIVE, SECURE

ROUNDS = 4
WRITES = ("secure round", "checkpoint")


class Killed(BaseException):
    """Stands for SIGKILL: nothing may catch it."""


class Fate:
    """When the coordinator is to die: ``(round, where, when)``, each once, in order.

    ``where`` is a phase, and ``when`` a number of replies that it has taken ("before" any is asked for);
    or a write, "before" or "after" it.
    """

    def __init__(self, deaths):
        self.deaths = list(deaths)

    def strikes(self, *place):
        if self.deaths and self.deaths[0] == place:
            self.deaths.pop(0)
            raise Killed(place)


class MortalGrid:
    """The way to the sites of a coordinator that dies; `away` are nodes that it does not see."""

    def __init__(self, grid, fate, away=()):
        self._grid, self._fate, self._away = grid, fate, away

    def __getattr__(self, name):
        return getattr(self._grid, name)

    def get_node_ids(self):
        return [node for node in self._grid.get_node_ids() if node not in self._away]

    def push_messages(self, messages):
        messages = list(messages)
        self._place = (int(messages[0].metadata.group_id or 0), self._phase(messages[0]))
        self._taken = 0
        self._fate.strikes(*self._place, "before")
        return self._grid.push_messages(messages)

    @staticmethod
    def _phase(message):
        return message.metadata.message_type.removeprefix("train.")

    def pull_messages(self, ids):
        found = []
        for message_id in ids:
            for reply in self._grid.pull_messages([message_id]):
                self._taken += 1
                self._fate.strikes(*self._place, self._taken)
                found.append(reply)
        return found


class MortalStore:
    """A run directory whose writer dies beside its writes."""

    def __init__(self, directory, fate):
        self._directory, self._fate = directory, fate

    def __getattr__(self, name):
        return getattr(self._directory, name)

    def save_secure_round(self, number, content):
        self._fate.strikes(number, "secure round", "before")
        self._directory.save_secure_round(number, content)
        self._fate.strikes(number, "secure round", "after")

    def save_checkpoint(self, arrays, state):
        self._fate.strikes(state["round"], "checkpoint", "before")
        self._directory.save_checkpoint(arrays, state)
        self._fate.strikes(state["round"], "checkpoint", "after")


class Play:
    """A run whose coordinator dies and is started again until it is finished.

    `away` are sites that are not back when it is.
    """

    def __init__(
        self, federation, name, deaths=(), *, faults=(), between=lambda play: None, away=(), **o
    ):
        settings = {**PRIVATE, **SECURE, "rounds.number": ROUNDS, **o}
        self.plan = federation.plan.override(settings)
        folder = federation.folder / name
        folder.mkdir()
        self.directory = RunDirectory.create(folder, "secure", plan_toml="")
        self.directory.write_json("resolved.json", {})
        self.states = [self.directory.site(site.name) for site in federation.sites]
        payload = payload_for(
            self.plan, run="run", sites=federation.sites, states=self.states, choices=CHOICES,
            shared=folder,
        )  # fmt: skip
        fate, self.lives = Fate(deaths), 0
        program = "tests.simulation.secure_program:build"
        slots = [SiteSlot(site.name) for site in federation.sites]
        with WorkerGrid(program, {**payload, "faults": list(faults)}, slots, workers=0) as grid:
            grid.wait_until_ready()
            self.adapter = None
            while self.adapter is None:
                self.lives += 1
                gone = [n for n, slot in enumerate(slots, start=1) if slot.name in away]
                gone = gone if self.lives > 1 else []
                loop = RoundLoop(
                    plan=self.plan, run="run", grid=MortalGrid(grid, fate, gone),
                    store=MortalStore(self.directory, fate),
                )  # fmt: skip
                try:
                    self.adapter = loop.execute()
                except Killed:
                    between(self)
        assert not fate.deaths, "it did not come to every place where it was to die"

    def charges(self):
        found = {}
        for state in self.states:
            ledger = Ledger(state / "ledger.sqlite", create=False)
            found[state.name] = [r.entry.round for r in ledger.rows() if r.entry.kind == "charge"]
            ledger.close()
        return found

    def events(self, kind):
        return [event for event in self.directory.events if event["event"] == kind]


@pytest.fixture(scope="module")
def federation(tmp_path_factory, bert_folder):
    return write_federation(tmp_path_factory.mktemp("resume"), bert_folder, names=FIVE)


@pytest.fixture(scope="module")
def calm(federation):
    return Play(federation, "calm")


def equal(played, calm):
    assert not played.events("round_void")
    assert played.adapter.tobytes() == calm.adapter.tobytes()
    assert played.charges() == {name: list(range(1, ROUNDS + 1)) for name in FIVE}


def test_killed_at_the_worst_moments_it_finishes_the_round(federation, calm):
    """Masked but not opened; partly opened; all opened and nothing saved."""
    deaths = [(1, "masked", 3), (2, "open", "before"), (3, "open", 2), (4, "checkpoint", "before")]
    played = Play(federation, "worst", deaths)
    assert played.lives == 5
    equal(played, calm)


def test_a_survivor_set_that_sites_opened_for_is_kept_though_a_lost_site_is_back(federation):
    """beta drops out of round 2; the coordinator dies when some have opened for the other four."""
    faults, deaths = ["beta 2 masked"], [(2, "check", 2), (2, "open", 2)]
    calm = Play(federation, "dropout", faults=faults)
    played = Play(federation, "dropout-killed", deaths, faults=faults)
    assert played.adapter.tobytes() == calm.adapter.tobytes()
    present = replied(played.directory.events)
    assert present[2] == set(FIVE) - {"beta"}


def test_with_an_update_lost_that_sites_may_have_opened_for_the_round_is_void(federation):
    """Opening for the others would bare the lost one: nobody is asked to, and the run goes on."""

    def lose(play):
        for path in (play.states[2] / "outbox").iterdir():
            path.unlink()

    played = Play(federation, "lost", [(2, "open", 1)], between=lose)
    (void,) = played.events("round_void")
    assert (void["round"], void["code"]) == (2, "ST-428")
    assert "which is lost" in void["detail"]
    asked = [e for e in played.events("site_failed") if e["phase"] in {"check", "open"}]
    assert not asked
    assert played.charges() == {name: list(range(1, ROUNDS + 1)) for name in FIVE}


BANDED = {
    "privacy.noise": "shared",
    "privacy.bands": 2,
    "privacy.band_weights": [1.0, 0.6],
    "optimizer.server.name": "sgd",
    "optimizer.site.head_rounds": 0,
}


def test_correlated_shares_are_the_same_after_the_coordinators_death_and_a_sites_absence(
    federation,
):
    """beta is gone for a round within a block; the coordinator dies before and after it is back."""
    faults, deaths = ["beta 2 masked"], [(2, "masked", 3), (3, "open", 2), (4, "masked", 4)]
    calm = Play(federation, "banded", faults=faults, **BANDED)
    played = Play(federation, "banded-killed", deaths, faults=faults, **BANDED)
    assert played.lives == 4
    assert played.adapter.tobytes() == calm.adapter.tobytes()
    assert played.charges() == calm.charges()
    assert {n: "beta" in sites for n, sites in replied(played.directory.events).items()} == {
        1: True,
        2: False,
        3: False,
        4: True,
    }


def every_death():
    """Each phase before, among and after its replies, and beside each write; in a round of its own."""
    phases = [(phase, when) for phase in PHASES for when in ("before", 1, 3, 5)]
    writes = list(itertools.product(WRITES, ("before", "after")))
    for number in (1, 2, ROUNDS):
        for where, when in phases + writes:
            if where == "check" or (where in {"keys", "share"} and number > 1):
                continue  # comes in rounds with dropouts, or rides on other messages
            yield number, where, when


@pytest.mark.slow
@pytest.mark.parametrize("death", list(every_death()), ids=str)
def test_wherever_it_is_killed_the_adapter_is_the_same(federation, calm, death):
    played = Play(federation, "-".join(map(str, death)).replace(" ", "-"), [death])
    assert played.lives == 2
    equal(played, calm)


def test_of_drawn_sites_those_are_asked_that_the_events_name_also_if_one_is_not_back(federation):
    """One of the second round is not back: it is in that sum, and later rounds draw without it."""
    drawn_sites = {"rounds.sites": 3, "aggregation.cohort": 3, "rounds.number": 6}
    calm = Play(federation, "drawn", **drawn_sites)
    cohorts = {e["round"]: set(e["cohort"]) for e in calm.events("round_started")}
    missed = next(site for site in sorted(cohorts[2]) if any(site in cohorts[n] for n in (3, 4, 5)))
    played = Play(federation, "drawn-away", [(2, "open", 1)], away=[missed], **drawn_sites)
    named = {e["round"]: set(e["cohort"]) for e in played.events("round_started")}
    summed = replied(played.directory.events)
    assert missed in summed[2]
    for number in (3, 4, 5, 6):
        assert summed[number] == named[number]
        assert missed not in named[number]
