"""Each strategy's file says what its reader has to know before choosing it."""

import ast
import inspect
import re
import sys

import pytest

from silotune.strategies import STRATEGIES

HEADINGS = ("Good for", "Bytes", "Linear", "Privacy", "Head")


@pytest.mark.parametrize("name", STRATEGIES)
def test_it_names_paper_use_bytes_linearity_privacy_and_head(name):
    method = STRATEGIES[name]
    said = ast.get_docstring(ast.parse(inspect.getsource(sys.modules[method.__module__]))) or ""
    assert re.search(r"\b20[12]\d\b", said), "no paper"
    sections = re.findall(r"^(\w[\w ]*)\n    \S", said, re.MULTILINE)
    assert [heading for heading in sections if heading in HEADINGS] == list(HEADINGS)
    linear = re.search(r"^Linear\n    (Yes|No)\b", said, re.MULTILINE)
    assert linear is not None
    assert (linear[1] == "Yes") == method.linear
