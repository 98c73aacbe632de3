from __future__ import annotations

import re
import tomllib
from pathlib import Path

from silotune.data.site import SiteConfig
from silotune.plan.explain import key_paths
from silotune.plan.plan import Plan
from silotune.plan.sections import VotedPlan
from silotune.plan.statistics import NumberSection

EXAMPLES = Path(__file__).parents[2] / "examples"
_TABLE = re.compile(r"(?:# )?\[([\w.]+)\]$")
_SETTING = re.compile(r"(?:# )?([a-z_0-9]+) = (.+)$")
_PROSE = re.compile(r"# [A-Z\"]")


def mentioned(path: Path) -> dict[str, str]:
    """Every ``key = value`` of a file, also those behind ``# ``, by dotted path."""
    table, found = "", {}
    for line in path.read_text().splitlines():
        if heading := _TABLE.match(line):
            table = heading[1] + "."
            found[heading[1]] = line
        elif setting := _SETTING.match(line):
            found[table + setting[1]] = setting[2]
    return found


def test_the_example_plan_mentions_every_key_and_no_other():
    keys = set(mentioned(EXAMPLES / "plan.toml")) | {"optimizer"}
    inline = set(key_paths(NumberSection, "statistics.numbers.NAME."))  # of a table in one line
    # Of the plan that a vote is on, each section is in one line, and its keys are explained above.
    inline |= {key for key in key_paths(VotedPlan, "vote.plan.") if key.count(".") > 2}
    assert keys == set(key_paths(Plan)) - inline
    (numbers,) = tomllib.loads(
        f"n = {mentioned(EXAMPLES / 'plan.toml')['statistics.numbers']}"
    ).values()
    assert {key for table in numbers.values() for key in table} == set(NumberSection.model_fields)


def test_the_example_of_statistics_is_a_valid_plan():
    assert Plan.load(EXAMPLES / "statistics.toml").statistics is not None


def test_the_example_site_mentions_every_key_and_no_other():
    found = {
        re.sub(r"^datasets\.\w+", "datasets.NAME", key) for key in mentioned(EXAMPLES / "site.toml")
    }
    assert {key for key in found if key != "datasets.NAME"} | {"datasets"} == set(
        key_paths(SiteConfig)
    )


def test_the_examples_are_valid_and_fit_each_other():
    plan = Plan.load(EXAMPLES / "plan.toml")
    site = SiteConfig.load(EXAMPLES / "site.toml")
    assert set(site.dataset(plan.data.dataset).columns.by_role()) >= {"text", "label"}


def test_settings_that_are_commented_out_are_valid_toml():
    for name in ("plan.toml", "site.toml"):
        for key, value in mentioned(EXAMPLES / name).items():
            assert value.lstrip("# ").startswith("[") or tomllib.loads(f"key = {value}"), key


def test_every_key_is_explained_where_it_first_occurs():
    for name in ("plan.toml", "site.toml"):
        explained: set[str] = set()
        for block in (EXAMPLES / name).read_text().split("\n\n"):
            lines = block.splitlines()
            keys = {match[1] for line in lines if (match := _SETTING.match(line))}
            assert keys <= explained or any(_PROSE.match(line) for line in lines), keys
            explained |= keys
