"""Flower's packages one by one, for a process that lives for months and speaks no gRPC.

Flower's root package imports all others, its package of server apps brings Flower's servers, and what
they share names types of gRPC in signatures. A site's daemon uses Flower's messages alone.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec, module_from_spec
from types import ModuleType

_SKIPPED = ("flwr", "flwr.serverapp")


class _Unused(ModuleType):
    """Stands for gRPC while names of it are only written down."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return object


@contextmanager
def lean_imports() -> Iterator[None]:
    """Have what is imported meanwhile import no more of Flower than its own modules name.

    Roots of packages of which modules are used are not run, also later; gRPC is not loaded meanwhile. To
    be called before anything imports Flower, which is otherwise left as it is.
    """
    if "flwr" in sys.modules:
        yield
        return
    for name in _SKIPPED:
        if spec := find_spec(name):
            sys.modules[name] = module_from_spec(spec)
    own = {} if "grpc" in sys.modules else {"grpc": _Unused("grpc")}
    sys.modules.update(own)
    try:
        yield
    finally:
        for name in own:
            del sys.modules[name]
