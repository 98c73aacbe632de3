"""Encoded examples: ragged in, padded out."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from silotune.models.batching import Encoded

ragged = st.lists(st.lists(st.integers(1, 900), min_size=1, max_size=12), min_size=1, max_size=9)
CPU = torch.device("cpu")


@settings(max_examples=50, deadline=None)
@given(ragged, st.randoms())
def test_padding_keeps_tokens_in_place_and_masks_the_rest(sequences, random):
    data = Encoded.of(sequences, range(len(sequences)), pad_id=0)
    rows = [random.randrange(len(sequences)) for _ in range(5)]
    batch = data.padded(rows, CPU)
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    for row, ids, mask in zip(rows, batch["input_ids"], batch["attention_mask"], strict=True):
        n = len(sequences[row])
        assert ids[:n].tolist() == sequences[row]
        assert ids[mask.bool()].tolist() == sequences[row]
        assert mask.sum() == n


@settings(max_examples=50, deadline=None)
@given(ragged, st.randoms())
def test_a_subset_has_the_rows_asked_for_in_their_order(sequences, random):
    data = Encoded.of(sequences, range(len(sequences)), pad_id=0)
    rows = [random.randrange(len(sequences)) for _ in range(6)]
    part = data.subset(rows)
    assert len(part) == 6
    assert part.targets.tolist() == rows
    assert [part.tokens(i).tolist() for i in range(6)] == [sequences[r] for r in rows]
    assert part.lengths.tolist() == [len(sequences[r]) for r in rows]


def test_nothing_can_be_encoded_and_chosen():
    data = Encoded.of([], [], pad_id=0)
    assert len(data) == 0
    assert data.subset(np.array([], dtype=int)).lengths.tolist() == []
