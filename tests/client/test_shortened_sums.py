"""How long a site believes a sum of clipped gradients may be: no honest trainer's is ever shortened."""

import math

import numpy as np
import pytest
from scipy.stats import binom

from silotune.client.terms import shortened_sums
from silotune.models.layout import Span
from silotune.plan.counted import part_scale
from silotune.plan.plan import Plan
from silotune.plan.voted import blocks_at
from tests.vote_sites import trained, voting

UNITS = 5000
SPANS = (Span("A", 0, 40), Span("B", 40, 100), Span("head", 100, 130))
CLIPS = {"one norm": {"clip": 1.5}, "by group": {"clip": {"adapter": 0.5, "head": 2.0}}}


def plan_of(*, expected, clip):
    return Plan.from_mapping(
        {
            "plan": {"name": "sums", "purpose": "test"},
            "model": {"base": "nowhere", "task": "text_classification", "labels": ["a", "b"]},
            "data": {"dataset": "notes"},
            "rounds": {"number": 3},
            "privacy": {"mode": "record", "epsilon": 8.0, "delta": 1e-6, "batch": expected, **clip},
        }
    )


def sums_of(plan, units):
    """The longest that so many units can come to: all of them at their clip norms, one way."""
    rng, norms = np.random.default_rng(units), {}
    flat = rng.normal(size=sum(span.size for span in SPANS))
    groups = np.repeat(
        [plan.privacy.clipping.group(s.part) for s in SPANS], [s.size for s in SPANS]
    )
    for group in set(groups):
        norms[group] = units * plan.privacy.clipping.bounds[group].norm
        flat[groups == group] *= norms[group] / np.linalg.norm(flat[groups == group])
    return flat, groups, norms


@pytest.mark.parametrize("clip", CLIPS.values(), ids=CLIPS)
@pytest.mark.parametrize("expected", [1, 4, 32, 256, 2000])
def test_what_an_honest_trainer_sums_up_stays_as_it_is_to_the_bit(expected, clip):
    """False alarms of one step: under 1e-14, were all its units' gradients as long as they may be."""
    plan = plan_of(expected=expected, clip=clip)
    most = int(binom.isf(1e-14, UNITS, plan.rate_for(UNITS)))
    sums, _, _ = sums_of(plan, most)
    assert (
        shortened_sums(plan, sums.copy(), SPANS, declared_units=UNITS).tobytes() == sums.tobytes()
    )


@pytest.mark.parametrize("clip", CLIPS.values(), ids=CLIPS)
def test_what_no_trainer_can_have_summed_up_is_shortened_and_keeps_its_direction(clip):
    plan = plan_of(expected=32, clip=clip)
    sums, groups, norms = sums_of(plan, UNITS)
    found = shortened_sums(plan, sums.copy(), SPANS, declared_units=UNITS)
    for group, norm in norms.items():
        here, there = found[groups == group], sums[groups == group]
        assert np.linalg.norm(here) < 0.1 * norm
        assert math.isclose(here @ there, np.linalg.norm(here) * norm, rel_tol=1e-12)


def test_votes_are_no_longer_than_of_all_blocks_and_true_ones_stay_to_the_bit():
    plan = voting(trained())
    span, blocks = (Span("votes", 0, 3),), blocks_at(plan, UNITS)
    unanimous = np.array([blocks * part_scale(plan), 0.0, 0.0])
    kept = shortened_sums(plan, unanimous.copy(), span, declared_units=UNITS)
    assert kept.tobytes() == unanimous.tobytes()
    lie = shortened_sums(plan, np.array([-UNITS, 0.0, UNITS]), span, declared_units=UNITS)
    assert np.linalg.norm(lie) == pytest.approx(blocks)
