"""Explanations of records on one page, for the site's own people: each token shaded by what it adds.

The page is one file that fetches nothing and runs no script. It shows records, so it says at the head
that it is not for sharing. What a token adds stands under it as a number, and its sign also in the line
under the word: nobody has to tell colours apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from silotune.inference.explanation import Explanation
from silotune.report.report import fill
from silotune.report.verdict import printable, signed

_SHADES = 4
_SPACE = "\N{OPEN BOX}"  # of a token that is nothing else


@dataclass(frozen=True, kw_only=True)
class ExplainedRecord:
    """One record with its explanation; `name` is where it is from."""

    name: str
    found: Explanation


def render_explanations(records: Sequence[ExplainedRecord], *, plan: str) -> str:
    """The page as text; everything that is not ours is escaped by Jinja."""
    shown = [
        {"name": printable(one.name), "found": one.found, "tokens": _tokens(one.found)}
        for one in records
    ]
    return fill("explanation.html", plan=plan, records=shown, shades=range(1, _SHADES + 1))


def _tokens(found: Explanation) -> list[tuple[str, str, str]]:
    """Of each token the word, the class of its shade, and what it adds."""
    most = max((abs(part) for _, part in found.tokens), default=0.0) or 1.0
    return [
        (
            printable(word.strip()) or _SPACE,
            _shade(part / most),
            signed(part),
        )
        for word, part in found.tokens
    ]


def _shade(part: float) -> str:
    strength = round(abs(part) * _SHADES)
    return f"{'for' if part > 0 else 'against'} s{strength}" if strength else ""
