"""The rules of a hash chain and its head file, whatever the links are."""

import inspect
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from silotune.privacy import ledger_table
from silotune.trust import audit
from silotune.trust.chain import GENESIS, Chain, Head
from silotune.trust.errors import AuditLogDamaged


@dataclass(frozen=True)
class Said:
    """A link."""

    content: dict
    previous: str
    head: Head


def link(end, **content):
    return Said(content, end.hash, end.after(content))


@pytest.fixture
def chain(tmp_path):
    chain = Chain(tmp_path / "links", called="chain", part="link", damaged=AuditLogDamaged)
    chain.prepare(create=True)
    return chain


def grow(chain, *waited):
    for each in waited:
        chain.take(link(chain.end, n=chain.end.seq), waited=each)


def test_the_head_file_may_be_one_link_behind_and_is_then_to_be_written(chain):
    grow(chain, True)
    assert not chain.agrees()
    chain.write_head()
    assert chain.agrees()
    grow(chain, True, True)
    with pytest.raises(AuditLogDamaged, match="ends at link 3 but its head file says link 1"):
        chain.agrees()


def test_links_that_nobody_waited_for_may_come_behind_the_head(chain):
    grow(chain, True)
    chain.write_head()
    grow(chain, False, False, False)
    assert chain.agrees()
    grow(chain, True)
    assert not chain.agrees()
    grow(chain, True)
    with pytest.raises(AuditLogDamaged):
        chain.agrees()


def test_a_head_beyond_the_end_is_a_chain_that_was_cut(chain):
    grow(chain, True, True)
    chain.write_head()
    again = Chain(chain.path, called="chain", part="link", damaged=AuditLogDamaged)
    again.prepare(create=False)
    grow(again, True)
    with pytest.raises(AuditLogDamaged, match="cut, edited or rolled back"):
        again.agrees()


@pytest.mark.parametrize(
    "change",
    [
        lambda one: replace(one, content={"n": 2}),
        lambda one: replace(one, previous="0" * 64),
        lambda one: replace(one, head=Head(one.head.seq + 1, one.head.hash)),
        lambda one: replace(one, head=Head(one.head.seq, "ab" * 32)),
        lambda one: replace(one, content={"n": float("nan")}),
        lambda one: replace(one, content={"n": object()}),
    ],
    ids=["content", "previous", "number", "hash", "nan", "object"],
)
def test_a_link_that_does_not_follow_is_refused_and_not_taken(chain, change):
    grow(chain, True)
    wrong, end = change(link(chain.end, n=1)), chain.end
    with pytest.raises(AuditLogDamaged, match="broken at link 2"):
        chain.take(wrong)
    with pytest.raises(AuditLogDamaged, match="broken at link 2"):
        list(chain.checked([link(GENESIS, n=0), wrong]))
    assert chain.end == end


values = st.none() | st.booleans() | st.integers() | st.text(max_size=5)
contents = st.dictionaries(st.sampled_from("abc"), values, max_size=3)
places = st.builds(Head, st.integers(0, 9), st.text("0f", min_size=1, max_size=2))


def exactly(value):
    return repr(sorted(value.items()))


@given(places, contents, places, contents)
def test_other_places_and_contents_have_other_hashes(place, said, other, also):
    same = (place, exactly(said)) == (other, exactly(also))
    assert (place.after(said).hash == other.after(also).hash) == same


def test_a_content_can_not_say_where_it_stands():
    assert GENESIS.after({"seq": 9, "previous": "x"}) == GENESIS.after({})


def test_both_books_hash_and_judge_by_these_rules():
    for codec in (ledger_table, audit):
        source = inspect.getsource(codec)
        assert "Chain(path, called=" in source
        assert "hashlib" not in source
