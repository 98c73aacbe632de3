"""Validation problems in words: the key's path, what was expected, and the nearest valid key.

One function for every TOML file that silotune reads (plan.toml, site.toml), so that all of them
complain alike. A value is quoted back only when its field can't hold a secret.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, SecretStr, ValidationError
from pydantic_core import ErrorDetails

# These messages say all there is to say; the rejected input is a whole table or a key's name.
_SAID_WITHOUT_VALUE = frozenset({"extra_forbidden", "missing", "value_error"})

_PATTERNS = {
    r"^[a-z0-9][a-z0-9_-]{0,62}$": "lower-case letters, digits, '-' and '_', 63 at most",
    r"^[0-9a-f]{64}$": "a SHA-256 of 64 hexadecimal digits",
    r"^(auto|cpu|cuda(:\d+)?)$": "auto, cpu, cuda or cuda:N",
    r"^[A-Za-z_][A-Za-z0-9_]*$": "the name of an environment variable",
}


def explain(error: ValidationError, root: type[BaseModel]) -> list[str]:
    """Every problem of a failed validation as lines of text.

    Parameters
    ----------
    error : ValidationError
        What pydantic raised.
    root : type of BaseModel
        The model that was validated; valid keys are looked up in it.

    Returns
    -------
    list of str
        One line a problem, ``path: what was expected``. Values of `SecretStr` fields are never
        quoted.
    """
    wrong: dict[str, list[str]] = {}
    given: dict[str, str] = {}
    for problem in error.errors():
        place = _locate(problem, root)
        path = ".".join(place.path)
        wrong.setdefault(path, []).extend(_complaints(problem, place, root))
        given.setdefault(path, _quoted(problem, place))
    # A union reports every member; where one of them got further in, its report is the useful one.
    deepest = [path for path in wrong if not any(other.startswith(f"{path}.") for other in wrong)]
    return [line for path in deepest for line in _join(path, wrong[path], given[path])]


@dataclass(frozen=True)
class _Place:
    """Where a problem is: its path in the file, the tables and the type found there."""

    path: tuple[str, ...]
    tables: tuple[type[BaseModel], ...]
    kind: Any


def _complaints(problem: ErrorDetails, place: _Place, root: type[BaseModel]) -> list[str]:
    if problem["type"] == "extra_forbidden":
        return [f"unknown key{_nearest(place, root)}"]
    if problem["type"] == "missing":
        return ["missing, and it has no default"]
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"]).split("\n")
    if problem["type"] == "string_pattern_mismatch":
        pattern = problem["ctx"]["pattern"]
        return [f"expected {_PATTERNS.get(pattern, f'a text that fits {pattern}')}"]
    if problem["type"] == "too_short":
        length = problem["ctx"]
        return [f"expected at least {length['min_length']} items, got {length['actual_length']}"]
    said = problem["msg"].removeprefix("Input should be ")
    return ["expected " + said.replace("an object", "a table").replace("a valid array", "a list")]


def _quoted(problem: ErrorDetails, place: _Place) -> str:
    given = problem.get("input")
    plain = isinstance(given, (str, int, float, bool))
    if not plain or problem["type"] in _SAID_WITHOUT_VALUE or SecretStr in set(_parts(place.kind)):
        return ""
    return f", got {given!r}"


def _join(path: str, complaints: list[str], given: str) -> list[str]:
    """One line a complaint; the alternatives of a union become one line."""
    expected = [c for c in complaints if c.startswith("expected ")]
    others = [c for c in complaints if not c.startswith("expected ")]
    if expected:
        rest = [c.removeprefix("expected ") for c in expected[1:]]
        others.append(" or ".join([expected[0], *rest]) + given)
    return [f"{path}: {c}" if path else c for c in others]


def _locate(problem: ErrorDetails, root: type[BaseModel]) -> _Place:
    """Follow a pydantic location through the models, leaving out its marks for union members."""
    path: list[str] = []
    tables: tuple[type[BaseModel], ...] = (root,)
    kind: Any = root
    location = problem["loc"]
    for index, part in enumerate(location):
        last = index == len(location) - 1
        fields = [t.model_fields[part] for t in tables if part in t.model_fields]
        if fields:
            kind = fields[0].annotation
        elif last and problem["type"] == "extra_forbidden":
            path.append(str(part))
            break
        elif not tables and (inner := _values(kind, int if isinstance(part, int) else str)):
            kind = inner
        else:
            continue  # the mark of a union's member, no key of the file
        path.append(str(part))
        if not (last and problem["type"] == "missing"):
            tables = tuple(p for p in _parts(kind) if _is_model(p))
    return _Place(tuple(path), tables, kind)


def _parts(kind: Any) -> Iterator[Any]:
    """The members of a union, or the type itself."""
    if get_origin(kind) in (Union, types.UnionType):
        for member in get_args(kind):
            yield from _parts(member)
    else:
        yield kind


def _values(kind: Any, key: type[int] | type[str]) -> Any | None:
    """What a sequence holds (found by an int) or a mapping holds (found by a str)."""
    for part in _parts(kind):
        origin, inner = get_origin(part), get_args(part)
        if key is int and origin in (tuple, list):
            return inner[0]
        if key is str and origin is dict:
            return inner[1]
    return None


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _nearest(place: _Place, root: type[BaseModel]) -> str:
    here = sorted({name for table in place.tables for name in table.model_fields})
    wanted = place.path[-1]
    near = difflib.get_close_matches(wanted, here, n=1)
    if not near:
        # Of a plan within a plan the outer one's keys are meant: the shallowest is put in last.
        paths = sorted(key_paths(root), key=lambda key: -key.count("."))
        elsewhere = {key.rsplit(".", 1)[-1]: key for key in paths}
        near = [elsewhere[m] for m in difflib.get_close_matches(wanted, list(elsewhere), n=1)]
    return f"; did you mean {near[0]!r}?" if near else "; known here: " + ", ".join(here)


def key_paths(root: type[BaseModel], prefix: str = "") -> list[str]:
    """Every key of a model as a dotted path; ``NAME`` stands for the keys of a mapping."""
    keys = []
    for name, field in root.model_fields.items():
        path = prefix + name
        keys.append(path)
        for part in _parts(field.annotation):
            values = _values(part, str)
            if _is_model(part):
                keys += key_paths(part, f"{path}.")
            elif values is not None and _is_model(values):
                keys += key_paths(values, f"{path}.NAME.")
    return keys
