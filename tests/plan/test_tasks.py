"""The table of tasks: each is known to the models, and nothing in the package asks for one by name."""

import ast
from pathlib import Path

import pytest

import silotune
from silotune.models import scores
from silotune.models.tasks import _TASKS
from silotune.plan.tasks import METRICS, TASKS

PACKAGE = Path(silotune.__file__).parent


def test_both_tables_have_the_same_tasks_in_one_order():
    assert [*_TASKS] == [*TASKS]


@pytest.mark.parametrize("facts", TASKS.values(), ids=[*TASKS])
def test_what_a_task_needs_holds_together(facts):
    assert {*facts.reads, facts.target} <= facts.roles
    assert facts.counts in scores._KINDS
    assert facts.has_head or not facts.pools
    assert facts.metrics[0] in METRICS


@pytest.mark.parametrize("page", ["README.md", "docs/plans.md"])
def test_every_task_is_named_where_a_reader_looks(page):
    text = (PACKAGE.parent / page).read_text()
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {
        name for name in (*TASKS, "statistics") if not any(f"`{name}`" in r for r in rows)
    } == set()


def test_no_code_compares_a_task_by_its_name():
    """A branch on a name is one that the next task falls through."""
    found = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            sides = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
            if any(isinstance(side, ast.Constant) and side.value in TASKS for side in sides):
                found.append(f"{path.relative_to(PACKAGE)}:{node.lineno}")
    assert found == []
