"""What a strategy needs of the rest of the plan is checked, and refused with its reason."""

import pytest

from silotune.errors import PlanInvalid
from silotune.plan_strategies import NOT_LINEAR
from silotune.strategies import STRATEGIES
from tests.strategies.contract import plan_with

SEVERAL = {"rounds.local_steps": 4, "optimizer.server.name": "none"}
VOTE = {"aggregation.weights": "equal"}


def test_the_plan_and_the_strategies_agree_on_which_are_linear():
    assert {name for name, found in STRATEGIES.items() if not found.linear} == set(NOT_LINEAR)


def test_every_strategy_has_a_page_of_facts_at_its_head():
    for found in STRATEGIES.values():
        text = __import__(found.__module__, fromlist=["x"]).__doc__
        for heading in ("Good for", "Bytes", "Linear", "Privacy", "Head"):
            assert f"\n{heading}\n    " in text, (found.__module__, heading)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"strategy": "krum", **VOTE}, "aggregation.byzantine: needed by strategy 'krum'"),
        ({"trim": 0.2}, "aggregation.trim: only for strategy 'trimmed_mean'; remove it"),
        ({"strategy": "median"}, "one vote"),
        (
            {"strategy": "bulyan", "byzantine": 2, **VOTE},
            "rounds.min_sites: strategy 'bulyan' needs 11 sites to withstand 2, not 7",
        ),
        (
            {"strategy": "multi_krum", "byzantine": 2, "selected": 6, **VOTE},
            "aggregation.selected: at most 5",
        ),
        ({"strategy": "fedex"}, "'fedex' has nothing to mend"),
        ({"strategy": "scaffold"}, "no site drifts"),
        ({"optimizer.site.prox": 0.1}, "the proximal term is zero"),
        (
            {"strategy": "flora", **SEVERAL, "optimizer.server.name": "adam"},
            "is no step from the old one",
        ),
        ({"strategy": "scaffold", **SEVERAL}, "optimizer.site.local: must be 'sgd'"),
        ({"head": "local", "optimizer.site.head_rounds": 2}, "would have nothing to send"),
        ({"head": "local", "strategy": "flora", **SEVERAL}, "'flora' has no form that keeps"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(changes, complaint):
    settings = {
        key if "." in key else f"aggregation.{key}": value for key, value in changes.items()
    }
    with pytest.raises(PlanInvalid) as caught:
        plan_with(**settings)
    assert complaint in str(caught.value)
