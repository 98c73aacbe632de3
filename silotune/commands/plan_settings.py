"""``--set key=value``: plan settings from the command line."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from silotune.errors import PlanInvalid

Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="Replace a plan setting, e.g. --set privacy.epsilon=3"),
]


def parsed(settings: Sequence[str]) -> dict[str, Any]:
    """``key=value`` with values as TOML; an empty value removes the key. Raises `PlanInvalid`."""
    found: dict[str, Any] = {}
    for setting in settings:
        key, sign, text = setting.partition("=")
        if not sign or not key:
            raise PlanInvalid(f"--set {setting}: expected key=value")
        try:
            found[key] = tomllib.loads(f"value = {text}")["value"] if text else None
        except tomllib.TOMLDecodeError:
            found[key] = text  # a bare word is a string
    return found
