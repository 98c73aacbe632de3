"""Claims about traces of a coordinator: one trace a run, and sites that can join it."""

import time
from collections import Counter

import pytest

from silotune.events import tracing
from tests.events.tracing_material import traced
from tests.server.coordinator_material import scripted, small_plan, town
from tests.server.fleet_site import approve_all, wait_for

__all__ = ["town"]


def recording(name, headers):
    """A scripted site that notes the header of each message."""
    work = scripted(name)

    def noting(address, content):
        header = content.config_records["config"].get(tracing.TRACEPARENT)
        headers.append((address.kind, address.round, header))
        return work(address, content)

    return noting


def finished(town, run):
    return wait_for(
        lambda: town.coordinator.run_control.runs.get(run)["state"] == "finished", what="the end"
    )


def test_a_run_is_one_trace_of_rounds_and_exchanges_that_sites_can_join(town):
    headers = []
    with traced() as spans:
        sites = [town.enrolled(n).activate() for n in ("north", "south")]
        for site in sites:
            site.serve(recording(site.name, headers))
        run = town.coordinator.run_control.propose(small_plan())
        approve_all(town.coordinator, run, sites)
        finished(town, run)
        wait_for(lambda: any(span.name == "run" for span in spans()), what="the end of the trace")
        found = spans()
    (whole,) = [span for span in found if span.name == "run"]
    rounds = {s.context.span_id: s for s in found if s.name == "round"}
    exchanges = [span for span in found if span.name.startswith("exchange")]
    assert whole.parent is None
    assert {span.context.trace_id for span in found} == {whole.context.trace_id}
    assert sorted(s.attributes["silotune.round"] for s in rounds.values()) == [1, 2, 3]
    assert {s.parent.span_id for s in rounds.values()} == {whole.context.span_id}
    assert Counter(s.name for s in exchanges) == {"exchange query.join": 1, "exchange train": 3}
    for span in exchanges:
        above = span.parent.span_id
        if span.name == "exchange train":
            assert rounds[above].attributes == span.attributes
        else:
            assert above == whole.context.span_id
    known = {
        (s.name.split()[1], s.attributes.get("silotune.round", 0)): (
            f"00-{s.context.trace_id:032x}-{s.context.span_id:016x}-01"
        )
        for s in exchanges
    }
    assert set(headers) == {(*place, header) for place, header in known.items()}
    assert len(headers) == 8  # each site, each exchange


@pytest.mark.parametrize("on", [False, True])
def test_messages_carry_a_header_only_while_traces_are_on(town, on):
    headers = []

    def run_once():
        sites = [town.enrolled(n).activate() for n in ("north", "south")]
        for site in sites:
            site.serve(recording(site.name, headers))
        run = town.coordinator.run_control.propose(small_plan(**{"rounds.number": 1}))
        approve_all(town.coordinator, run, sites)
        finished(town, run)

    if on:
        with traced():
            run_once()
    else:
        run_once()
    assert headers
    assert all((header is not None) == on for _, _, header in headers)


def test_a_restarted_coordinator_asks_with_the_same_bytes(town):
    """Otherwise the round that was under way would be asked for, and trained, twice."""
    asked = set()

    def never_done(name):
        def work(address, content):
            if address.kind == "query.join":
                return scripted(name)(address, content)
            asked.add(name)
            time.sleep(0.1)  # without an answer it is given the same again
            return None

        return work

    def instructions():
        grid = getattr(town.coordinator.run_control._active.get(run), "_grid", None)
        pending = grid._pending.values() if grid else ()
        return {p.peer.site: p.group for p in pending if p.address.kind == "train"}

    with traced():
        sites = [town.enrolled(n).activate().serve(never_done(n)) for n in ("north", "south")]
        run = town.coordinator.run_control.propose(small_plan(**{"rounds.number": 1}))
        approve_all(town.coordinator, run, sites)
        wait_for(lambda: len(asked) == len(instructions()) == 2, what="the first requests")
        before = instructions()
    with traced():
        town.restart()
        wait_for(lambda: len(instructions()) == 2, what="the round to go on")
        after = instructions()
        town.coordinator.run_control.stop(run)
    assert sorted(before) == ["north", "south"]
    assert after == before
