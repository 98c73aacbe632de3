from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from silotune.data.records import Records, Split


def records_of(unit_of: list[int], split_of_unit: list[int]) -> Records:
    units = np.array(unit_of, dtype=np.int64)
    return Records(
        examples=[{"text": str(row)} for row in range(len(unit_of))],
        unit_of=units,
        split=np.array(split_of_unit, dtype=np.uint8)[units],
    )


@st.composite
def any_records(draw):
    owners = draw(st.lists(st.integers(0, 6), min_size=1, max_size=40))
    dense = {owner: number for number, owner in enumerate(dict.fromkeys(owners))}
    splits = draw(st.lists(st.integers(0, 2), min_size=len(dense), max_size=len(dense)))
    return records_of([dense[owner] for owner in owners], splits)


@given(any_records())
def test_rows_and_units_of_the_splits_make_up_the_whole(records):
    rows = np.concatenate([records.rows(split) for split in Split])
    units = np.concatenate([records.units(split) for split in Split])
    assert sorted(rows.tolist()) == list(range(len(records)))
    assert sorted(units.tolist()) == list(range(records.n_units()))
    for split in Split:
        assert records.n_units(split) == len(records.units(split))
        own = set(records.unit_of[records.rows(split)].tolist())
        assert own == set(records.units(split).tolist())


def test_a_unit_on_both_sides_is_refused():
    with pytest.raises(ValueError, match="both sides"):
        Records(
            examples=[{}, {}],
            unit_of=np.array([0, 0]),
            split=np.array([Split.TRAIN, Split.TEST], dtype=np.uint8),
        )


def test_gaps_in_the_numbering_and_ragged_columns_are_refused():
    with pytest.raises(ValueError, match="without gaps"):
        Records(examples=[{}], unit_of=np.array([1]), split=np.zeros(1, dtype=np.uint8))
    with pytest.raises(ValueError, match="one length"):
        Records(examples=[{}], unit_of=np.array([0, 1]), split=np.zeros(2, dtype=np.uint8))


def test_records_can_not_be_changed():
    records = records_of([0, 1], [0, 2])
    with pytest.raises(ValueError, match="read-only"):
        records.unit_of[0] = 1
    with pytest.raises(ValueError, match="read-only"):
        records.split[0] = 1
