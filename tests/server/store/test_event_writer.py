"""Claims about how events reach the store: in order, in few transactions, and none lost by a failure."""

import threading
import time

import pytest
from sqlalchemy import event as sql_event
from sqlalchemy.exc import OperationalError

from silotune.errors import EventMalformed
from silotune.server.store.runs import Runs, RunWriter
from tests.server.store.test_store import record, save, store

__all__ = ["record", "store"]


@pytest.fixture
def gathering(store, record):
    news = threading.Event()
    made = RunWriter(store, "r", on_event=news.set, on_checkpoint=lambda number: None, gathers=True)
    made.news = news
    yield made
    made.close()


def commits_of(store):
    found = []
    sql_event.listen(store._engine, "commit", found.append)
    return found


def tell(record, number, sites):
    record.append_event("round_started", round=number, cohort=sites)
    for site in sites:
        record.append_event("site_replied", round=number, site=site)
    save(record, number)
    record.append_event("round_finished", round=number)


def told(store):
    return [(e.event, e.fields.get("site")) for e in Runs(store).events("r")]


def test_a_round_of_fifty_sites_is_a_handful_of_transactions(store, gathering):
    sites = [f"s{i}" for i in range(50)]
    commits = commits_of(store)
    for number in (1, 2, 3):
        tell(gathering, number, sites)
    gathering.append_event("run_finished", rounds=3)
    assert (
        len(commits) <= 3 * 4
    )  # one each but for those that the writer's own thread chose to make
    assert len(told(store)) == 3 * 53 + 1


def test_events_are_read_in_the_order_in_which_they_happened(store, gathering):
    tell(gathering, 1, ["a", "b"])
    gathering.append_event("run_finished", rounds=1)
    kinds = [kind for kind, _ in told(store)]
    assert kinds == [
        *("round_started", "site_replied", "site_replied", "round_saved"),
        *("round_finished", "run_finished"),
    ]
    times = [e.time for e in Runs(store).events("r")]
    assert times == sorted(times)


def test_what_waits_is_seen_within_a_moment_without_anything_else_happening(store, gathering):
    started = time.monotonic()
    gathering.append_event("round_started", round=1, cohort=["a"])
    assert gathering.news.wait(timeout=30)
    assert told(store) == [("round_started", None)]
    assert time.monotonic() - started < 20.0


def test_many_threads_lose_nothing(store, gathering):
    def tell_many(site):
        for number in range(40):
            gathering.append_event("site_replied", round=number, site=site)

    threads = [threading.Thread(target=tell_many, args=(f"s{i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gathering.close()
    found = [(e.fields["site"], e.fields["round"]) for e in Runs(store).events("r")]
    assert sorted(found) == sorted((f"s{i}", n) for i in range(4) for n in range(40))
    for i in range(4):
        assert [n for site, n in found if site == f"s{i}"] == list(range(40))


def test_a_checkpoint_that_fails_loses_no_event_that_waited(store, gathering, monkeypatch):
    gathering.append_event("site_replied", round=1, site="a")
    with monkeypatch.context() as patch:
        patch.setattr(
            RunWriter, "_write_adapter", lambda *_: (_ for _ in ()).throw(OSError("full"))
        )
        with pytest.raises(OSError, match="full"):
            save(gathering, 1)
    gathering.append_event("run_stopped", round=0)
    assert told(store) == [("site_replied", "a"), ("run_stopped", None)]


def test_a_store_that_can_not_be_written_stops_the_run_that_tells_it(store, gathering, monkeypatch):
    def broken(*_):
        raise OperationalError("insert", {}, OSError("the disk is full"))

    monkeypatch.setattr("silotune.server.store.events.add_events", broken)
    gathering.append_event("site_replied", round=1, site="a")
    gathering._writer._thread.join(timeout=10)
    with pytest.raises(OperationalError):
        gathering.append_event("site_replied", round=1, site="b")


def test_a_malformed_event_is_refused_where_it_is_told(store, gathering):
    with pytest.raises(EventMalformed):
        gathering.append_event("site_replied", round="seven", site="a")
    gathering.close()
    assert told(store) == []
