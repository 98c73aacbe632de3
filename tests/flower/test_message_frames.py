"""Frames: every message crosses as it was, whatever it holds, and nothing else is taken for one."""

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.app.metadata import Metadata
from hypothesis import given
from hypothesis import strategies as st

from silotune.flower.message_frames import (
    MOST_HEAD,
    MOST_PIECE,
    MOST_PIECES,
    Parts,
    answered_by,
    apart,
    frames,
    outline_of,
    prefix,
    read_frame,
    runs,
    together,
)
from silotune.flower.messages import APP_RAISED
from silotune.protocol.envelope import MessagePlace, seal, unseal

KEY = Ed25519PrivateKey.from_private_bytes(b"k" * 32)
PLACE = MessagePlace(
    federation="f", run="r", round=1, kind="train", sender="coordinator", receiver="a"
)


def message_with(content, *, error=None):
    from flwr.app import Error
    from flwr.app.message.message import make_message

    metadata = Metadata(5, "ab" * 32, 1, 2, "cd" * 32, "g", 1.5, 60.0, "train")
    if error:
        return make_message(metadata, error=Error(APP_RAISED, error))
    return make_message(metadata, content)


def crossed(message):
    """As the other end builds it from the frames."""
    got = [read_frame(b"".join(frame)) for frame in frames(apart(message))]
    assert [frame.number for frame in got] == list(range(len(got)))
    assert {frame.of for frame in got} in ({len(got)}, {0})
    pieces = [bytes(frame.piece) for frame in got][: got[0].of]
    return together(Parts(got[0].head, tuple(pieces)))


@given(st.dictionaries(st.text("ab.0", min_size=1), st.binary(max_size=40), max_size=4))
def test_any_records_cross_as_they_were(contents):
    content = RecordDict({name: ConfigRecord({"bytes": blob}) for name, blob in contents.items()})
    found = crossed(message_with(content))
    assert found.content == content
    assert vars(found.metadata) == vars(message_with(content).metadata)


@pytest.mark.parametrize("size", [0, 1, MOST_PIECE, 2 * MOST_PIECE + 1])
def test_a_sealed_content_of_any_size_crosses_and_its_seal_fits(size):
    array = Array("uint8", (size,), "numpy.ndarray", b"\x07" * size)
    content = RecordDict({"arrays": ArrayRecord({"flat": array})})
    sealed = seal(content, address=PLACE, key=KEY)
    parts = apart(message_with(sealed))
    assert len(parts.head) < 600  # all else is in pieces
    assert all(len(piece) <= MOST_PIECE for piece in parts.pieces)
    assert all(piece is sealed[f"bytes.{n}"]["bytes"] for n, piece in enumerate(parts.pieces))
    found = crossed(message_with(sealed)).content
    assert unseal(found, address=PLACE, key=KEY.public_key()) == content


@given(st.lists(st.integers(0, MOST_PIECE), max_size=8))
def test_pieces_share_frames_as_far_as_they_fit(sizes):
    whole = b"\0" * MOST_PIECE
    pieces = [whole[:size] for size in sizes]
    found = runs(pieces)
    assert [piece for run in found for piece in run] == pieces
    together = [sum(map(len, run)) for run in found]
    assert all(size <= MOST_PIECE for size in together)
    assert all(
        size + len(run[0]) > MOST_PIECE for size, run in zip(together, found[1:], strict=False)
    )


def test_records_that_only_look_like_pieces_stay_in_the_head():
    strange = RecordDict(
        {
            "bytes.0": ConfigRecord({"bytes": b"a", "more": 1}),
            "bytes.1": ConfigRecord({"bytes": b"b"}),
            "bytes.x": ConfigRecord({"bytes": b"c"}),
        }
    )
    assert apart(message_with(strange)).pieces == ()
    assert crossed(message_with(strange)).content == strange


def test_an_error_crosses_without_content():
    found = crossed(message_with(None, error="ST-641"))
    assert (found.has_content(), found.error.reason) == (False, "ST-641")


def test_an_outline_has_the_address_and_nothing_of_the_content():
    head = apart(message_with(RecordDict({"x": ConfigRecord({"y": 1})}))).head
    assert outline_of(head).metadata.message_id == "ab" * 32
    assert dict(outline_of(head).content) == {}
    assert answered_by(head) == "cd" * 32


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"STf1",
        b"STf2" + prefix(b"", number=0, of=0)[4:],
        prefix(b"\0" * (MOST_HEAD + 1), number=0, of=0),
        prefix(b"", number=0, of=MOST_PIECES + 1),
        prefix(b"", number=1, of=1),
        prefix(b"", number=1, of=0),
        prefix(b"abc", number=0, of=0)[:-1],
        prefix(b"", number=0, of=1) + b"\0" * (MOST_PIECE + 1),
    ],
)
def test_what_is_no_frame_is_refused(body):
    with pytest.raises(ValueError, match="frame"):
        read_frame(body)


@given(st.binary(max_size=200))
def test_no_bytes_in_place_of_a_head_do_anything_but_fail(head):
    for read in (outline_of, answered_by, lambda head: together(Parts(head, (b"x",)))):
        try:
            read(head)
        except ValueError:
            continue
