"""Each strategy's file says what its reader has to know before choosing it."""

import ast
import inspect
import re
from importlib import import_module

import pytest

from silotune.plan.strategies import STRATEGIES
from silotune.strategies.linear import LinearStrategy

HEADINGS = ("Good for", "Bytes", "Linear", "Privacy", "Head")


@pytest.mark.parametrize("name", STRATEGIES)
def test_it_names_paper_use_bytes_linearity_privacy_and_head(name):
    module, kind = STRATEGIES[name].made_by.split(":")
    found = import_module(f"silotune.strategies.{module}")
    said = ast.get_docstring(ast.parse(inspect.getsource(found))) or ""
    assert re.search(r"\b20[12]\d\b", said), "no paper"
    sections = re.findall(r"^(\w[\w ]*)\n    \S", said, re.MULTILINE)
    assert [heading for heading in sections if heading in HEADINGS] == list(HEADINGS)
    linear = re.search(r"^Linear\n    (Yes|No)\b", said, re.MULTILINE)
    assert linear is not None
    assert (linear[1] == "Yes") == STRATEGIES[name].linear
    assert STRATEGIES[name].linear == issubclass(getattr(found, kind), LinearStrategy)
