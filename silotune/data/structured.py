"""Roles whose value is a list: what it may look like in a source, and the one text it becomes.

In JSON, JSON lines, Parquet and Arrow the list may stand in the record; in a cell of any source it may
be JSON text. Either way numbers may be written as text, keys that are not asked for don't count, and an
object of lists (as ``datasets`` writes a list of objects) is the list of objects that it stands for.
What a plan sees is JSON without spaces and with its keys in one order, so that the same record is the
same text wherever a site keeps it.

Words and tags become a text and its spans here: the words with a space between each two, and what the
tags (IOB1, IOB2, BIOES, BILOU, or bare labels) mark in it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from silotune.data.json_records import decoder
from silotune.data.values import NEWEST, encodable
from silotune.models.spans import TextSpan, written
from silotune.plan.chat import ROLES

Naming = Callable[[str], str | None]
"""The plan's name of a label; "" where the site wants none of it, None where it is unknown."""

UNKNOWN = "a span whose label is not one of model.labels"
UNKNOWN_LABEL = "a label that is not one of model.labels"

_PREFIXES = frozenset("BIESLU")
_OUTSIDE = "O"


class Unfit(ValueError):
    """A value that is not what its role asks for.

    Attributes
    ----------
    problem : str
        What is wrong, without any of the value.
    label : str
        The label that it is about, if it is one.
    """

    def __init__(self, problem: str, label: str = "") -> None:
        super().__init__(problem)
        self.problem, self.label = problem, label


def spans_text(value: str, text: str, name: Naming) -> str:
    """The one text of the spans of a text.

    Parameters
    ----------
    value : str
        JSON: a list of objects with start, end and label, or of lists of these three.
    text : str
        What they are in, as the source has it. Spaces around it are nobody's text afterwards, and
        spans are counted anew.
    name : callable
        Names their labels.

    Raises
    ------
    Unfit
        It is no such list, or a span is empty, ends beyond the text, overlaps another, or has an
        unknown label.
    """
    problem = "no list of start, end and label"
    cut = len(text) - len(text.lstrip())
    found = []
    for start, end, label in _members(value, ("start", "end", "label"), problem):
        first, last = _whole(start, problem), _whole(end, problem)
        if not 0 <= first < last <= len(text):
            raise Unfit("a span that is empty, or not within the text")
        inside = text[first:last]
        first += len(inside) - len(inside.lstrip())
        last -= len(inside) - len(inside.rstrip())
        if first >= last:
            raise Unfit("a span that is empty, or not within the text")
        if called := _called(_string(label, problem), name):
            found.append(TextSpan(first - cut, last - cut, called))
    found.sort()
    if any(one.end > other.start for one, other in pairwise(found)):
        raise Unfit("spans that overlap")
    return written(found)


def words_text(words: str, tags: str | None, name: Naming) -> Sequence[str]:
    """A text of words, and the one text of the spans that tags mark in it, if there are tags.

    Raises
    ------
    Unfit
        One is no list of texts, they are not equally many, or a label is unknown.
    """
    listed = [_string(word, _NO_TEXTS).strip() for word in _list(words, _NO_TEXTS)]
    text = " ".join(filter(None, listed))
    if tags is None:
        return (text,)
    marks = [_string(tag, _NO_TEXTS).strip() for tag in _list(tags, _NO_TEXTS)]
    if len(marks) != len(listed):
        raise Unfit("not one tag for each word")
    found: list[TextSpan] = []
    at, open_as = 0, ""
    for word, mark in zip(listed, marks, strict=True):
        if not word:
            continue
        prefix, label = _parts(mark)
        called = _called(label, name) if label else ""
        if called and called == open_as and prefix not in "BSU":
            found[-1] = found[-1]._replace(end=at + len(word))
        elif called:
            found.append(TextSpan(at, at + len(word), called))
        open_as = "" if prefix in tuple("ELSU") else called
        at += len(word) + 1
    return text, written(found)


def labels_text(value: str, separator: str | None, name: Naming) -> str:
    """The one text of a record's labels: a JSON list of the plan's names, each once, sorted.

    Parameters
    ----------
    value : str
        A JSON list of texts, or texts between separators.
    separator : str or None
        What stands between two labels; None where a text is one label.
    name : callable
        Names them; one that becomes "" does not count.

    Raises
    ------
    Unfit
        It is no such list, or has an unknown label.
    """
    if value.startswith("["):
        listed = [_string(label, _NO_TEXTS) for label in _list(value, _NO_TEXTS)]
    else:
        listed = value.split(separator) if separator is not None else [value]
    found = set()
    for label in filter(None, map(str.strip, listed)):
        if (called := name(label)) is None:
            raise Unfit(UNKNOWN_LABEL, label)
        found.add(called)
    return json.dumps(sorted(found - {""}), ensure_ascii=False, separators=(",", ":"))


def messages_text(value: str) -> str:
    """The one text of a chat: objects of role and content, in their order.

    Raises
    ------
    Unfit
        It is no list of such, has none, or one whose role is unknown.
    """
    problem = "no list of role and content"
    listed = [
        {"role": _string(role, problem), "content": _string(content, problem)}
        for role, content in _members(value, ("role", "content"), problem)
    ]
    if not listed:
        raise Unfit(problem)
    if any(turn["role"] not in ROLES for turn in listed):
        raise Unfit(f"a turn whose role is none of {', '.join(ROLES)}")
    return json.dumps(listed, ensure_ascii=False, separators=(",", ":"))


_NO_TEXTS = "no list of texts"
_WHOLE = re.compile(r"[0-9]{1,15}")


def _loaded(value: str, problem: str) -> Any:
    try:
        return decoder(NEWEST).decode(value)
    except (ValueError, RecursionError):
        raise Unfit(problem) from None


def _list(value: str, problem: str) -> list[Any]:
    found = _loaded(value, problem)
    if not isinstance(found, list):
        raise Unfit(problem)
    return found


def _members(value: str, keys: Sequence[str], problem: str) -> list[tuple[Any, ...]]:
    """What the members of a list have under some keys."""
    found = _loaded(value, problem)
    if isinstance(found, dict):  # an object of lists
        columns = [column for key in keys if isinstance(column := found.get(key), list)]
        if len(columns) != len(keys) or len({*map(len, columns)}) != 1:
            raise Unfit(problem)
        return [*zip(*columns, strict=True)]
    members: list[tuple[Any, ...]] = []
    for member in found if isinstance(found, list) else [None]:
        if isinstance(member, dict):
            members.append(tuple(member.get(key) for key in keys))
        elif isinstance(member, list) and len(member) == len(keys):
            members.append(tuple(member))
        else:
            raise Unfit(problem)
    return members


def _string(value: Any, problem: str) -> str:
    if not isinstance(value, str):
        raise Unfit(problem)
    # JSON in a cell can spell what has no UTF-8 form, as JSON of a file can.
    if not encodable(value):
        raise Unfit("not plain text")
    return value


def _whole(value: Any, problem: str) -> int:
    """A number that is written as text, as the decoder gives it."""
    if not isinstance(value, str) or _WHOLE.fullmatch(value) is None:
        raise Unfit(problem)
    return int(value)


def _parts(tag: str) -> tuple[str, str]:
    """Prefix and label of a tag; both empty outside of all entities."""
    if tag in {_OUTSIDE, ""}:
        return "", ""
    prefix, sign, label = tag.partition("-")
    return (prefix, label) if sign and prefix in _PREFIXES else ("I", tag)


def _called(label: str, name: Naming) -> str:
    called = name(label)
    if called is None:
        raise Unfit(UNKNOWN, label)
    return called
