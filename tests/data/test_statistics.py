"""What a unit adds to statistics: never longer than 1, whatever its records hold."""

import math
import tomllib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from silotune.data.records import Records, Split, load_records
from silotune.data.site import SiteConfig
from silotune.data.statistics import site_sums
from silotune.models.layout import statistics_layout
from silotune.plan.counted import part_scale
from silotune.plan.plan import Plan
from tests.statistics_sites import PLAN as WARDS_PLAN
from tests.statistics_sites import write_ward

COUNTED = Plan.from_mapping(tomllib.loads(WARDS_PLAN))
PLAN = Plan.from_mapping(
    {
        "plan": {"name": "s", "purpose": "tests"},
        "model": {"task": "statistics", "labels": ["a", "b", "c"]},
        "data": {"dataset": "d", "test_share": 0.0, "validation_share": 0.0},
        "rounds": {"number": 1},
        "privacy": {
            "mode": "record", "unit": "patient", "epsilon": 1.0, "delta": 1e-5,
            "clip": 1.0, "rate": 1.0,
        },
        "statistics": {
            "records_a_unit": [2, 3, 6],
            "lengths": {"edges": [2, 4, 8]},
            "numbers": {
                "age": {"lower": 0.0, "upper": 120.0, "edges": [18, 65]},
                "sodium": {"lower": -1e15, "upper": 1e15},
            },
        },
    }
)  # fmt: skip
IN_TOKENS = PLAN.override(
    {"statistics.lengths.counted": "tokens", "model.base": "public/tokenizer"}
)
ODD = [
    "",
    "inf",
    "-inf",
    "nan",
    "1e999",
    "-1e308",
    "1e308",
    "five",
    "0x10",
    "1_0",
    "٤٢",
    "\x00",
    "-0",
]

records_of_a_unit = st.lists(
    st.fixed_dictionaries(
        {
            "label": st.sampled_from(["a", "b", "c", "no such label"]),
            "text": st.text(max_size=40),
            "numbers.age": st.one_of(
                st.sampled_from(ODD), st.floats().map(str), st.text(max_size=6)
            ),
            "numbers.sodium": st.one_of(st.sampled_from(ODD), st.floats().map(str)),
        }
    ),
    min_size=1,
    max_size=12,
)


def records(units):
    """Records of some units, each a list of examples."""
    rows = [example for unit in units for example in unit]
    numbers = [number for number, unit in enumerate(units) for _ in unit]
    split = np.full(len(rows), Split.TRAIN, dtype=np.uint8)
    return Records(rows, np.array(numbers, dtype=np.int64), split)


def example(label="a", text="x", **numbers):
    more = {
        f"numbers.{name}": value for name, value in {"age": "", "sodium": "", **numbers}.items()
    }
    return {"label": label, "text": text, **more}


def sums(units, plan=PLAN, **more):
    return site_sums(records(units), plan, **more)


def counted(units, name, plan=PLAN):
    """One part of the sums, in units."""
    views = statistics_layout(plan).unpack(sums(units, plan).astype(np.float32))
    return views[name] / part_scale(plan)


@settings(max_examples=60, deadline=None)
@given(st.lists(records_of_a_unit, max_size=5), records_of_a_unit)
def test_one_unit_more_moves_the_sum_by_a_length_of_1_at_most(others, unit):
    moved = sums([*others, unit]) - sums(others)
    assert np.isfinite(moved).all()
    assert np.linalg.norm(moved) <= 1.0
    assert np.linalg.norm(moved) > 0.3  # it counts: the part of the number of units alone


@settings(max_examples=40, deadline=None)
@given(st.lists(records_of_a_unit, max_size=4), records_of_a_unit)
def test_a_unit_adds_the_same_to_whatever_others_have(others, unit):
    """To the last bit of the whole numbers that are summed: nothing of others is rounded by it."""
    grid = part_scale(PLAN) / 2**30
    alone, beside = sums([unit]) / grid, (sums([*others, unit]) - sums(others)) / grid
    assert (np.rint(beside) == np.rint(alone)).all()


@pytest.mark.parametrize("value", ODD)
def test_a_unit_of_a_thousand_records_adds_no_more_than_one_of_one(value):
    many = [example("b", "w " * (n % 90), age=value, sodium=str(n)) for n in range(1_000)]
    moved = sums([many])
    assert np.isfinite(moved).all()
    assert np.linalg.norm(moved) <= 1.0


def each_record_counts_whole(self, has):
    return np.where(has, 1 << 30, 0).astype(np.int64)


FAULTS = {
    "each record counts whole": ("_PartCounter._shares", each_record_counts_whole),
    "parts have the whole length each": ("part_scale", lambda plan: 1.0),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_counting_is_a_longer_vector(fault, monkeypatch):
    """What the tests above would see, if it were there."""
    unit = [example("b", "x y", age="110", sodium="1e15"), example("b", "x y", age="120")]
    assert np.linalg.norm(sums([unit])) <= 1.0
    name, planted = FAULTS[fault]
    monkeypatch.setattr(f"silotune.data.statistics.{name}", planted)
    moved = sums([unit])
    assert np.linalg.norm(moved) > 1.0


cells = st.one_of(
    st.sampled_from([*ODD, "a", "b", "7", "\u202e", '"', ",", "\n"]), st.text(max_size=8)
)


@settings(max_examples=25, deadline=None)
@given(rows=st.lists(st.tuples(cells, cells, cells), max_size=6))
def test_from_the_file_on_one_unit_moves_the_sum_by_a_length_of_1_at_most(rows, tmp_path_factory):
    """Through the reader, the labels that a plan takes, and the bound on a unit's records."""
    folder = tmp_path_factory.mktemp("ward")
    honest = [["a note", "gout", f"p{n}", "40"] for n in range(5)]
    odd = [[note, label, "odd", age] for note, label, age in rows]
    found = []
    for number, content in enumerate(([*honest[:3], *odd, *honest[3:]], honest)):
        write_ward(folder / str(number), content, declared=10)
        site = SiteConfig.load(folder / str(number) / "site.toml")
        records = load_records(site, COUNTED, roles=COUNTED.roles, secret=b"s" * 32)
        found.append(site_sums(records, COUNTED))
    assert np.linalg.norm(found[0] - found[1]) <= 1.0


def test_the_longest_vector_is_almost_1_so_that_no_epsilon_is_wasted():
    longest = sums([[example("b", "x", age="120", sodium="1e15")]])
    # Each part is full; a mean at its bound is, too. The margin of rounding is 2**-19.
    assert 1.0 - 1e-5 < np.linalg.norm(longest) <= 1.0


def test_each_unit_counts_once_however_many_records_it_has():
    found = counted([[example("a")] * 3 + [example("b")], [example("c")]], "labels")
    assert found == pytest.approx([0.75, 0.25, 1.0], abs=1e-5)


def test_bins_begin_at_their_edges():
    assert counted(
        [[example()] * n for n in (1, 2, 3, 5, 6, 40)], "records_a_unit"
    ) == pytest.approx([1, 1, 2, 2], abs=1e-4)
    texts = ["", "x", "x y", "x y z", "x y z w", "w " * 8]
    found = counted([[example(text=text)] for text in texts], "lengths")
    assert found == pytest.approx([2, 2, 1, 1], abs=1e-4)
    ages = [[example(age=age)] for age in ("17.9", "18", "64", "65", "-3", "300")]
    assert counted(ages, "numbers.age.histogram") == pytest.approx([2, 2, 2], abs=1e-4)


def test_a_mean_is_of_values_within_the_bounds_and_of_units_that_have_one():
    units = [[example(age="30"), example(age="90"), example()], [example(age="500")], [example()]]
    total, having = counted(units, "numbers.age.mean") * math.sqrt(2)
    assert having == pytest.approx(2, abs=1e-4)
    assert total == pytest.approx(0.0 + 1.0, abs=1e-4)  # means 60 and 120, from -1 to 1


@pytest.mark.parametrize("value", ["", "inf", "-inf", "nan", "1e999", "five", "\x00"])
def test_what_is_no_number_counts_as_missing(value):
    assert counted([[example(age=value)]], "numbers.age.mean") == pytest.approx([0, 0])
    assert counted([[example(age=value)]], "numbers.age.histogram") == pytest.approx([0, 0, 0])


def test_a_site_without_a_record_adds_nothing():
    assert (sums([]) == 0).all()


def test_the_order_of_the_records_does_not_matter_to_the_last_bit():
    rng = np.random.default_rng(1)
    units = [
        [example("abc"[rng.integers(3)], "w " * int(rng.integers(9)), age=str(rng.normal(50, 30)))]
        * int(rng.integers(1, 4))
        for _ in range(300)
    ]
    turned = [units[n] for n in rng.permutation(300)]
    assert sums(units).tobytes() == sums(turned).tobytes()


def test_a_text_that_its_tokenizer_does_not_take_has_no_length_and_spoils_no_other():
    def count(texts):
        if any("bad" in text for text in texts):
            raise ValueError("bad")
        return [len(text) for text in texts]

    units = [[example(text=text)] for text in ("xyz", "bad", "xy", "x")]
    found = statistics_layout(IN_TOKENS).unpack(
        sums(units, IN_TOKENS, count_tokens=count).astype(np.float32)
    )["lengths"]
    assert found / part_scale(IN_TOKENS) == pytest.approx([1, 2, 0, 0], abs=1e-4)
