"""Correlated noise at a site: what leaves is sums and C^-1 W, and one charge covers a block."""

import shutil

import numpy as np
import pytest

from silotune.client.gate import DpRelease, Gate
from silotune.client.model_cache import ModelCache
from silotune.client.run_files import OUTBOX, RunFiles
from silotune.client.site_run import SiteRun
from silotune.client.terms import run_events
from silotune.data.site import SiteConfig
from silotune.errors import ReleaseConflict, SilotuneError
from silotune.privacy.accounting import epsilon
from silotune.privacy.ledger import Budget, Ledger, ReleaseKey
from silotune.privacy.noise import noise_for, noised
from silotune.trust.errors import SealBroken
from tests.federation import CHOICES, banded, underscored, write_federation
from tests.plan.test_bands import toeplitz

ROUNDS, BANDS, COLUMN = 8, 3, (1.0, 0.7, 0.4)
SETTINGS = underscored(banded(ROUNDS, **{"privacy.band_weights": list(COLUMN)}))


@pytest.fixture(scope="module")
def models():
    return ModelCache(CHOICES)


@pytest.fixture(scope="module")
def made(tmp_path_factory, bert_folder):
    folder = tmp_path_factory.mktemp("banded")
    return write_federation(folder, bert_folder, names=("alpha",), **SETTINGS)


class Site:
    """One site's part in a run, whose training's own sums are kept by round."""

    def __init__(self, made, models, state, *, plan=None, run="r"):
        self.made, self.models, self.state = made, models, state
        self.plan, self.name = plan or made.plan, run
        self.sums, self.sent = {}, {}
        self.start()

    def start(self):
        """As after a restart of the process."""
        self.run = SiteRun(
            SiteConfig.load(self.made.folder / "alpha" / "site.toml"),
            state=self.state,
            plan=self.plan,
            run=self.name,
            models=self.models,
        )
        trained = self.run.training.round

        def spied(adapter, number, **more):
            found = trained(adapter, number, **more)
            self.sums[number] = found.flat.copy()
            return found

        self.run.training.round = spied

    def train(self, number, value=0.0):
        adapter = np.full(self.run.layout.size, value, dtype=np.float32)
        reply = self.run.train(adapter, number)
        (record,) = reply.array_records.values()
        (array,) = record.values()
        found = self.sent[number] = array.numpy().copy()
        return found

    @property
    def ledger(self):
        return self.run.ledger

    def noise(self, rounds):
        return np.array([self.sent[n].astype(np.float64) - self.sums[n] for n in rounds])


@pytest.fixture
def site(made, models, tmp_path):
    found = Site(made, models, tmp_path / "state")
    found.run.join()
    return found


def fresh(site, rounds):
    """The fresh noise of each round, as the plan's seed gives it."""
    updates = site.run.updates
    (std,) = set(updates._missing(1).values())
    sizes = [span.size for span in updates._spans(1)]
    zeros, stds = np.zeros(sum(sizes)), [std] * len(sizes)
    sources = [noise_for(site.plan.plan.seed, "update", "alpha", number) for number in rounds]
    return std, np.array([noised(zeros, stds, sizes, noise=source) for source in sources])


def test_what_leaves_is_the_sums_and_the_inverse_of_c_times_fresh_noise(site):
    rounds = range(1, ROUNDS + 1)
    for number in rounds:
        if number in {3, 6}:
            site.start()  # killed and started anew: the noise of before is found again
        site.train(number)
    std, drawn = fresh(site, rounds)
    wanted = np.linalg.solve(toeplitz(COLUMN, ROUNDS), drawn)
    np.testing.assert_allclose(site.noise(rounds), wanted, atol=2e-6 * std)
    (clip,) = {bound.norm for bound in site.plan.privacy.clipping.bounds.values()}
    assert std == pytest.approx(site.run.sigma * clip * np.linalg.norm(COLUMN))


def test_of_rounds_that_a_site_missed_nothing_is_taken_back(site):
    rounds = [2, 3, 5, 8]
    for number in rounds:
        site.train(number)
    places = np.array(rounds) - 1
    std, drawn = fresh(site, rounds)
    wanted = np.linalg.solve(toeplitz(COLUMN, ROUNDS)[np.ix_(places, places)], drawn)
    np.testing.assert_allclose(site.noise(rounds), wanted, atol=2e-6 * std)
    assert blocks(site) == [1, 4, 7]


def charges(ledger, run="r"):
    return [
        (row.entry.round, row.entry.release, row.entry.event)
        for row in ledger.rows()
        if row.entry.kind == "charge" and row.entry.run == run
    ]


def blocks(site):
    return [number for number, release, _ in charges(site.ledger) if release == "block"]


def test_a_block_of_rounds_is_charged_once_and_the_run_costs_the_plans_epsilon(site):
    for number in range(1, ROUNDS + 1):
        site.train(number)
    assert blocks(site) == [1, 4, 7]
    assert [(n, event) for n, release, event in charges(site.ledger) if release == "update"] == [
        (number, '{"kind":"NoOp"}') for number in range(1, ROUNDS + 1)
    ]
    units, delta = site.run.dataset.declared_units, site.plan.privacy.delta
    planned = epsilon(run_events(site.plan, units, sigma=site.run.sigma), delta=delta)
    assert site.ledger.spent("notes", delta) == pytest.approx(planned, rel=1e-9)
    assert 0.99 * site.plan.privacy.epsilon < planned <= site.plan.privacy.epsilon
    body = site.run.finish()
    assert body.epsilon == pytest.approx(planned, rel=1e-9)
    (mechanism,) = body.mechanisms
    assert (mechanism.times, mechanism.rate) == (3, pytest.approx(0.9))
    assert site.ledger.runs("notes")[0].charges == ROUNDS  # releases, blocks not counted


def test_a_hostile_coordinator_gets_no_second_row_by_asking_again(site):
    first = site.train(1)
    site.train(2)
    before = len(site.ledger.rows())
    assert site.train(1, value=9.0).tobytes() == first.tobytes()  # the stored answer
    site.start()
    assert site.train(2, value=-9.0).tobytes() == site.sent[2].tobytes()
    assert len(site.ledger.rows()) == before


def test_a_round_is_not_answered_after_a_later_one(site):
    site.train(2)
    for _ in range(2):
        with pytest.raises(ReleaseConflict, match="after a later round"):
            site.train(1)
        site.start()
    assert 1 not in site.sums, "records were touched for it"
    site.train(3)


def test_a_round_that_came_to_nothing_is_not_answered_after_a_later_one_either(site, monkeypatch):
    with monkeypatch.context() as broken:
        broken.setattr(Ledger, "bind", lambda *args: 1 / 0)
        with pytest.raises(SilotuneError):
            site.train(1)
    site.train(2)
    with pytest.raises(ReleaseConflict, match="after a later round"):
        site.train(1)
    std, drawn = fresh(site, [2])
    np.testing.assert_allclose(site.noise([2]), drawn, atol=2e-6 * std)  # of round 1 nothing left


def test_a_second_run_of_the_same_plan_has_noise_and_charges_of_its_own(made, models, tmp_path):
    secret = made.plan.override({"plan.seed": None, "privacy.epsilon": 2.0})
    runs = [Site(made, models, tmp_path / "state", plan=secret, run=name) for name in ("a", "b")]
    for site in runs:
        site.run.join()
    for number in (1, 2, 3):
        for site in runs:
            site.train(number)
    # Fresh noise again: independent numbers, 198 of them, whose correlation has a deviation of .071.
    one, other = (toeplitz(COLUMN, 3) @ site.noise([1, 2, 3]) for site in runs)
    assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.45  # false alarms: 3e-10
    for site in runs:
        assert [n for n, release, _ in charges(site.ledger, site.name) if release == "block"] == [1]


def test_noise_that_was_released_and_is_gone_stops_the_round(site):
    site.train(1)
    for path in (site.state / "memory").iterdir():
        path.unlink()
    site.start()
    with pytest.raises(ReleaseConflict, match="what round 1 left here for later rounds is gone"):
        site.train(2)
    assert site.ledger.payload_of(ReleaseKey("r", 2, "update")) is None


def test_noise_that_was_changed_on_the_disk_stops_the_round(site):
    site.train(1)
    (path,) = (site.state / "memory").iterdir()
    sealed = bytearray(path.read_bytes())
    sealed[-1] ^= 1
    path.write_bytes(bytes(sealed))
    site.start()
    with pytest.raises(SilotuneError) as stopped:
        site.train(2)
    assert isinstance(stopped.value.__cause__ or stopped.value, SealBroken), repr(stopped.value)
    assert site.ledger.payload_of(ReleaseKey("r", 2, "update")) is None


def test_noise_is_kept_sealed_for_as_long_as_rounds_take_it_back(site):
    for number in range(1, 7):
        site.train(number)
    kept = list((site.state / "memory").iterdir())
    assert len(kept) == BANDS
    row = site.noise([6]).tobytes()
    assert all(row[:64] not in path.read_bytes() for path in kept)


def test_an_older_copy_of_the_books_pays_again_and_takes_nothing_back(site, tmp_path):
    """Restored, as `site restore` does it: the run is settled. Its block was charged in both lives."""
    site.train(1)
    site.ledger.close()
    shutil.copytree(site.state, tmp_path / "backup")
    site.start()
    site.train(2)
    site.train(3)
    lost = site.sent[2].copy()
    site.ledger.close()
    shutil.rmtree(site.state)
    shutil.copytree(tmp_path / "backup", site.state)
    site.start()
    site.ledger.settle("notes", "r")
    site.run.join()
    again = site.train(2, value=3.0)
    assert again.tobytes() != lost.tobytes()
    assert [(n, release) for n, release, _ in charges(site.ledger)] == [
        (1, "block"),
        (1, "update"),
        (1, "block-1"),
        (2, "update"),
    ]
    std, drawn = fresh(site, [2])
    np.testing.assert_allclose(site.noise([2]), drawn, atol=2e-6 * std)


# --- whose turn it is ---


def drawn_in(site, rounds):
    """Names of the texts that each round computed."""
    found, trainer = {}, site.run.training.trainer
    add, examples = trainer._add, site.run.training.records.examples
    for number in rounds:
        seen = found[number] = set()

        def spied(engine, batch, phase, seen=seen):
            seen |= {examples[row]["text"] for row in batch.rows}
            return add(engine, batch, phase)

        trainer._add = spied
        site.train(number)
    trainer._add = add
    return found


def test_a_unit_is_drawn_in_its_own_rounds_alone_also_after_a_restart(site):
    first = drawn_in(site, range(1, 5))
    site.start()
    second = drawn_in(site, range(5, ROUNDS + 1))
    turns = {}
    for number, texts in {**first, **second}.items():
        assert texts, "nobody was drawn"
        for text in texts:
            assert turns.setdefault(text, number % BANDS) == number % BANDS
    # At a rate of .9, of some 42 units: few are left out three times.
    assert len(turns) > 30


def test_records_that_come_later_move_nobody_elses_turn(made, models, tmp_path):
    def turns():
        records = Site(made, models, tmp_path / "state").run.training.records
        rows = np.unique(records.unit_of, return_index=True)[1]
        return {records.examples[r]["text"]: int(records.turns[u]) for u, r in enumerate(rows)}

    before = turns()
    notes = made.folder / "alpha" / "notes.csv"
    original = notes.read_text()
    try:
        header, *rows = original.splitlines()
        notes.write_text("\n".join([header, "a new note,no,alpha-999", *rows]) + "\n")
        after = turns()
    finally:
        notes.write_text(original)
    assert {text: after[text] for text in before} == before
    assert len(after) == len(before) + 1
    counts = np.bincount(list(before.values()), minlength=BANDS)
    assert (counts > 0).all()


def test_whose_turn_it_is_only_the_sites_secret_tells(made, models, tmp_path):
    secret = made.plan.override({"plan.seed": None})

    def turns(state, plan=secret):
        return Site(made, models, tmp_path / state, plan=plan).run.training.records.turns.tolist()

    assert turns("a") == turns("a")
    assert turns("a") != turns("b")  # alike by chance: 3^-60
    assert turns("a") != turns("a", plan=secret.override({"plan.name": "another"}))


def test_a_training_that_knows_no_turns_draws_nobody(site):
    from silotune.client.trainer import SiteData
    from silotune.errors import SelfCheckFailed

    nothing = np.zeros(0, dtype=np.int64)
    data = SiteData(site="alpha", encoded=None, unit_of=nothing, train=nothing, declared_units=60)
    with pytest.raises(SelfCheckFailed, match="in which rounds"):
        data.train_in(0, bands=3)


# --- the gate and the ledger, without a model -----------------------------------------------------


@pytest.fixture
def gate(made, tmp_path):
    ledger = Ledger(tmp_path / "ledger.sqlite")
    (event,) = run_events(made.plan, 60, sigma=5.0)
    budget = Budget(epsilon=50.0, delta=1e-4)
    ledger.reserve("notes", "r", made.plan.sha256, event, budget=budget)
    files = RunFiles(tmp_path, OUTBOX, run="r")
    found = Gate(ledger=ledger, dataset="notes", plan=made.plan, outbox=files)
    return found, ledger, event.event


def test_an_update_that_no_charge_covers_does_not_pass_the_gate(gate, monkeypatch):
    door, ledger, event = gate
    key = ReleaseKey("r", 2, "update")
    fields = {"update": DpRelease(np.zeros(3, dtype=np.float32), "steps")}
    with pytest.raises(ReleaseConflict, match="was not charged"):
        ledger.bind("notes", key, "0" * 64)
    with monkeypatch.context() as broken:
        broken.setattr(
            Ledger, "_append_within", lambda *args: True
        )  # a charge that comes to nothing
        with pytest.raises(ReleaseConflict, match="was not charged"):
            door.release(key, fields=fields, mechanisms={"steps": event})
    door.release(key, fields=fields, mechanisms={"steps": event})
    assert charges(ledger)[0][:2] == (1, "block")


def test_a_round_does_not_rest_on_the_charge_of_another_block(gate):
    door, ledger, event = gate
    door.charge(ReleaseKey("r", 3, "update"), {"steps": event})
    with pytest.raises(ReleaseConflict, match="no charge of its block covers"):
        ledger._require_covered("notes", ReleaseKey("r", 4, "update"), 4)
    door.charge(ReleaseKey("r", 4, "update"), {"steps": event})
    assert [place for *place, _ in charges(ledger)] == [
        [1, "block"], [3, "update"], [4, "block"], [4, "update"],
    ]  # fmt: skip


def test_a_release_that_costs_nothing_by_itself_is_no_charge(gate):
    from silotune.privacy.events import NoOpDpEvent

    _, ledger, _ = gate
    with pytest.raises(ValueError, match="costs nothing"):
        ledger.charge("notes", ReleaseKey("r", 1, "update"), "0" * 64, NoOpDpEvent())
