"""What a model says of one record: an answer that JSON can hold, and perhaps how likely each is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Output = str | float | Sequence[str] | Sequence[Mapping[str, Any]]
"""A label or a text; a number; labels; spans, each with ``start``, ``end`` and ``label``."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The answer of one record.

    Attributes
    ----------
    output : Output
        What the task answers.
    probabilities : mapping of str to float
        Of every label, in the plan's order; empty where the task has none.
    """

    output: Output
    probabilities: Mapping[str, float] = field(default_factory=dict)
