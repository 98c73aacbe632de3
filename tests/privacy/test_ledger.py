"""Claims about what the ledger allows, remembers and refuses."""

import multiprocessing
import os
import random
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from dp_accounting import ComposedDpEvent, NoOpDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from scipy.optimize import brentq
from scipy.stats import norm

from silotune.errors import (
    BudgetExceeded,
    LedgerDamaged,
    PrivacyError,
    ReleaseConflict,
    ReservationInvalid,
)
from silotune.privacy import accounting
from silotune.privacy.events import from_json, gaussian_event, step_event, to_json
from silotune.privacy.ledger import Budget, Ledger, ReleaseKey
from silotune.privacy.tally import epsilon_of, fits, tally_of
from silotune.trust.chain import Head

PLAN = "ab" * 32
DELTA = 1e-5
WIDE = Budget(epsilon=1000.0, delta=DELTA)


def payload(i):
    return f"{i:064x}"


def one_each(events, *, delta, colluding=0):
    """A price list for tests of logic: every mechanism costs 1, and costs add up."""
    del delta, colluding
    return float(sum(sum(tally_of(event).values()) for event in events))


@pytest.fixture
def counted(monkeypatch):
    monkeypatch.setattr(accounting, "epsilon", one_each)


@pytest.fixture
def ledger(tmp_path):
    return Ledger(tmp_path / "state" / "ledger.sqlite")


def times(n, sigma=1.0):
    return SelfComposedDpEvent(gaussian_event(sigma), n)


def charge(ledger, number, *, run="run", event=None, dataset="notes", content=None, plan=PLAN):
    ledger.charge(
        dataset,
        ReleaseKey(run, number, "update"),
        plan,
        event or gaussian_event(1.0),
        payload(number if content is None else content),
    )


# --- reserving and charging ---------------------------------------------------------------------


def test_a_charge_is_in_the_file_when_it_returns(ledger, counted):
    ledger.reserve("notes", "run", PLAN, times(3), budget=WIDE)
    charge(ledger, 1)
    other = Ledger(ledger.path)
    assert other.spent("notes", DELTA) == 1.0
    assert other.payload_of(ReleaseKey("run", 1, "update")) == payload(1)
    assert other.payload_of(ReleaseKey("run", 2, "update")) is None


def test_resend_is_not_charged_twice(ledger, counted):
    ledger.reserve("notes", "run", PLAN, times(3), budget=WIDE)
    for _ in range(3):
        charge(ledger, 1)
    assert ledger.spent("notes", DELTA) == 1.0
    assert len(ledger.events("notes")) == 1


def test_the_same_release_with_other_content_is_refused(ledger, counted):
    ledger.reserve("notes", "run", PLAN, times(3), budget=WIDE)
    charge(ledger, 1)
    with pytest.raises(ReleaseConflict):
        charge(ledger, 1, content=99)
    assert ledger.spent("notes", DELTA) == 1.0


def test_a_charge_inside_the_reservation_computes_no_composition(ledger, monkeypatch):
    monkeypatch.setattr(accounting, "epsilon", one_each)
    ledger.reserve("notes", "run", PLAN, times(500), budget=WIDE)
    monkeypatch.setattr(accounting, "epsilon", None)  # a call would fail
    for number in range(1, 21):
        charge(ledger, number)
    assert len(ledger.events("notes")) == 20


def test_a_charge_over_the_reservation_needs_room_in_the_budget(ledger, counted):
    ledger.reserve("notes", "run", PLAN, times(1), budget=Budget(2.0, DELTA))
    charge(ledger, 1)
    charge(ledger, 2)
    with pytest.raises(BudgetExceeded):
        charge(ledger, 3)
    assert ledger.spent("notes", DELTA) == 2.0


def test_a_charge_with_other_noise_is_not_covered_by_the_reservation(ledger, counted):
    ledger.reserve("notes", "run", PLAN, times(2, sigma=1.0), budget=Budget(2.0, DELTA))
    with pytest.raises(BudgetExceeded):
        charge(ledger, 1, event=gaussian_event(1.0 + 1e-12))


def test_steps_of_several_releases_come_out_of_one_reservation(ledger, counted):
    whole = ComposedDpEvent([step_event(rate=0.1, sigma=1.0, steps=6), times(2, sigma=5.0)])
    ledger.reserve("notes", "run", PLAN, whole, budget=Budget(8.0, DELTA))
    step = step_event(rate=0.1, sigma=1.0, steps=3)
    charge(ledger, 1, event=step)
    charge(ledger, 2, event=ComposedDpEvent([step, gaussian_event(5.0)]))
    charge(ledger, 3, event=gaussian_event(5.0))
    with pytest.raises(BudgetExceeded):
        charge(ledger, 4, event=step_event(rate=0.1, sigma=1.0, steps=1))


def test_budget_refusal_names_what_is_left_and_what_was_asked(ledger, counted):
    budget = Budget(10.0, DELTA)
    ledger.reserve("notes", "old", PLAN, times(4), budget=budget)
    charge(ledger, 1, run="old")
    with pytest.raises(BudgetExceeded) as refused:
        ledger.reserve("notes", "new", PLAN, times(7), budget=budget)
    message = str(refused.value)
    for part in ("'notes'", "asked 7.0", "spent 1.0", "reserved 3.0", "budget 10.0", "left 6.0"):
        assert part in message
    assert "together 11.0" in message
    ledger.reserve("notes", "new", PLAN, times(6), budget=budget)


def test_a_budget_may_be_used_to_its_last_bit(ledger):
    exact = accounting.epsilon([times(5)], delta=DELTA)
    with pytest.raises(BudgetExceeded):
        ledger.reserve("notes", "run", PLAN, times(5), budget=Budget(exact * 0.999999, DELTA))
    ledger.reserve("notes", "run", PLAN, times(5), budget=Budget(exact, DELTA))


def test_an_epsilon_that_is_not_a_number_is_refused(ledger, monkeypatch):
    monkeypatch.setattr(accounting, "epsilon", lambda events, **terms: float("nan"))
    with pytest.raises(BudgetExceeded):
        ledger.reserve("notes", "run", PLAN, times(1), budget=WIDE)
    assert ledger.rows() == []


def test_a_charge_without_a_reservation_is_refused(ledger, counted):
    with pytest.raises(ReservationInvalid):
        charge(ledger, 1)
    ledger.reserve("notes", "run", PLAN, times(1), budget=WIDE)
    with pytest.raises(ReservationInvalid):
        charge(ledger, 1, dataset="other")
    with pytest.raises(ReservationInvalid):
        charge(ledger, 1, plan="cd" * 32)
    assert ledger.events("notes") == []


def test_reserving_again_changes_nothing(ledger, counted):
    for _ in range(3):
        ledger.reserve("notes", "run", PLAN, times(3), budget=Budget(4.0, DELTA))
        assert len(ledger.rows()) == 1


def test_reserving_again_as_something_else_is_refused(ledger, counted):
    ledger.reserve("notes", "run", PLAN, times(3), budget=WIDE)
    with pytest.raises(ReservationInvalid):
        ledger.reserve("notes", "run", "cd" * 32, times(3), budget=WIDE)
    with pytest.raises(ReservationInvalid):
        ledger.reserve("notes", "run", PLAN, times(3, sigma=2.0), budget=WIDE)


def test_a_budget_lowered_during_a_run_is_checked_when_the_run_starts_again(ledger, counted):
    ledger.reserve("notes", "run", PLAN, times(3), budget=Budget(4.0, DELTA))
    with pytest.raises(BudgetExceeded):
        ledger.reserve("notes", "run", PLAN, times(3), budget=Budget(2.0, DELTA))
    ledger.reserve("notes", "run", PLAN, times(3), budget=Budget(3.0, DELTA))
    assert ledger.runs("notes")[0].budget == Budget(3.0, DELTA)


def test_settling_frees_what_was_not_charged(ledger, counted):
    budget = Budget(5.0, DELTA)
    ledger.reserve("notes", "first", PLAN, times(5), budget=budget)
    charge(ledger, 1, run="first")
    with pytest.raises(BudgetExceeded):
        ledger.reserve("notes", "second", PLAN, times(1), budget=budget)
    ledger.settle("notes", "first")
    ledger.settle("notes", "first")
    ledger.settle("notes", "never seen")
    assert [row.entry.kind for row in ledger.rows()] == ["reserve", "charge", "settle"]
    ledger.reserve("notes", "second", PLAN, times(4), budget=budget)
    assert ledger.committed("notes", DELTA) == 5.0


def test_a_settled_run_gets_its_rest_back_only_while_the_budget_has_it(ledger, counted):
    budget = Budget(5.0, DELTA)
    ledger.reserve("notes", "run", PLAN, times(5), budget=budget)
    charge(ledger, 1)
    ledger.settle("notes", "run")
    ledger.reserve("notes", "run", PLAN, times(5), budget=budget)
    charge(ledger, 2)
    ledger.settle("notes", "run")
    ledger.reserve("notes", "other", PLAN, times(1), budget=budget)
    with pytest.raises(BudgetExceeded):
        ledger.reserve("notes", "run", PLAN, times(5), budget=budget)
    assert ledger.spent("notes", DELTA) == 2.0


def test_datasets_have_accounts_of_their_own(ledger, counted):
    budget = Budget(1.0, DELTA)
    other = "notes@0123456789abcdef"
    for dataset in ("notes", "letters", other):
        ledger.reserve(dataset, "run", PLAN, times(1), budget=budget)
    charge(ledger, 1, dataset=other)
    assert [ledger.spent(name, DELTA) for name in ("notes", "letters", other)] == [0.0, 0.0, 1.0]


def test_one_release_can_not_be_charged_to_two_datasets(ledger, counted):
    for dataset in ("notes", "letters"):
        ledger.reserve(dataset, "run", PLAN, times(1), budget=WIDE)
    charge(ledger, 1, dataset="notes")
    with pytest.raises(ReleaseConflict):
        charge(ledger, 1, dataset="letters")


def test_events_without_a_cost_are_refused(ledger):
    with pytest.raises(ValueError, match="costs nothing"):
        ledger.reserve("notes", "run", PLAN, NoOpDpEvent(), budget=WIDE)


@pytest.mark.parametrize("name", ["", "No", "a/b", "a b", "a@", "a@xyz", "x" * 64])
def test_names_that_are_no_dataset_keys_are_refused(ledger, name):
    with pytest.raises(ValueError, match="dataset"):
        ledger.reserve(name, "run", PLAN, times(1), budget=WIDE)


@pytest.mark.parametrize(
    ("run", "number", "release"),
    [("", 1, "u"), ("a\nb", 1, "u"), ("x" * 201, 1, "u"), ("r", -1, "u"), ("r", 1, "../u")],
)
def test_keys_that_are_no_releases_are_refused(run, number, release):
    with pytest.raises(ValueError, match=r"run|release"):
        ReleaseKey(run, number, release)


# --- epsilon ------------------------------------------------------------------------------------


def gaussian_epsilon(sigma, releases, delta):
    """Exact epsilon of Gaussian mechanisms: Balle & Wang (ICML 2018), theorem 8."""
    mu = releases**0.5 / sigma

    def excess(eps):
        return (
            norm.cdf(mu / 2 - eps / mu) - 2.718281828459045**eps * norm.cdf(-mu / 2 - eps / mu)
        ) - delta

    return brentq(excess, 0.0, 100.0, xtol=1e-12)


def test_spent_is_never_below_the_closed_form_and_hardly_above(ledger):
    ledger.reserve("notes", "run", PLAN, times(4, sigma=3.0), budget=WIDE)
    for number in range(1, 5):
        charge(ledger, number, event=gaussian_event(3.0))
        exact = gaussian_epsilon(3.0, number, DELTA)
        assert exact <= ledger.spent("notes", DELTA) <= exact * 1.001


def test_ten_rounds_in_two_runs_equal_one_composition(ledger):
    cost = {"first": (0.05, 1.1), "second": (0.02, 0.9)}
    for run, (rate, sigma) in cost.items():
        whole = step_event(rate=rate, sigma=sigma, steps=10)
        ledger.reserve("notes", run, PLAN, whole, budget=WIDE)
    for number in range(1, 6):
        for run, (rate, sigma) in cost.items():
            charge(ledger, number, run=run, event=step_event(rate=rate, sigma=sigma, steps=2))
    once = PLDAccountant()
    for rate, sigma in cost.values():
        once.compose(step_event(rate=rate, sigma=sigma, steps=10))
    assert ledger.spent("notes", DELTA) == pytest.approx(once.get_epsilon(DELTA), abs=1e-6)
    assert ledger.spent("notes", DELTA) == ledger.committed("notes", DELTA)
    assert accounting.epsilon(ledger.events("notes"), delta=DELTA) == pytest.approx(
        ledger.spent("notes", DELTA), abs=1e-6
    )


def test_a_run_calibrated_to_the_whole_budget_fits_into_it(ledger):
    sigma = accounting.calibrate(epsilon=8.0, delta=DELTA, rate=0.02, steps=100)
    whole = step_event(rate=0.02, sigma=sigma, steps=100)
    ledger.reserve("notes", "run", PLAN, whole, budget=Budget(8.0, DELTA))
    assert 7.98 <= ledger.committed("notes", DELTA) <= 8.0


def test_epsilon_is_nowhere_in_the_file(ledger):
    ledger.reserve("notes", "run", PLAN, times(2), budget=WIDE)
    charge(ledger, 1)
    stored = ledger.rows()[1].as_dict()
    assert set(stored) == {
        *("seq", "previous", "kind", "dataset", "run", "time", "round", "release"),
        *("plan_sha256", "event", "budget", "payload_sha256", "hash"),
    }
    assert tally_of(from_json(stored["event"])) == tally_of(gaussian_event(1.0))
    assert stored["budget"] is None


# --- tallies ------------------------------------------------------------------------------------

leaves = st.one_of(
    st.sampled_from([1.0, 2.5]).map(gaussian_event),
    st.sampled_from([0.1, 0.2]).map(lambda q: step_event(rate=q, sigma=1.0, steps=1)),
    st.just(NoOpDpEvent()),
)
events = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(ComposedDpEvent),
        st.tuples(inner, st.integers(1, 4)).map(lambda pair: SelfComposedDpEvent(*pair)),
    ),
    max_leaves=6,
)


def counted_by_hand(event):
    """The slow truth: unroll every repetition."""
    if isinstance(event, NoOpDpEvent):
        return []
    if isinstance(event, ComposedDpEvent):
        return [leaf for part in event.events for leaf in counted_by_hand(part)]
    if isinstance(event, SelfComposedDpEvent):
        return counted_by_hand(event.event) * event.count
    return [to_json(event)]


@given(events)
def test_a_tally_counts_what_unrolling_finds(event):
    assert tally_of(event) == Counter(counted_by_hand(event))


@given(events, events)
def test_a_part_fits_into_the_whole(one, other):
    whole = tally_of(ComposedDpEvent([one, other]))
    assert fits(tally_of(one), whole)
    assert fits(tally_of(other), whole - tally_of(one))


def test_the_order_of_events_does_not_change_epsilon():
    parts = [gaussian_event(2.0), gaussian_event(3.0), step_event(rate=0.1, sigma=1.0, steps=3)]
    forth, back = (tally_of(ComposedDpEvent(order)) for order in (parts, parts[::-1]))
    assert epsilon_of(forth, delta=DELTA) == epsilon_of(back, delta=DELTA)
    assert epsilon_of({}, delta=DELTA) == 0.0


# --- many processes -----------------------------------------------------------------------------


def spend(path, run, number, gate):
    """Reserve and charge until refused; exit code 10 + releases made."""
    accounting.epsilon = one_each
    ledger = Ledger(path)
    gate.wait(60)
    made = 0
    for i in range(number):
        try:
            own = f"{run}-{i}"
            ledger.reserve("notes", own, PLAN, times(1), budget=Budget(12.0, DELTA))
            charge(ledger, i, run=own)
        except BudgetExceeded:
            break
        made += 1
    os._exit(10 + made)


def test_runs_in_several_processes_can_not_overspend(tmp_path):
    path = tmp_path / "ledger.sqlite"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["silotune.privacy.accounting", "silotune.client.gate"])
    gate = context.Event()
    workers = [context.Process(target=spend, args=(path, f"run{i}", 12, gate)) for i in range(3)]
    for worker in workers:
        worker.start()
    gate.set()
    for worker in workers:
        worker.join(120)
    made = [worker.exitcode - 10 for worker in workers]
    assert sum(made) == 12
    ledger = Ledger(path)
    assert len(ledger.events("notes")) == 12
    assert ledger.verify() == ledger.head


def test_threads_of_one_process_share_a_ledger(ledger, counted):
    ledger.reserve("notes", "run", PLAN, times(40), budget=Budget(40.0, DELTA))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: charge(ledger, number // 2), range(80)))
    assert len(ledger.events("notes")) == 40
    assert ledger.verify().seq == 41


def test_a_verdict_is_void_when_something_was_reserved_meanwhile(ledger, monkeypatch):
    """Another process reserves while this one computes its composition, outside the lock."""
    budget, other = Budget(3.0, DELTA), Ledger(ledger.path)
    calls = []

    def slow(events, *, delta, **terms):
        calls.append(1)
        if len(calls) == 1:
            other.reserve("notes", "quick", PLAN, times(2), budget=budget)
        return one_each(events, delta=delta)

    monkeypatch.setattr(accounting, "epsilon", slow)
    with pytest.raises(BudgetExceeded):
        ledger.reserve("notes", "slow", PLAN, times(2), budget=budget)
    assert [a.run for a in ledger.runs("notes")] == ["quick"]


def test_a_full_disk_is_refused_before_anything_is_charged(ledger, counted):
    ledger.reserve("notes", "run", PLAN, times(3), budget=WIDE)
    ledger._table._db.execute("PRAGMA max_page_count = 1")
    with pytest.raises(PrivacyError, match="can't be used"):
        for number in range(1, 200):
            charge(ledger, number)
    stored = len(ledger.events("notes"))
    ledger._table._db.execute("PRAGMA max_page_count = 100000")
    charge(ledger, 1000)
    assert len(Ledger(ledger.path).events("notes")) == stored + 1


def test_a_coordinator_can_vouch_for_what_the_ledger_was(ledger, counted):
    coordinator = Ed25519PrivateKey.generate()
    ledger.reserve("notes", "run", PLAN, times(1), budget=WIDE)
    ledger.witness(ledger.head, ledger.head.sign(coordinator), coordinator.public_key())
    charge(ledger, 1)
    assert Ledger(ledger.path).verify(trusted=coordinator.public_key()) == ledger.head
    gone = Head(3, "ab" * 32)
    with pytest.raises(LedgerDamaged):
        ledger.witness(gone, gone.sign(coordinator), coordinator.public_key())


def test_a_row_of_a_later_version_is_refused_not_skipped(ledger, counted):
    ledger.reserve("notes", "run", PLAN, times(1), budget=WIDE)
    later = replace(ledger.rows()[0].entry, kind="transfer")
    with pytest.raises(LedgerDamaged), ledger._table.transaction() as append:
        append(later)
    with pytest.raises(LedgerDamaged, match="makes no sense"):
        Ledger(ledger.path)


# --- any sequence of operations -----------------------------------------------------------------


class AnyUse(RuleBasedStateMachine):
    """Against a model in a few dictionaries, through two views of one file."""

    budget = Budget(12.0, DELTA)

    def __init__(self):
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        path = Path(self.folder.name) / "ledger.sqlite"
        self.views = [Ledger(path), Ledger(path)]
        self.reserved, self.open, self.charged = {}, {}, {}
        self.was, accounting.epsilon = accounting.epsilon, one_each

    def teardown(self):
        accounting.epsilon = self.was
        for view in self.views:
            view.close()
        self.folder.cleanup()

    def committed(self):
        return sum(
            max(self.spent(run), n) if self.open[run] else self.spent(run)
            for run, n in self.reserved.items()
        )

    def spent(self, run):
        return len([key for key in self.charged if key[0] == run])

    runs = st.sampled_from(["a", "b", "c"])
    sides = st.integers(0, 1)

    @rule(run=runs, side=sides, n=st.integers(1, 8))
    def reserve(self, run, side, n):
        view = self.views[side]
        n = self.reserved.get(run, n)
        before = self.committed()
        own = 0
        if run in self.reserved:
            own = max(self.spent(run), n) if self.open[run] else self.spent(run)
        after = before - own + max(self.spent(run), n)
        if after <= self.budget.epsilon or (run in self.reserved and self.open[run]):
            view.reserve("notes", run, PLAN, times(n), budget=self.budget)
            self.reserved[run], self.open[run] = n, True
        else:
            with pytest.raises(BudgetExceeded):
                view.reserve("notes", run, PLAN, times(n), budget=self.budget)

    @rule(run=runs, side=sides, number=st.integers(1, 10), content=st.integers(0, 1))
    def charge(self, run, side, number, content):
        view, key = self.views[side], (run, number)
        arguments = {"run": run, "content": content}
        if key in self.charged:
            if self.charged[key] == content:
                charge(view, number, **arguments)
            else:
                with pytest.raises(ReleaseConflict):
                    charge(view, number, **arguments)
            return
        if run not in self.reserved:
            with pytest.raises(ReservationInvalid):
                charge(view, number, **arguments)
            return
        inside = self.open[run] and self.spent(run) < self.reserved[run]
        if inside or self.committed() + 1 <= self.budget.epsilon:
            charge(view, number, **arguments)
            self.charged[key] = content
        else:
            with pytest.raises(BudgetExceeded):
                charge(view, number, **arguments)

    @rule(run=runs, side=sides)
    def settle(self, run, side):
        self.views[side].settle("notes", run)
        if run in self.open:
            self.open[run] = False

    @rule(side=sides)
    def reopen(self, side):
        path = self.views[side].path
        self.views[side].close()
        self.views[side] = Ledger(path)

    @invariant()
    def accounts_agree(self):
        for view in self.views:
            assert view.spent("notes", DELTA) == len(self.charged)
            assert view.committed("notes", DELTA) == self.committed() <= self.budget.epsilon


TestAnyUse = AnyUse.TestCase
TestAnyUse.settings = settings(
    max_examples=15,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


def test_a_charge_takes_milliseconds_however_long_the_ledger_is(ledger, counted):
    """Rows read and statements run by one charge don't grow with the ledger."""
    ledger.reserve("notes", "run", PLAN, times(200), budget=WIDE)
    statements = []

    def cost(number):
        statements.clear()
        ledger._table._db.set_trace_callback(statements.append)
        charge(ledger, number)
        ledger._table._db.set_trace_callback(None)
        return len(statements)

    costs = [cost(number) for number in random.sample(range(1, 150), 100)]
    assert len(set(costs)) == 1
