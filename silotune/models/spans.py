"""Spans of a text: where in it something is, and what it is.

A span's `start` and `end` count characters (Unicode code points, as Python does) from 0; `end` is behind
the last one. A record's spans are handed on as text: JSON without spaces, in the order of the text.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import NamedTuple


class TextSpan(NamedTuple):
    """A part of a text and its label."""

    start: int
    end: int
    label: str


def written(spans: Iterable[TextSpan]) -> str:
    """The one text of some spans."""
    listed = [span._asdict() for span in sorted(spans)]
    return json.dumps(listed, ensure_ascii=False, separators=(",", ":"))


def spans_in(text: str) -> list[TextSpan]:
    """The spans that `written` wrote."""
    return [TextSpan(one["start"], one["end"], one["label"]) for one in json.loads(text)]
