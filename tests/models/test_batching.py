"""Micro-batches: nothing lost, nothing split that must stay whole, little padding."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from silotune.models.batching import Encoded, batches

lengths_of = st.lists(st.integers(1, 60), min_size=1, max_size=80)


def encoded(lengths) -> Encoded:
    return Encoded.of([[5] * n for n in lengths], [0] * len(lengths), 0)


@settings(max_examples=50, deadline=None)
@given(lengths_of, st.integers(1, 20), st.randoms())
def test_every_row_is_in_exactly_one_batch_of_at_most_the_size(lengths, size, random):
    rows = list(range(len(lengths)))
    random.shuffle(rows)
    found = batches(encoded(lengths), rows, size=size)
    assert sorted(r for batch in found for r in batch) == sorted(rows)
    assert max(map(len, found)) <= size
    assert max(map(len, found)) - min(map(len, found)) <= 1
    flat = [lengths[r] for batch in found for r in batch]
    assert flat == sorted(flat)


@settings(max_examples=50, deadline=None)
@given(lengths_of, st.integers(1, 20), st.randoms(), st.integers(1, 12))
def test_a_unit_never_spans_two_batches(lengths, size, random, n_units):
    rows = list(range(len(lengths)))
    random.shuffle(rows)
    units = np.array([random.randrange(n_units) for _ in rows])
    found = batches(encoded(lengths), rows, size=size, units=units)
    assert sorted(r for batch in found for r in batch) == sorted(rows)
    unit_of = dict(zip(rows, units.tolist(), strict=True))
    homes: dict[int, set[int]] = {}
    for index, batch in enumerate(found):
        for row in batch:
            homes.setdefault(unit_of[row], set()).add(index)
        assert len(batch) <= size or len({unit_of[r] for r in batch}) == 1
    assert all(len(home) == 1 for home in homes.values())


def test_no_rows_give_no_batches():
    assert batches(encoded([3, 4]), [], size=4) == []
    assert batches(encoded([3, 4]), [], size=4, units=np.array([], dtype=int)) == []


def test_bucketing_leaves_little_padding():
    rng = np.random.default_rng(0)
    data = encoded(rng.integers(3, 60, 2000))
    padding = [
        1 - data.lengths[b].sum() / (len(b) * data.lengths[b].max())
        for b in batches(data, range(2000), size=64)
    ]
    assert np.mean(padding) < 0.05
