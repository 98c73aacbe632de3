"""One value, one text: what a value of any source is as text.

Sources disagree about one and the same table. A number column with a gap in it is written by pandas as
``1001.0`` into CSV, by Spark as ``1.0E7``, and is a float in Parquet; ``true`` is ``True`` in one and
``TRUE`` in another; a timestamp has a space, a ``T``, nine digits of nothing, or the offset of whoever
wrote it. A patient's number decides which side of the split she is on, so it must be one text wherever
the site keeps its records. `text_of` is that text, and the only place that makes it:

- a whole number is written without ``.0``, and without an exponent if it has one by floats' custom;
- truth is ``true`` or ``false``;
- a timestamp is ``2026-03-01T08:30:00.25`` as it stands, or in UTC with a ``Z`` behind it where it has
  an offset, and a date alone at midnight without one;
- what is missing (NULL, NaN, NaT) is the empty text;
- other text is what it is: ``007`` keeps its zeros, and ``1.50``, which no float is written as, its
  digits.

It is a rule of its own number, because another text can move a unit to the other side of the split.
Sites that were trained before rule 2 keep rule 1 (`silotune.data.records`), under which text is what
the source's library makes of it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any, Literal
from uuid import UUID

Rule = Literal[1, 2]
"""By which rule values become text."""

NEWEST: Rule = 2

MISSING = frozenset({"NaN", "nan", "NaT", "NULL", "null", "None", "<NA>", "#N/A", "\\N"})
"""What exports write for no value. A label of this spelling that is declared is a label."""

# The longest text that `canonical` changes: a timestamp with nine digits and an offset, and some space.
_LONGEST = 48

# How Python, pandas, Java and Spark write a float: 12.0, 1e+16, 1.25E7. Never 1E5, 12.50 or 012.0, which
# may be a code.
_FLOAT = re.compile(r"-?(?:0|[1-9]\d*)\.0|-?[1-9](?:\.\d+)?e[+-]\d\d\d?|-?[1-9]\.\d+E-?\d\d?\d?")
_TRUTH = {"True": "true", "TRUE": "true", "False": "false", "FALSE": "false"}
_MOMENT = re.compile(
    r"(\d{4}-\d\d-\d\d)[T ](\d\d:\d\d:\d\d)(?:\.(\d+))? ?(Z|UTC|[+-]\d\d(?::?\d\d)?)?"
)
_CANDIDATE = re.compile(rf"{_FLOAT.pattern}|{'|'.join(_TRUTH)}|{_MOMENT.pattern}").fullmatch

# What begins anything that spells a value.
_BEGIN = frozenset("0123456789-TF") | {chr(n) for n in range(0x3001) if chr(n).isspace()}

_EXACT = 1e22  # beyond it, a float's own digits say no more


def text_of(value: Any, rule: Rule = NEWEST) -> str | None:
    """The text of a value; "" if it is missing, None if it is a list, an object or bytes."""
    if isinstance(value, str):
        # JSON can spell half a surrogate pair, which is no character and has no UTF-8 form.
        text = value if value.isascii() or encodable(value) else None
    elif value is None or value != value:  # noqa: PLR0124 - NaN and NaT are not equal to themselves
        text = ""
    elif isinstance(value, bool):
        text = "true" if value else "false"
    elif isinstance(value, float) and rule > 1:
        text = of_float(value)
    elif isinstance(value, Decimal):
        text = format(value, "f") if rule > 1 else str(value)
    elif isinstance(value, (int, float, date, time, UUID)):
        text = str(value)
    else:
        text = None
    return canonical(text) if text and rule > 1 else text


def of_float(value: float) -> str:
    """The text of a float: whole ones without a point, others as Python writes them."""
    if math.isnan(value):
        return ""
    return str(int(value)) if value.is_integer() and abs(value) < _EXACT else repr(value)


def canonical(text: str) -> str:
    """The one text of what another text spells: of a float, a truth or a timestamp.

    Spaces around what it spells don't count; other text stays as it is, spaces included.
    """
    if len(text) > _LONGEST or (found := _CANDIDATE(text.strip())) is None:
        return text
    spelled = found[0]
    if spelled in _TRUTH:
        return _TRUTH[spelled]
    if _FLOAT.fullmatch(spelled):
        return (
            spelled.removesuffix(".0")
            if spelled != "-0.0" and spelled[-2:] == ".0"
            else of_float(float(spelled))
        )
    return _moment(spelled)


def _moment(spelled: str) -> str:
    match = _MOMENT.fullmatch(spelled)
    assert match is not None
    day, clock, fraction, offset = match.groups()
    tail = f".{fraction.rstrip('0')}".rstrip(".") if fraction else ""
    try:
        moment = datetime.fromisoformat(f"{day}T{clock}")
        if offset is None:
            return day if not tail and clock == "00:00:00" else f"{day}T{clock}{tail}"
        return f"{(moment - _offset(offset)).isoformat()}{tail}Z"
    except (ValueError, OverflowError):  # no day or hour of any calendar
        return spelled


def _offset(spelled: str) -> timedelta:
    if spelled in ("Z", "UTC"):
        return timedelta()
    digits = spelled[1:].replace(":", "").ljust(4, "0")
    size = timedelta(hours=int(digits[:2]), minutes=int(digits[2:]))
    return -size if spelled[0] == "-" else size


def canonical_column(column: Sequence[str]) -> Sequence[str]:
    """`canonical` of each, fast: few texts begin like a value, and those of a table repeat."""
    changed = {}
    for text in {text for text in column if text[:1] in _BEGIN}:
        if (found := canonical(text)) != text:
            changed[text] = found
    return [changed.get(text, text) for text in column] if changed else column


def without_missing(column: Sequence[str], words: Collection[str] = MISSING) -> Sequence[str]:
    """The column with what only spells that there is no value as the empty text."""
    if not words or frozenset(words).isdisjoint(column):
        return column
    return ["" if text in words else text for text in column]


def encodable(text: str) -> bool:
    """Whether it has a UTF-8 form."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
