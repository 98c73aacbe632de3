import io
import tracemalloc

import pytest

from silotune.data.formats import xml_records
from silotune.data.formats.xml_records import XmlBroken, records, text_at


class Endless(io.RawIOBase):
    """A stream that repeats itself for ever: whoever reads it all never ends."""

    def __init__(self, begin, part):
        self._begin, self._part = begin, part

    def read(self, size=-1):
        begin, self._begin = self._begin, b""
        return begin + self._part * (size // len(self._part))


def read(tmp_path, stream, **keys):
    return list(records(tmp_path / "x.xml", stream, {"L"}, **keys))


@pytest.mark.parametrize(
    ("begin", "part", "said"),
    [
        (b"<L>", b"<r><a>x</a>", "nested more than 200 deep"),
        (b"<L><r>", b"text ", "a record of more than"),
        (b"<L><r>", b"<a/>", "a record of more than"),
        (b"<L><r ", b"aaaaaaaa", "a tag of more than"),
        (b"<L><!-- ", b"comment ", "a tag of more than"),
        (b"<L><r a='", b"aaaaaaaa", "a tag of more than"),
    ],
)
def test_a_stream_without_end_is_left_in_bounded_memory(tmp_path, monkeypatch, begin, part, said):
    monkeypatch.setattr(xml_records, "MOST_TEXT", 2**20)
    monkeypatch.setattr(xml_records, "MOST_ELEMENTS", 1000)
    tracemalloc.start()
    with pytest.raises(XmlBroken, match=said):
        read(tmp_path, Endless(begin, part))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * 2**20


def test_a_million_records_are_never_there_at_once(tmp_path):
    body = b"<L>" + b"<r>text of a record</r>" * 20_000 + b"</L>"
    tracemalloc.start()
    total = sum(child is not None for _, child in records(tmp_path / "x", io.BytesIO(body), {"L"}))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == 20_000
    assert peak < 3 * 2**20


def test_text_among_elements_keeps_its_place(tmp_path):
    body = b"<x><L k='v'><r a='1'>one<b>two</b>three<b/>four</r></L><L/></x>"
    (first, none), (holder, child), (second, _) = read(tmp_path, io.BytesIO(body))
    assert none is None and holder is first and second is not first
    assert (holder.get("k"), child.get("a"), "".join(child.itertext())) == (
        "v",
        "1",
        "onetwothreefour",
    )
    assert (text_at(child, "@a"), text_at(child, "b"), text_at(child, "b/@x")) == ("1", "two", "")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"no xml",
        b"<L><r></L>",
        b"<L>&unknown;</L>",
        b"<?xml version='1.0' encoding='x-y'?><L/>",
        b"<?xml version='1.0' encoding='shift_jis'?><L/>",
        b"\xff\xfe<",
    ],
)
def test_what_is_no_xml_is_told_as_such(tmp_path, body):
    with pytest.raises(XmlBroken):
        read(tmp_path, io.BytesIO(body))
