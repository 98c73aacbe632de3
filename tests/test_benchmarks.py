"""Benchmarks are for scripts too: with --json the last line of each is one JSON object."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
COMMANDS = sorted(
    path.name for path in FOLDER.glob("*.py") if "parser.add_argument" in path.read_text()
)


def calls(tree, name):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == name:
            yield node


def last_object(*command):
    out = subprocess.run(
        [sys.executable, *command, "--json"], capture_output=True, text=True, check=True
    )
    return json.loads(out.stdout.splitlines()[-1])


def test_there_are_benchmarks_to_look_at():
    assert {"accuracy.py", "aggregation.py", "deployment.py", "monitoring.py"} <= set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_each_offers_json_and_prints_it_on_one_line_and_last(name):
    tree = ast.parse((FOLDER / name).read_text())
    options = [call.args[0].value for call in calls(tree, "parser.add_argument")]
    assert "--json" in options
    (main,) = (node for node in tree.body if getattr(node, "name", "") == "main")
    prints = list(calls(main, "print"))
    (told,) = (p for p in prints if p.args and ast.unparse(p.args[0]).startswith("json.dumps"))
    assert not told.args[0].keywords or all(k.arg != "indent" for k in told.args[0].keywords)
    (asked,) = (
        node
        for node in ast.walk(main)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith(".json")
    )
    after = max(p.lineno for p in prints) > told.lineno
    returns = any(isinstance(node, ast.Return) for node in asked.body)
    assert returns or not after, "something is printed after the JSON"


def test_one_that_is_short_does_so():
    found = last_object(FOLDER / "aggregation.py", "--quick", "--strategies", "fedavg")
    assert found["fedavg.fold_over_float32"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_every_one_does_so(name):
    assert isinstance(last_object(FOLDER / name, "--quick"), dict)
