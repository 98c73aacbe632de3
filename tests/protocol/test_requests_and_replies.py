"""Requests and replies: the records that each is on the wire, and what is refused of them."""

from dataclasses import fields

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from silotune.errors import PlanInvalid, UpdateRejected
from silotune.flower import messages
from silotune.privacy.errors import MessageMalformed
from silotune.privacy.secagg.messages import pack_named, pack_names
from silotune.protocol import replies, requests
from silotune.protocol.requests import REQUESTS, as_arrays

PLACE = {"plan": "{}", "run": "r", "round": 3}
ARRAYS = as_arrays(np.arange(4, dtype=np.float32))
NAMES, NAMED = ["a", "b"], {"a": b"1", "b": b"2"}

EVERY = [
    (requests.JoinRequest(plan="{}", run="r"), {"config": {"plan": "{}", "run": "r"}}),
    (
        requests.TrainRequest(**PLACE, arrays=ARRAYS, clip=0.5),
        {"config": {**PLACE, "clip": 0.5}},
    ),
    (requests.EvaluateRequest(**PLACE, arrays=ARRAYS), {"config": PLACE}),
    (requests.KeysRequest(**PLACE), {"config": PLACE, "secure": {}}),
    (
        requests.KeysRequest(**PLACE, attempt=b"x"),
        {"config": PLACE, "secure": {"attempt": b"x"}},
    ),
    (
        requests.ShareRequest(**PLACE, cohort=b"c"),
        {"config": PLACE, "secure": {"cohort": b"c"}},
    ),
    (
        requests.MaskedRequest(**PLACE, arrays=ARRAYS, present=NAMES, sealed=NAMED),
        {
            "config": PLACE,
            "secure": {"present": pack_names(NAMES), "sealed": pack_named(NAMED)},
        },
    ),
    (
        requests.CheckRequest(**PLACE, survivors=NAMES),
        {"config": PLACE, "secure": {"survivors": pack_names(NAMES)}},
    ),
    (
        requests.OpenRequest(**PLACE, survivors=NAMES, signatures=NAMED),
        {
            "config": PLACE,
            "secure": {
                "survivors": pack_names(NAMES),
                "signatures": pack_named(NAMED),
                "cohort": b"",
            },
        },
    ),
]


@pytest.mark.parametrize(("asked", "expected"), EVERY)
def test_a_request_is_these_records_and_is_read_back_from_them(asked, expected):
    content = asked.content()
    found = {name: dict(record) for name, record in content.config_records.items()}
    assert found == expected
    assert list(content.array_records) == (["arrays"] if hasattr(asked, "arrays") else [])
    again = REQUESTS[asked.kind].read(content)
    for each in fields(asked):
        assert getattr(again, each.name) == getattr(asked, each.name), each.name


def test_every_kind_of_request_is_covered_here():
    assert {type(asked) for asked, _ in EVERY} == set(REQUESTS.values())


@pytest.mark.parametrize("kind", sorted(REQUESTS))
@pytest.mark.parametrize(
    ("name", "value"),
    [("plan", None), ("plan", 3), ("run", b"r"), ("round", "3"), ("round", True), ("round", 1.0)],
)
def test_a_request_without_its_place_is_refused(kind, name, value):
    asked = next(each for each, _ in EVERY if each.kind == kind)
    content = asked.content()
    config = {**content["config"], name: value}
    content["config"] = ConfigRecord({k: v for k, v in config.items() if v is not None})
    with pytest.raises(PlanInvalid):
        REQUESTS[kind].read(content)


@pytest.mark.parametrize("kind", sorted(REQUESTS.keys() - {"query.join"}))
@pytest.mark.parametrize("number", [0, -1])
def test_there_is_no_round_below_one(kind, number):
    content = next(each for each, _ in EVERY if each.kind == kind).content()
    content["config"] = ConfigRecord({**content["config"], "round": number})
    with pytest.raises(PlanInvalid):
        REQUESTS[kind].read(content)


@pytest.mark.parametrize("clip", [0.0, -1.0, float("nan"), float("inf"), "1", 1, True])
def test_a_clipping_norm_that_is_none_is_refused(clip):
    content = requests.TrainRequest(**PLACE, arrays=ARRAYS).content()
    content["config"] = ConfigRecord({**content["config"], "clip": clip})
    with pytest.raises(PlanInvalid, match="clipping norm"):
        requests.TrainRequest.read(content)


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        (asked, name)
        for asked, form in EVERY
        for name in form.get("secure", {})
        if name != "attempt"
    ],
)
@pytest.mark.parametrize("value", [None, "text", 3])
def test_a_secure_request_without_its_bytes_is_refused(asked, name, value):
    content = asked.content()
    record = {**content["secure"], name: value}
    content["secure"] = ConfigRecord({k: v for k, v in record.items() if v is not None})
    with pytest.raises(MessageMalformed):
        type(asked).read(content)


def test_a_plan_is_parsed_at_its_first_message_alone(monkeypatch):
    parsed = []
    requests.plan_of.cache_clear()
    monkeypatch.setattr(requests.Plan, "from_canonical", lambda text: parsed.append(text) or text)
    for number in range(20):
        assert requests.plan_of("one" if number % 2 else "two") in {"one", "two"}
    requests.plan_of.cache_clear()
    assert sorted(parsed) == ["one", "two"]


def released(**values):
    return RecordDict({"released": ConfigRecord(values)})


TERMS = {"site": "north", "declared_units": 100, "layout": "[]", "rate": 0.5, "sigma": 1.0}


def test_terms_are_read_as_they_were_declared():
    found = replies.JoinReply.read(released(**TERMS, dtype="float32", rank=2))
    assert found == replies.JoinReply(**TERMS, dtype="float32", rank=2)
    odd = replies.JoinReply.read(released(**TERMS, dtype="<b>", rank=-1))
    assert (odd.dtype, odd.rank) == (None, None)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, None) for name in ("site", "declared_units", "layout")),
        ("site", 3),
        ("declared_units", 0),
        ("declared_units", True),
        ("declared_units", "100"),
        ("rate", "0.5"),
        ("sigma", float("nan")),
    ],
)
def test_terms_that_are_none_are_malformed(name, value):
    given = {k: v for k, v in {**TERMS, name: value}.items() if v is not None}
    with pytest.raises(MessageMalformed):
        replies.JoinReply.read(released(**given))


def test_a_reply_without_records_is_malformed():
    for kind in (replies.JoinReply, replies.CheckReply, replies.OpenReply, replies.MaskedReply):
        with pytest.raises(MessageMalformed):
            kind.read(RecordDict())
    with pytest.raises(UpdateRejected):
        replies.TrainReply.read(RecordDict())
    with pytest.raises(MessageMalformed):
        replies.KeysReply.read(RecordDict()).require_keys()
    with pytest.raises(MessageMalformed):
        replies.ShareReply.read(RecordDict()).require_shares()


def lying(**changes):
    """An update whose array claims what its bytes are not."""
    array = as_arrays(np.ones(3, np.float32))["flat"]
    made = {"dtype": array.dtype, "shape": array.shape, "stype": array.stype, "data": array.data}
    return RecordDict({"update": ArrayRecord({"flat": Array(**{**made, **changes})})})


@pytest.mark.parametrize(
    "changes",
    [
        {"data": b""},
        {"data": b"\x93NUMPY\x01\x00\x01\x00{"},
        {"data": b"nothing of numpy"},
        {"stype": "pickle"},
        {"data": as_arrays(np.ones(3, np.float32))["flat"].data[:-1]},
        {"data": Array(np.ones(3)).data},
        {"data": Array(np.ones((3, 1), np.float32)).data},
    ],
    ids=["empty", "cut header", "other bytes", "other form", "cut", "doubles", "a matrix"],
)
def test_an_array_that_can_not_be_read_is_a_rejected_update(changes):
    with pytest.raises(UpdateRejected):
        replies.TrainReply.read(lying(**changes))


def test_a_site_can_only_fill_in_the_fields_that_a_reply_has():
    assert replies.TrainReply.fields(update=1) == {"update": 1}
    assert replies.KeysReply.fields() == {}
    with pytest.raises(TypeError, match="TrainReply: loss"):
        replies.TrainReply.fields(update=1, loss=2)
    with pytest.raises(TypeError, match="CheckReply: signature"):
        replies.CheckReply.fields()


def test_numbers_alone_are_metrics_and_all_else_is_configuration():
    made = replies.records_of({"update": np.ones(2, np.float32)}, {})
    assert isinstance(made["released"], MetricRecord)
    assert list(made) == ["update", "released"]
    assert isinstance(replies.records_of({}, {"a": 1, "b": "x"})["released"], ConfigRecord)


def test_a_span_is_named_in_a_record_of_the_messages_own():
    messages.identify(1)
    asked = requests.TrainRequest(**PLACE, arrays=ARRAYS)
    kept = asked.config()
    message = Message(requests.adapter_content(ARRAYS, kept), dst_node_id=1, message_type="train")
    requests.put_trace(message, "00-ab")
    assert requests.trace_of(message.content) == ("r", 3, "00-ab")
    assert "traceparent" not in kept
    assert requests.trace_of(RecordDict({"config": ConfigRecord({"run": 3})})) == ("", 0, None)
