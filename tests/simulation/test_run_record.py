"""A run's history is what its events say, also after a crash in the middle of a round."""

from synthetic_run import Synthetic

from silotune.simulation.run_record import read_history, read_record

START = {"event": "run_started", "time": 5.0, "run": "r", "sites": ["a", "b"], "rounds": 9}


def started(number, cohort=("a", "b"), phase="head"):
    return {"event": "round_started", "round": number, "cohort": list(cohort), "phase": phase}


def replied(number, site, seconds=1.0):
    return {"event": "site_replied", "round": number, "site": site, "train_seconds": seconds}


def finished(number, **more):
    return {"event": "round_finished", "round": number, "seconds": 2.0, **more}


def test_a_round_that_was_cut_short_and_repeated_counts_once():
    resumed = {"event": "run_resumed", "from_round": 1}
    failed = {"event": "site_failed", "round": 2, "site": "b", "code": "ST-603"}
    before = [START, started(1), replied(1, "a"), finished(1), started(2), replied(2, "a"), failed]
    after = [{**START, "time": 99.0}, resumed, started(2), replied(2, "b", 3.0), finished(2)]
    history = read_history([*before, *after])
    assert [found.number for found in history.finished_rounds] == [1, 2]
    assert history.rounds[1].replied == {"b": 3.0}
    assert history.rounds[1].failed == {}
    assert history.resumed_at == (1,)
    assert history.started == 5.0
    assert [fault.number for fault in history.faults] == [2]  # it did happen


def test_an_evaluation_of_a_repeated_round_replaces_the_old_one():
    def look(score):
        return {"event": "evaluated", "round": 1, "view": "simulator", "pooled": {"loss": score}}

    history = read_history([START, started(1), look(3.0), started(1), finished(1), look(2.0)])
    assert [found.pooled for found in history.evaluations] == [{"loss": 2.0}]


def test_training_time_is_summed_where_only_sites_have_it_and_unknown_where_nobody_does():
    known = read_history([START, started(1), replied(1, "a"), replied(1, "b", 2.5), finished(1)])
    assert known.rounds[0].train_seconds == 3.5
    unknown = read_history([START, started(1), replied(1, "a", None), finished(1)])
    assert unknown.rounds[0].train_seconds is None
    told = read_history([START, started(1), replied(1, "a"), finished(1, train_seconds=7.0)])
    assert told.rounds[0].train_seconds == 7.0


def test_scores_that_were_not_finite_are_left_out():
    event = {"event": "evaluated", "round": 1, "pooled": {"loss": None, "accuracy": 0.5}}
    assert read_history([START, event]).evaluations[0].pooled == {"accuracy": 0.5}


def test_unknown_kinds_and_words_that_are_not_kinds_change_nothing():
    extra = [{"event": "newer"}, {"event": "round"}, {"event": "put"}, {}]
    assert read_history([START, *extra]) == read_history([START])


def test_long_runs_are_read_in_linear_time():
    events = [START]
    for number in range(1, 5001):
        events += [started(number), replied(number, "a"), replied(number, "b"), finished(number)]
    assert len(read_history(events).finished_rounds) == 5000  # seconds, not minutes


def test_a_whole_directory_is_read(tmp_path):
    record = read_record(Synthetic().write(tmp_path))
    assert record.methods[0].key == "federated"
    assert len(record.sites) == 7
    assert record.plan["plan"]["name"] == "hospitals"
