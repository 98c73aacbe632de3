"""Promise 1 with traces on: a site answers the same bytes, and its spans know nothing of its records."""

import json
import re

import numpy as np
import pytest
from flwr.supercore.task_identity import TaskIdentity

from silotune.models.layout import initial_adapter
from tests.events.tracing_material import traced
from tests.federation import PRIVATE, write_federation
from tests.promises.site_messages import ask

SETTINGS = {
    **{key.replace(".", "__"): value for key, value in PRIVATE.items()},
    "privacy__metrics_share": 0.1,
}
HEADER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
NAMES = {"query.join", "train", "evaluate", "release"}
TOLD = {"silotune.run", "silotune.round"}


@pytest.fixture
def federation(tmp_path, bert_folder):
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1
    return write_federation(tmp_path, bert_folder, **SETTINGS)


def conversation(run, **settings):
    """Join, a round, its evaluation; what was answered."""
    joined = ask(run, "query.join", **settings)
    adapter = initial_adapter(run.training.trainer.layout, run.plan)
    answers = [joined]
    answers += [ask(run, "train", number, adapter, **settings) for number in (1, 2)]
    return [*answers, ask(run, "evaluate", 2, adapter, **settings)]


def test_answers_are_the_same_bytes_and_charges_the_same_events(federation):
    plain = federation.runs(state="plain")[0]
    other = federation.runs(state="traced")[0]
    without = conversation(plain)
    with traced() as spans:
        with_traces = conversation(other, traceparent=HEADER)
        assert spans()
    assert [set(answer) for answer in with_traces] == [set(answer) for answer in without]
    for one, two in zip(with_traces, without, strict=True):
        assert dict(one["released"]) == dict(two["released"])
        for record in set(one) - {"released"}:
            assert np.array_equal(one[record]["flat"].numpy(), two[record]["flat"].numpy())
    assert other.ledger.events("notes") == plain.ledger.events("notes")


def test_spans_are_named_by_the_protocol_and_carry_run_and_round_only(federation):
    with traced() as spans:
        conversation(federation.runs()[0], traceparent=HEADER)
        found = spans()
    assert {span.name for span in found} == NAMES
    for span in found:
        assert set(span.attributes) <= TOLD
        assert not span.events
        assert not span.links
        assert f"{span.context.trace_id:032x}" == HEADER.split("-")[1]
    trained = [span for span in found if span.name == "train"]
    assert [span.attributes["silotune.round"] for span in trained] == [1, 2]
    inside = [span for span in found if span.name == "release"]
    assert {span.parent.span_id for span in inside} == {
        span.context.span_id for span in found if span.name != "release"
    }


def test_what_goes_wrong_on_a_record_is_in_no_span(federation):
    notes = federation.folder / "alpha" / "notes.csv"
    marked = re.sub(r"(?m)(?<=,)(yes|no)(?=,)", "SECRET-DIAGNOSIS", notes.read_text(), count=1)
    assert "SECRET-DIAGNOSIS" in marked
    notes.write_text(marked)
    with traced() as spans:
        run = federation.runs()[0]
        ask(run, "query.join", traceparent=HEADER)  # whether records can be read, nobody is told
        found = spans()
    assert [part.values for part in run.training.records.left_out] == [{"SECRET-DIAGNOSIS": 1}]
    assert {span.name for span in found} == {"query.join", "release"}
    assert all(span.status.description is None for span in found)
    told = json.dumps([json.loads(span.to_json()) for span in found])
    assert "SECRET" not in told
    assert str(federation.folder) not in told
