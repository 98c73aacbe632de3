"""The admin API's messages and stubs, compiled from ``control.proto`` when they are first needed.

grpcio's own run-time compiler (`grpc.protos_and_services`) does it in memory in some 50 ms: there is no
generated code to commit, to ship in a wheel, or to fall out of step with the ``.proto``, which lies in
the package as data.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc

_ROOT = Path(__file__).parents[3]
_PROTO = str(Path(__file__).with_name("control.proto").relative_to(_ROOT))

SERVICE = "silotune.admin.v1.Control"
"""Full name of the service."""


@lru_cache(maxsize=1)
def compiled() -> tuple[ModuleType, ModuleType]:
    """The module of the messages, and that of stub, servicer and registration."""
    # The compiler looks for files along sys.path, where an editable installation need not be.
    sys.path.append(str(_ROOT))
    try:
        found: tuple[Any, Any] = grpc.protos_and_services(_PROTO)
    finally:
        sys.path.remove(str(_ROOT))
    return found
