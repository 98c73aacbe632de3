"""A run folded from its events, against counts taken from the same events by hand."""

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from silotune.events.schema import KINDS, kind_of
from silotune.events.view import RunView

_TIME = itertools.count(1000)


def event(kind, /, **fields):
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


def round_of(number, *sites, **more):
    """Events of a whole round in which these sites replied after a second of training."""
    replies = [event("site_replied", site=s, round=number, train_seconds=1.0) for s in sites]
    started = event("round_started", round=number, cohort=["a", "b"])
    return [started, *replies, event("round_finished", round=number, seconds=2.0, **more)]


def minimal(kind):
    """An event of this kind with the fields that it must have, about a site and round of the run."""
    given = {
        "sites": ["a", "b"],
        "site": "a",
        "round": 1,
        "rounds": 3,
        "from_round": 0,
        "number": 1,
    }
    given |= {"of": 2, "worker": 0, "phase": "masked", "view": "simulator", "bytes": 1, "found": {}}
    fields = {
        name: given.get(name, "x")
        for name, field in kind.model_fields.items()
        if field.is_required() and name not in {"time", "event"}
    }
    return event(kind_of(kind), **fields)


@pytest.mark.parametrize("kind", KINDS, ids=kind_of)
def test_every_kind_of_the_schema_is_folded_by_a_method_of_its_own(kind):
    view = folded(*START, minimal(kind))
    assert view.last_id == len(START) + 1
    assert callable(getattr(view, f"_{kind_of(kind)}"))


def test_kinds_of_a_newer_version_change_nothing():
    known, more = vars(folded(*START)), folded(*START)
    more.extend([event("newer"), event("round"), event("site")])
    told = {key for key, value in vars(more).items() if value != known[key]}
    assert told == {"last_id", "last_time"}


def test_a_secure_round_counts_masked_updates_also_of_a_site_that_fails_behind_them():
    told = [event("site_replied", site=s, round=1, train_seconds=1.0) for s in ("a", "b")]
    told += [event("site_phase", site=s, round=1, phase="masked") for s in ("a", "b")]
    told += [event("site_failed", site="b", round=1, code="ST-603", phase="open")]
    told += [event("site_phase", site="a", round=1, phase="unmasked")]
    view = folded(*START, *told, event("round_finished", round=1))
    assert view.rounds[1].replied == {"a": 1.0, "b": 1.0}
    assert view.rounds[1].failed == {"b": "ST-603"}
    assert view.sites["a"].state == "done"


def test_masked_updates_of_a_void_round_were_dropped():
    told = [event("site_phase", site=s, round=1, phase="masked") for s in ("a", "b")]
    void = event("round_void", round=1, code="ST-541")
    view = folded(*START, *told, void, event("round_finished", round=1))
    assert (view.rounds[1].void, view.sites["b"].state) == ("ST-541", "dropped")


def test_a_round_that_was_cut_short_and_repeated_counts_once():
    cut = [event("round_started", round=2, cohort=["a", "b"])]
    cut += [event("site_replied", site="a", round=2), event("site_failed", site="b", round=2)]
    again = [event("run_started", sites=["a", "b"]), event("run_resumed", from_round=1)]
    view = folded(*START, *round_of(1, "a"), *cut, *again, *round_of(2, "b"))
    assert [found.number for found in view.finished_rounds] == [1, 2]
    assert (view.rounds[2].replied, view.rounds[2].failed) == ({"b": 1.0}, {})
    assert view.started == START[0]["time"]
    assert [trouble.round for trouble in view.troubles] == [None, 2]  # it did happen


def test_what_a_process_that_resumes_tells_is_enough_to_know_how_far_the_run_is():
    view = folded(event("run_started", sites=["a"], rounds=9), event("run_resumed", from_round=4))
    assert (view.done, view.planned) == (4, 9)


def test_a_run_that_failed_and_was_started_again_goes_on():
    failed = event("run_failed", code="ST-601", detail="no quorum")
    assert folded(*START, failed).state == "failed"
    view = folded(*START, failed, event("run_started", sites=["a"], rounds=3))
    assert (view.state, view.code, view.ended) == ("running", "", None)


def test_training_time_is_summed_where_only_sites_have_it_and_unknown_where_nobody_does():
    summed = folded(*START, *round_of(1, "a", "b"))
    assert summed.rounds[1].train_seconds == 2.0
    told = folded(*START, *round_of(1, "a", "b", train_seconds=7.0))
    assert told.rounds[1].train_seconds == 7.0
    unknown = folded(*START, event("site_replied", site="a", round=1))
    unknown.extend([event("round_finished", round=1)])
    assert unknown.rounds[1].train_seconds is None


def test_scores_that_were_not_finite_are_left_out():
    scores = {"loss": None, "accuracy": 0.5}
    row = event("evaluated", round=1, view="simulator", pooled=scores, sites={"a": scores})
    (found,) = folded(*START, row).evaluations
    assert (found.pooled, found.sites) == ({"accuracy": 0.5}, {"a": {"accuracy": 0.5}})


def test_long_runs_are_folded_in_linear_time():
    rows = [
        START[0],
        *(row for n in range(1, 5001) for row in round_of(n, "a", epsilon={"a": 1.0})),
    ]
    assert len(folded(*rows).finished_rounds) == 5000  # a second, not minutes
