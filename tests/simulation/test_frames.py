"""Frames arrive as they were sent, whatever their sizes, and never half."""

import socket
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from silotune.simulation.workers import (
    Frame,
    encode,
    pack_arrays,
    receive_frame,
    send_frame,
    through_bytes,
    unpack_arrays,
)

LARGE = 1 << 16

sizes = st.one_of(st.integers(0, 40), st.sampled_from([LARGE - 1, LARGE, 3 * LARGE]))
blobs = st.lists(sizes.map(lambda n: (b"%d" % n * n)[:n]), max_size=5)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)
headers = st.dictionaries(st.sampled_from(["to", "site", "objects"]), json_values)


@settings(max_examples=60, deadline=None)
@given(header=headers, content=blobs)
def test_a_frame_comes_back_equal(header, content):
    back = through_bytes(Frame("reply", header, content))
    assert (back.kind, back.header, back.blobs) == ("reply", header, content)


def test_frames_of_any_size_keep_their_order_on_a_socket():
    ours, theirs = socket.socketpair()
    rng = np.random.default_rng(1)
    frames = [
        Frame(str(i), {"i": i}, [rng.bytes(int(n)) for n in rng.integers(0, 4 * LARGE, 3)])
        for i in range(20)
    ]
    sender = threading.Thread(target=lambda: [send_frame(ours, frame) for frame in frames])
    sender.start()
    received = [receive_frame(theirs) for _ in frames]
    sender.join()
    ours.close()
    assert received == frames
    with pytest.raises(EOFError):
        receive_frame(theirs)
    theirs.close()


@pytest.mark.parametrize("kept", [1, 8, 12, LARGE])
def test_a_frame_that_breaks_off_is_not_taken_for_one(kept):
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * LARGE)
    ours.sendall(b"".join(encode(Frame("reply", {"to": "x"}, [bytes(LARGE)])))[:kept])
    ours.close()
    with pytest.raises(EOFError):
        receive_frame(theirs)
    theirs.close()


numeric = arrays(
    st.sampled_from(["f4", ">f8", "i8", "u1", "?", "c8"]),
    array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.text(min_size=1, max_size=5), numeric, max_size=3))
def test_arrays_come_back_equal_and_writable(given_arrays):
    back = unpack_arrays(*pack_arrays(given_arrays))
    assert list(back) == list(given_arrays)
    for name, array in given_arrays.items():
        assert back[name].dtype == array.dtype
        np.testing.assert_array_equal(back[name], array)
        assert back[name].flags.writeable


def test_an_array_in_columns_keeps_its_values():
    columns = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    np.testing.assert_array_equal(unpack_arrays(*pack_arrays({"x": columns}))["x"], columns)


@pytest.mark.parametrize("array", [np.array(["text"]), np.array([None]), np.array([b"bytes"])])
def test_only_numbers_travel_as_arrays(array):
    with pytest.raises(TypeError, match="not numeric"):
        pack_arrays({"x": array})
