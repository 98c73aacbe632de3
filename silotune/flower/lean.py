"""Flower's packages one by one: its root package imports all of them, apps and servers included."""

from __future__ import annotations

import sys
from importlib.util import find_spec, module_from_spec


def skip_root() -> None:
    """Have Flower's packages found without its root being run, which loads what a site never uses.

    To be called before anything imports Flower. It is for a process that lives for months.
    """
    spec = find_spec("flwr")
    if "flwr" not in sys.modules and spec is not None:
        sys.modules["flwr"] = module_from_spec(spec)
