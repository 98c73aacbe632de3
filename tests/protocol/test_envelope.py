"""Seals: every change of content or place is noticed, also after Flower's own serialisation."""

from dataclasses import fields, replace

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from hypothesis import given
from hypothesis import strategies as st

from silotune.protocol import envelope
from silotune.protocol.envelope import (
    MessagePlace,
    Packing,
    address_of,
    refusal,
    refusal_code,
    seal,
    seal_id,
    unseal,
)
from silotune.trust.errors import EnvelopeInvalid

KEY = Ed25519PrivateKey.generate()
ADDRESS = MessagePlace(
    federation="icu", run="r", round=3, kind="train", sender="coordinator", receiver="alpha"
)


def content(**changes):
    flat = np.arange(6, dtype=np.float32)
    values = {"plan": "p", "round": 3, "rate": 0.5, "on": True, "raw": b"\0\1", "list": [1, 2]}
    return RecordDict(
        {
            "arrays": ArrayRecord({"flat": Array(flat)}),
            "config": ConfigRecord({**values, **changes}),
            "metrics": MetricRecord({"n": 1}),
        }
    )


def sorted_record(record):
    return type(record)({key: record[key] for key in sorted(record)})


def exchanged(other):
    """Another content under the seal of `content()`."""
    sealed = seal(other, address=ADDRESS, key=KEY)
    sealed["envelope"] = seal(content(), address=ADDRESS, key=KEY)["envelope"]
    return sealed


def test_what_is_sealed_opens_to_the_same_content():
    sealed = seal(content(), address=ADDRESS, key=KEY)
    assert address_of(sealed) == ADDRESS
    opened = unseal(sealed, address=ADDRESS, key=KEY.public_key())
    assert set(opened) == set(content())
    assert all(dict(opened[name]) == dict(record) for name, record in content().items())
    for key, value in content()["config"].items():
        assert type(opened["config"][key]) is type(value)


def test_a_seal_survives_the_wire():
    proto = recorddict_to_proto(seal(content(), address=ADDRESS, key=KEY))
    arrived = recorddict_from_proto(type(proto).FromString(proto.SerializeToString()))
    unseal(arrived, address=ADDRESS, key=KEY.public_key())


@pytest.mark.parametrize(
    "change",
    [
        {"plan": "q"},
        {"round": 4},
        {"round": 3.0},
        {"on": 1},
        {"rate": float(np.nextafter(0.5, 1))},
        {"raw": b"\0\2"},
        {"raw": "\0\1"},
        {"list": [1, 2, 3]},
        {"list": [2, 1]},
        {"more": 0},
    ],
    ids=str,
)
def test_a_changed_value_or_type_breaks_the_seal(change):
    changed = exchanged(content(**change))
    with pytest.raises(EnvelopeInvalid, match="signature"):
        unseal(changed, address=ADDRESS, key=KEY.public_key())


@pytest.mark.parametrize(
    "array",
    [
        np.arange(1, 7, dtype=np.float32),
        np.arange(6, dtype=np.float32).reshape(2, 3),
        np.arange(6, dtype=np.float32).view(np.int32),
    ],
    ids=["values", "shape", "dtype"],
)
def test_a_changed_array_breaks_the_seal(array):
    other = content()
    other["arrays"] = ArrayRecord({"flat": Array(array)})
    with pytest.raises(EnvelopeInvalid, match="signature"):
        unseal(exchanged(other), address=ADDRESS, key=KEY.public_key())


def test_records_taken_away_added_or_renamed_break_the_seal():
    for name in ("arrays", "metrics"):
        other = content()
        record = other.pop(name)
        with pytest.raises(EnvelopeInvalid, match="signature"):
            unseal(exchanged(other), address=ADDRESS, key=KEY.public_key())
        other[f"{name}2"] = record
        with pytest.raises(EnvelopeInvalid, match="signature"):
            unseal(exchanged(other), address=ADDRESS, key=KEY.public_key())


def test_a_large_content_goes_in_pieces_that_must_all_be_there_in_order():
    flat = np.random.default_rng(1).standard_normal(3 << 20).astype(np.float32)
    large = RecordDict({"arrays": ArrayRecord({"flat": Array(flat)})})
    sealed = seal(large, address=ADDRESS, key=KEY)
    pieces = [f"bytes.{n}" for n in range(4)]  # of at most 4 MB
    assert sorted(sealed) == [*pieces, "envelope"]
    assert np.array_equal(
        unseal(sealed, address=ADDRESS, key=KEY.public_key())["arrays"]["flat"].numpy(), flat
    )
    first, second = sealed["bytes.0"], sealed["bytes.1"]
    for change in (
        {"bytes.0": second, "bytes.1": first},
        {"bytes.4": ConfigRecord({"bytes": b"x"})},
        {"aside": first},
        {"bytes.2": ConfigRecord({"bytes": "text"})},
        {"bytes.2": ConfigRecord({"other": b"x"})},
        {"bytes.2": MetricRecord({"bytes": 1})},
    ):
        with pytest.raises(EnvelopeInvalid, match=r"signature|pieces of bytes"):
            unseal(RecordDict({**sealed, **change}), address=ADDRESS, key=KEY.public_key())
    for name in pieces:
        rest = RecordDict({key: record for key, record in sealed.items() if key != name})
        with pytest.raises(EnvelopeInvalid, match=r"signature|pieces of bytes"):
            unseal(rest, address=ADDRESS, key=KEY.public_key())


def test_an_exchange_packs_what_all_are_asked_alike_once(monkeypatch):
    """And the seals are those that each message would have had alone."""
    packed, packing = [], Packing()
    original = envelope.recorddict_to_proto
    monkeypatch.setattr(
        envelope, "recorddict_to_proto", lambda found: packed.append(1) or original(found)
    )
    places = [replace(ADDRESS, receiver=name) for name in ("alpha", "beta", "gamma")]
    sealed = [seal(content(), address=p, key=KEY, packing=packing) for p in places]
    assert len(packed) == len(content())
    assert sealed[0]["bytes.0"]["bytes"] is sealed[2]["bytes.0"]["bytes"]
    assert sealed == [seal(content(), address=p, key=KEY) for p in places]


@pytest.mark.parametrize("name", ["beside", "secure"])
def test_a_record_of_a_site_s_own_leaves_the_adapter_packed_once(monkeypatch, name):
    """And the seals are those that each message would have had alone, with Flower's own bytes."""
    packed, packing = [], Packing()
    original = envelope.recorddict_to_proto
    monkeypatch.setattr(
        envelope, "recorddict_to_proto", lambda found: packed.extend(found) or original(found)
    )
    places = [replace(ADDRESS, receiver=site) for site in ("alpha", "beta", "gamma")]
    asked = [RecordDict({name: ConfigRecord({"for": p.receiver}), **content()}) for p in places]
    sealed = [
        seal(one, address=p, key=KEY, packing=packing) for one, p in zip(asked, places, strict=True)
    ]
    assert (packed.count("arrays"), packed.count(name)) == (1, 3)
    assert sealed[0]["bytes.0"]["bytes"] is sealed[2]["bytes.0"]["bytes"]
    for each, place, one in zip(sealed, places, asked, strict=True):
        assert each == seal(one, address=place, key=KEY)
        assert unseal(each, address=place, key=KEY.public_key()) == one
        pieces = (record["bytes"] for record in each.values() if "bytes" in record)
        in_order = original(RecordDict({key: sorted_record(one[key]) for key in sorted(one)}))
        assert b"".join(pieces) == in_order.SerializeToString(deterministic=True)


def test_what_is_packed_once_is_packed_again_when_it_has_changed():
    packing, asked = Packing(), content()
    seal(asked, address=ADDRESS, key=KEY, packing=packing)
    asked["config"]["round"] = 4  # the same records, changed in place
    sealed = seal(asked, address=ADDRESS, key=KEY, packing=packing)
    assert unseal(sealed, address=ADDRESS, key=KEY.public_key())["config"]["round"] == 4


def test_what_is_signed_and_no_records_is_refused(monkeypatch):
    class Nonsense:
        @staticmethod
        def SerializeToString(**_):
            return b"\xff no protobuf"

    monkeypatch.setattr(envelope, "recorddict_to_proto", lambda content: Nonsense)
    sealed = seal(content(), address=ADDRESS, key=KEY)
    with pytest.raises(EnvelopeInvalid, match="no records"):
        unseal(sealed, address=ADDRESS, key=KEY.public_key())


@pytest.mark.parametrize("field", [f.name for f in fields(MessagePlace)])
def test_a_message_counts_at_its_own_place_only(field):
    sealed = seal(content(), address=ADDRESS, key=KEY)
    other = replace(ADDRESS, **{field: 9 if field == "round" else "other"})
    with pytest.raises(EnvelopeInvalid, match=f"another place: {field} differ"):
        unseal(sealed, address=other, key=KEY.public_key())
    sealed["envelope"][field] = getattr(other, field)
    with pytest.raises(EnvelopeInvalid, match="signature"):
        unseal(sealed, address=other, key=KEY.public_key())


def test_another_key_and_no_envelope_are_refused():
    sealed = seal(content(), address=ADDRESS, key=Ed25519PrivateKey.generate())
    with pytest.raises(EnvelopeInvalid, match="does not fit"):
        unseal(sealed, address=ADDRESS, key=KEY.public_key())
    with pytest.raises(EnvelopeInvalid, match="not signed"):
        unseal(content(), address=ADDRESS, key=KEY.public_key())
    with pytest.raises(EnvelopeInvalid, match="already"):
        seal(sealed, address=ADDRESS, key=KEY)


@pytest.mark.parametrize(
    "change",
    [
        {"round": "3"},
        {"round": True},
        {"signature": "text"},
        {"sender": 1},
        {"sender": "x" * 1000},
        {"extra": 1},
    ],
    ids=str,
)
def test_a_misshapen_envelope_is_refused_before_any_arithmetic(change):
    sealed = seal(content(), address=ADDRESS, key=KEY)
    sealed["envelope"] = ConfigRecord({**sealed["envelope"], **change})
    with pytest.raises(EnvelopeInvalid, match="wrong fields"):
        address_of(sealed)


def test_a_reply_answers_one_request_and_goes_the_other_way():
    request = seal(content(), address=ADDRESS, key=KEY)
    reply = ADDRESS.reply(to=seal_id(request))
    assert (reply.sender, reply.receiver) == ("alpha", "coordinator")
    assert reply.in_reply_to == seal_id(request)
    other = seal(content(plan="q"), address=ADDRESS, key=KEY)
    assert seal_id(other) != seal_id(request)


def test_sealing_again_gives_the_same_seal():
    assert seal_id(seal(content(), address=ADDRESS, key=KEY)) == seal_id(
        seal(content(), address=ADDRESS, key=KEY)
    )


def test_a_refusal_carries_its_code_and_nothing_else():
    assert refusal_code(refusal("ST-501")) == "ST-501"
    assert refusal_code(content()) is None


VALUES = st.integers(-5, 5) | st.text(max_size=3) | st.booleans() | st.floats(allow_nan=False)


@given(st.dictionaries(st.text(max_size=3), VALUES, max_size=4))
def test_the_order_in_which_values_were_set_is_not_sealed(values):
    backwards = dict(reversed(values.items()))
    one, other = (
        seal(RecordDict({"c": ConfigRecord(given)}), address=ADDRESS, key=KEY)
        for given in (values, backwards)
    )
    assert seal_id(one) == seal_id(other)
    opened = unseal(one, address=ADDRESS, key=KEY.public_key())["c"]
    assert dict(opened) == values
    assert {key: type(value) for key, value in opened.items()} == {
        key: type(value) for key, value in values.items()
    }
