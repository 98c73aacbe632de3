"""Paths into a nested record: ``code.coding[system=http://loinc.org].code``.

A step is a key. Where a list stands, each of its members is searched, so that a path needs no numbers.
What stands in brackets picks among them: ``[KEY=VALUE]``, where KEY is a path of keys, VALUE may be
several (``E10|E11``), and a ``*`` at the end of one means whatever begins so (``E11*``).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

_STEP = re.compile(r"(?P<key>[^.\[\]=]+)(?P<picks>(?:\[[^\[\]=]+=[^\[\]]+\])*)(?:\.|$)")
_PICK = re.compile(r"\[([^\[\]=]+)=([^\[\]]+)\]")
_SCALAR = (str, int, float)


@dataclass(frozen=True)
class _Pick:
    """Lets a member pass whose value at `keys` is one of some, or begins so."""

    keys: tuple[str, ...]
    values: frozenset[str]
    beginnings: tuple[str, ...]

    def lets(self, member: Any) -> bool:
        found = [member]
        for key in self.keys:
            found = _below(found, key)
        texts = map(text_of_scalar, found)
        return any(text in self.values or text.startswith(self.beginnings) for text in texts)


@dataclass(frozen=True)
class FieldPath:
    """Where in a nested record a value stands. Make it with `parse`."""

    text: str
    steps: tuple[tuple[str, tuple[_Pick, ...]], ...]

    @classmethod
    def parse(cls, text: str) -> FieldPath:
        """Read a path. Raises `ValueError`, whose message quotes it: it is the site's own word."""
        steps, at = [], 0
        while at < len(text):
            match = _STEP.match(text, at)
            if match is None or (match.end() == len(text) and text.endswith(".")):
                raise ValueError(f"{text!r} is no path such as code.coding[system=URL].code")
            steps.append((match["key"], tuple(map(_pick, _PICK.findall(match["picks"])))))
            at = match.end()
        if not steps:
            raise ValueError("a path needs a key")
        return cls(text, tuple(steps))

    def all(self, record: Any) -> list[Any]:
        """Everything that stands there, in order: texts, numbers and objects."""
        found = [record]
        for key, picks in self.steps:
            found = _below(found, key)
            for pick in picks:
                found = [member for member in found if pick.lets(member)]
        return found

    def first(self, record: Any) -> Any:
        """The first plain value (text, number, bool) that stands there; None if there is none."""
        return next((value for value in self.all(record) if isinstance(value, _SCALAR)), None)


def text_of_scalar(value: Any) -> str:
    """A text, number or truth as text; the empty text for anything else."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value) if isinstance(value, _SCALAR) else ""


def _pick(found: tuple[str, str]) -> _Pick:
    keys, values = found[0].split("."), found[1].split("|")
    beginnings = tuple(value[:-1] for value in values if value.endswith("*"))
    return _Pick(tuple(keys), frozenset(v for v in values if not v.endswith("*")), beginnings)


def _below(holders: list[Any], key: str) -> list[Any]:
    """What the objects among some values have under a key; of a list, its members."""
    found: list[Any] = []
    for holder in holders:
        if isinstance(holder, dict):
            value = holder.get(key)
            if isinstance(value, list):
                found.extend(member for member in value if member is not None)
            elif value is not None:
                found.append(value)
    return found
