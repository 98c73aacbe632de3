"""Promise 1: nothing private leaves a site uncharged.

All that a site sends passes one access. Each value is either public by declaration or a release whose
event is in the site's ledger, durably, before the bytes leave.
"""

import ast
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from dp_accounting import ComposedDpEvent
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import silotune
from silotune.client.gate import DpRelease, Gate, Public, Unprotected, refusal
from silotune.client.run_files import OUTBOX, RunFiles
from silotune.errors import SelfCheckFailed, SilotuneError, ValueUnaccounted, catalogue
from silotune.plan.plan import Plan
from silotune.privacy.events import gaussian_event, step_event
from silotune.privacy.ledger import Budget, Ledger, ReleaseKey
from silotune.privacy.tally import tally_of, total

DELTA = 1e-5
EVENTS = {
    "steps": step_event(rate=0.1, sigma=1.0, steps=1),
    "metrics": gaussian_event(20.0),
    "more": gaussian_event(30.0),
}
PLAN = Plan.from_mapping(
    {
        "plan": {"name": "promise", "purpose": "test"},
        "model": {"base": "nowhere", "task": "causal_lm"},
        "data": {"dataset": "notes"},
        "rounds": {"number": 20},
        "privacy": {"mode": "record", "epsilon": 8.0, "delta": DELTA, "clip": 1.0, "batch": 10},
    }
)
RECORD_TYPES = {"RecordDict", "ArrayRecord", "MetricRecord", "ConfigRecord"}


@pytest.fixture(scope="module")
def reserved():
    """A ledger with room for one of each mechanism, copied by every example."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.sqlite"
        ledger = Ledger(path)
        whole = ComposedDpEvent(list(EVENTS.values()))
        ledger.reserve("notes", "run", PLAN.sha256, whole, budget=Budget(100.0, DELTA))
        ledger.close()
        yield path


class Own:
    """Something that only looks like a field."""

    value, source, mechanism = 1.0, "plan: seed", "steps"


numbers = st.floats(width=32)
values = st.one_of(
    numbers,
    st.integers(-10, 10),
    st.lists(numbers, max_size=3).map(lambda v: np.array(v, dtype=np.float32)),
    st.sampled_from(["text", b"bytes", True, None, [1.0], {"a": 1}, np.array(["text"])]),
)
sources = st.sampled_from(["plan: rounds.number", "site.toml: name", "protocol: round", "", "me"])
mechanisms = st.sampled_from([*EVENTS, "unknown"])
fields = st.one_of(
    st.builds(Public, values, source=sources),
    st.builds(DpRelease, values, mechanism=mechanisms),
    st.builds(Unprotected, values),
    values,
    st.just(Own()),
)
replies = st.dictionaries(
    st.sampled_from(["update", "loss", "units", "released", "Odd name"]), fields, max_size=4
)
accounted = st.one_of(
    st.builds(Public, st.integers(-10, 10), source=st.just("plan: rounds.number")),
    st.builds(DpRelease, st.floats(-1, 1, width=32), mechanism=st.sampled_from(list(EVENTS))),
)
good_replies = st.dictionaries(st.sampled_from(["update", "loss", "units"]), accounted, max_size=3)
given_events = st.sets(st.sampled_from(list(EVENTS))).map(
    lambda names: {name: EVENTS[name] for name in names}
)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(reply=replies | good_replies, events=given_events, exact=st.booleans())
def test_every_value_of_a_reply_is_public_or_charged_or_nothing_leaves(
    reserved, reply, events, exact
):
    if exact:  # name just the mechanisms that the fields name: more replies get through
        used = {f.mechanism for f in reply.values() if isinstance(f, DpRelease)}
        events = {name: EVENTS[name] for name in used & EVENTS.keys()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file in reserved.parent.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
            (folder / file.name).chmod(0o600)
        ledger = Ledger(folder / "ledger.sqlite")
        gate = Gate(
            ledger=ledger, dataset="notes", plan=PLAN, outbox=RunFiles(folder, OUTBOX, run="run")
        )
        key = ReleaseKey("run", 1, "update")
        try:
            sent = gate.release(key, fields=reply, mechanisms=events)
        except (ValueUnaccounted, SelfCheckFailed):
            assert ledger.events("notes") == []
            assert list((folder / "outbox").iterdir()) == []
            return
        finally:
            ledger.close()
        left = set(sent["released"]) | (set(sent) - {"released"})
        assert left == set(reply)
        on_disk = Ledger(folder / "ledger.sqlite")  # what another process, or a restart, sees
        charged = total(tally_of(event) for event in on_disk.events("notes"))
        on_disk.close()
        behind = {field.mechanism for field in reply.values() if isinstance(field, DpRelease)}
        assert charged == total(tally_of(EVENTS[name]) for name in behind)
        for field in reply.values():
            assert type(field) in {Public, DpRelease}
            if type(field) is Public:
                assert field.source.split(":")[0] in {"plan", "site.toml", "protocol"}
                assert not isinstance(field.value, np.ndarray)


def test_records_are_built_in_one_place():
    """No module of a site makes Flower records, and only the gate has a reply's made and stored.

    The runner makes one that stays: the empty state in the context that Flower's ClientApp takes.
    """
    makers, writers, repliers, files = Counter(), Counter(), set(), set()
    for path in Path(silotune.__file__).parent.rglob("*.py"):
        tree, at_site = ast.parse(path.read_text()), "client" in path.parts
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                called = getattr(node.func, "id", getattr(node.func, "attr", ""))
                makers[path.name] += at_site and called in RECORD_TYPES
            named = {getattr(node, "id", ""), getattr(node, "attr", "")}
            writers[path.name] += "records_of" in named
            if isinstance(node, ast.ImportFrom) and node.module == "silotune.client.gate":
                repliers |= {alias.name for alias in node.names} & {"Reply"}
            if isinstance(node, ast.Name) and node.id == "OUTBOX":
                files.add(path.name)
    assert +makers == {"runner.py": 1}
    assert +writers == {"gate.py": 1}
    assert not repliers
    assert files == {"run_files.py", "site_run.py"}  # which gives them to the gate


@pytest.mark.parametrize(
    "error",
    [*(kind("Jane Doe, born 1961") for kind in catalogue()), ValueError("Jane Doe"), KeyError(1)],
    ids=lambda error: type(error).__name__,
)
def test_of_an_error_only_its_code_leaves(error):
    code = refusal(error)
    assert code == (error.code if isinstance(error, SilotuneError) else "ST-000")
    assert len(code) == 6
