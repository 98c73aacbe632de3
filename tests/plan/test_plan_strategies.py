"""What a strategy needs of the rest of the plan is checked, and refused with its reason."""

import inspect
import pkgutil
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest

from silotune import strategies
from silotune.cli import main
from silotune.errors import PlanInvalid
from silotune.plan.sections import AggregationSection
from silotune.plan.sections import ServerOptimizerSettings as Server
from silotune.plan.strategies import DROPPED, STRATEGIES, SUMS
from silotune.strategies.base import AdapterStrategy, RobustStrategy
from silotune.strategies.linear import LinearStrategy
from tests.strategies.contract import plan_with

EXAMPLE = Path(__file__).parents[2] / "examples" / "plan.toml"
SEVERAL = {"rounds.local_steps": 4, "optimizer.server.name": "none"}
VOTE = {"aggregation.weights": "equal"}


def test_every_strategy_of_the_table_has_a_class_that_agrees_with_it():
    for name, facts in STRATEGIES.items():
        made = strategies.method_of(SimpleNamespace(strategy=facts))
        assert issubclass(made, AdapterStrategy), name
        assert facts.linear == issubclass(made, LinearStrategy), name
        assert facts.one_vote == issubclass(made, RobustStrategy), name


def test_every_file_of_a_strategy_is_in_the_table():
    found = set()
    for info in pkgutil.iter_modules(strategies.__path__):
        module = import_module(f"silotune.strategies.{info.name}")
        for kind in vars(module).values():
            own = isinstance(kind, type) and kind.__module__ == module.__name__
            if own and issubclass(kind, AdapterStrategy) and not inspect.isabstract(kind):
                found.add(f"{info.name}:{kind.__name__}")
    named = {facts.made_by for facts in (*STRATEGIES.values(), SUMS)}
    assert found - {"linear:LinearStrategy"} == named


def test_options_in_the_table_are_keys_of_a_plan():
    options = {option for facts in STRATEGIES.values() for option in facts.options}
    assert options <= set(AggregationSection.model_fields)


def test_a_plan_is_read_without_the_libraries_behind_the_strategies():
    code = """import sys, silotune.plan.plan
found = {"torch", "flwr", "transformers", "peft"} & set(sys.modules)
sys.exit(f"imported: {found}" if found else 0)"""
    subprocess.run([sys.executable, "-c", code], check=True)


def named(name):
    key = "optimizer.server.name" if name in {"yogi", "adagrad"} else "aggregation.strategy"
    return key, {key: name}


@pytest.mark.parametrize("name", DROPPED)
def test_a_dropped_name_is_refused_with_what_to_use_instead(name):
    key, settings = named(name)
    with pytest.raises(PlanInvalid) as caught:
        plan_with(**settings)
    (line,) = [line for line in str(caught.value).splitlines() if key in line]
    assert f"{key}: '{name}' was dropped" in line
    assert line.endswith(f"use {DROPPED[name]}")


def test_what_is_to_be_used_instead_can_be_used():
    known = set(STRATEGIES) | set(get_args(Server.model_fields["name"].annotation))
    for name, instead in DROPPED.items():
        assert name not in known
        assert set(re.findall(r"'(\w+)'", instead)) <= known


@pytest.mark.parametrize("name", DROPPED)
def test_plan_check_says_that_it_was_dropped(tmp_path, name, monkeypatch, capsys):
    key, settings = named(name)
    path = tmp_path / "plan.toml"
    path.write_text(
        EXAMPLE.read_text()
        .replace(
            'strategy = "fedavg"', f'strategy = "{settings.get("aggregation.strategy", "fedavg")}"'
        )
        .replace('name = "adam"', f'name = "{settings.get("optimizer.server.name", "adam")}"')
    )
    monkeypatch.setattr(sys, "argv", ["silotune", "plan", "check", str(path)])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code != 0
    said = re.sub(r"\s+", " ", capsys.readouterr().err)
    assert f"{key}: '{name}' was dropped" in said and DROPPED[name] in said


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (
            {"strategy": "multi_krum", "selected": 3, **VOTE},
            "aggregation.byzantine: needed by strategy 'multi_krum'",
        ),
        ({"trim": 0.2}, "aggregation.trim: only for strategy 'trimmed_mean'; remove it"),
        ({"strategy": "median"}, "one vote"),
        (
            {"strategy": "multi_krum", "byzantine": 3, "selected": 3, **VOTE},
            "rounds.min_sites: strategy 'multi_krum' needs 9 sites to withstand 3, not 7",
        ),
        (
            {"strategy": "multi_krum", "byzantine": 2, "selected": 6, **VOTE},
            "aggregation.selected: at most 5",
        ),
        ({"strategy": "flexlora"}, "'flexlora' has nothing to mend"),
        ({"strategy": "scaffold"}, "no site drifts"),
        ({"optimizer.site.prox": 0.1}, "the proximal term is zero"),
        (
            {"strategy": "flexlora", **SEVERAL, "optimizer.server.name": "adam"},
            "is no step from the old one",
        ),
        ({"strategy": "scaffold", **SEVERAL}, "optimizer.site.local: must be 'sgd'"),
        (
            {"strategy": "scaffold", **SEVERAL, "rounds.sites": 7},
            "only where it was in the round before",
        ),
        ({"head": "local", "optimizer.site.head_rounds": 2}, "would have nothing to send"),
        ({"head": "local", "strategy": "flexlora", **SEVERAL}, "'flexlora' has no form that keeps"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(changes, complaint):
    settings = {
        key if "." in key else f"aggregation.{key}": value for key, value in changes.items()
    }
    with pytest.raises(PlanInvalid) as caught:
        plan_with(**settings)
    assert complaint in str(caught.value)
