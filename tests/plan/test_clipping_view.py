"""Whatever form a plan gives its clipping norms in, everybody reads one view of them."""

import ast
from pathlib import Path

import pytest

import silotune
from silotune.plan.plan import Plan
from silotune.plan.sections import ClipBound
from tests.plan.test_plan_words import BASE

ONE, TWO = 0.5, {"head": 1.0, "adapter": 0.25, "head_share": 0.2}
RECORD = {"privacy.mode": "record", "privacy.epsilon": 4.0, "privacy.delta": 1e-5}
SITE = {**RECORD, "privacy.mode": "site", "rounds.local_steps": 4, "aggregation.weights": "equal"}


def view(clip, **changes):
    return Plan.from_mapping(BASE).override({**RECORD, "privacy.clip": clip, **changes})


def test_one_norm_is_that_of_every_part():
    found = view(ONE).privacy.clipping
    assert found.bounds == {"all": ClipBound(0.5, 1.0)}
    assert (found.norm, found.grouped, found.adapts) == (0.5, False, False)
    assert {part: found.of(part) for part in ("A", "B", "head")} == dict.fromkeys(
        ("A", "B", "head"), ClipBound(0.5, 1.0)
    )


def test_groups_share_one_sensitivity():
    found = view(TWO).privacy.clipping
    assert found.grouped
    assert found.of("head") == ClipBound(1.0, 0.2)
    assert found.of("A") == found.of("B") == found.bounds["adapter"] == ClipBound(0.25, 0.8)
    assert sum(bound.share for bound in found.bounds.values()) == 1.0


@pytest.mark.parametrize(("quantile", "adapts"), [(None, False), (0.5, True)])
def test_the_norm_of_whole_sites_is_where_it_starts(quantile, adapts):
    site = {"noise": "coordinator"} | ({} if quantile is None else {"quantile": quantile})
    found = view(ONE, **{**SITE, "privacy.site": site}).privacy.clipping
    assert (found.norm, found.adapts) == (0.5, adapts)


def test_without_privacy_there_is_nothing_to_clip_to():
    nothing = dict.fromkeys(("privacy.epsilon", "privacy.delta", "privacy.clip"))
    plan = view(ONE).override({**nothing, "privacy.mode": "none"})
    assert plan.privacy.clipping.bounds == {}


def test_the_form_that_a_plan_has_is_asked_about_in_one_place():
    asking = set()
    for path in Path(silotune.__file__).parent.rglob("*.py"):
        names = {
            node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)
        }
        asking |= {path.name} if "Clip" in names else set()
    assert asking == {"sections.py"}
