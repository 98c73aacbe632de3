"""A run folded from its events, against counts taken from the same events by hand."""

import itertools
import random

from hypothesis import given
from hypothesis import strategies as st

from silotune.events.view import RunView

_TIME = itertools.count(1000)


def event(kind, **fields):
    return {"time": float(next(_TIME)), "event": kind, **fields}


def folded(*rows):
    view = RunView("r")
    view.extend(rows)
    return view


START = [
    event("run_started", run="r", sites=["a", "b", "c"], rounds=3),
    event("site_joined", site="a", declared_units=10, rate=0.1, sigma=1.0),
    event("site_joined", site="b"),
    event("site_refused", site="c", code="ST-401"),
    event("round_started", round=1, phase="head", cohort=["a", "b"]),
]


def test_a_site_that_was_not_heard_of_before_the_round_ended_was_late():
    view = folded(
        *START, event("site_replied", site="a", round=1), event("round_finished", round=1)
    )
    assert {name: cell.phase for name, cell in view.rounds[1].cells.items()} == {
        "a": "done",
        "b": "late",
    }
    assert (view.sites["b"].failed, view.sites["a"].replied) == (1, 1)


def test_a_refusal_is_told_with_its_code_and_costs_no_round():
    view = folded(*START)
    assert view.sites["c"].state == "refused"
    assert [(t.site, t.code, t.round) for t in view.troubles] == [("c", "ST-401", None)]
    assert "c" not in view.rounds[1].cells


def test_a_round_that_begins_again_forgets_what_the_first_attempt_left():
    first = [
        event("site_replied", site="a", round=1),
        event("round_finished", round=1, epsilon={"a": 1.0}),
        event("evaluated", round=1, view="released", split="validation", pooled={"loss": 2.0}),
        event("run_resumed", from_round=0),
        event("round_started", round=1, phase="head", cohort=["a", "b"]),
    ]
    view = folded(*START, *first)
    assert view.done == 0
    assert view.curve("loss", view="released", split="validation") == []
    assert view.epsilon == []
    assert view.resumed_at == [0]


def test_a_round_is_durable_from_its_saving_on_even_if_its_figures_were_lost():
    view = folded(*START, event("round_saved", round=1, sha256="f" * 64, bytes=10))
    assert view.done == 1
    assert view.rounds[1].seconds is None


def test_states_follow_what_was_decided():
    view = folded(*START, event("run_paused", round=1))
    assert view.state == "paused"
    view.extend([event("run_resumed", from_round=1), event("run_stopped", round=1)])
    assert view.state == "stopped"
    assert view.ended is not None


def test_masked_and_unmasked_are_seen():
    view = folded(*START, event("site_phase", site="a", round=1, phase="masked"))
    assert view.rounds[1].cells["a"].phase == "masked"


@given(st.integers(0, 2**32), st.integers(1, 6), st.integers(1, 8))
def test_folding_in_any_portions_gives_the_same_picture(seed, sites, rounds):
    rng = random.Random(seed)
    names = [f"s{i}" for i in range(sites)]
    rows = [event("run_started", sites=names, rounds=rounds)]
    for number in range(1, rounds + 1):
        rows.append(event("round_started", round=number, cohort=names))
        for name in names:
            kind = rng.choice(["site_replied", "site_failed", None])
            if kind:
                rows.append(event(kind, site=name, round=number))
        rows.append(event("round_finished", round=number, bytes_up=rng.randrange(100)))
    whole, parts = folded(*rows), RunView("r")
    while rows:
        count = rng.randint(1, len(rows))
        parts.extend(rows[:count])
        rows = rows[count:]
    assert vars(whole) == vars(parts)
    for name in names:
        cells = [found.cells[name].phase for found in whole.rounds.values()]
        assert whole.sites[name].replied == cells.count("done")
        assert whole.sites[name].failed == len(cells) - cells.count("done")
