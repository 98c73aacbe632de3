"""``[statistics]``: what a plan with ``model.task = "statistics"`` counts."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from silotune.plan.document import Document

_Bound = Annotated[float, Field(ge=-1e15, le=1e15)]
Edges = tuple[_Bound, ...]
_Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")]


class LengthsSection(Document):
    """``[statistics.lengths]``: a histogram of the lengths of texts."""

    of: Literal["text", "prompt", "response"] = Field("text", description="Which role's texts.")
    counted: Literal["words", "tokens"] = Field(
        "words", description="'tokens' are those of model.base, begin and end tokens included."
    )
    edges: Edges = Field(min_length=1, description="Where a new bin begins; the last has no end.")


class NumberSection(Document):
    """``[statistics.numbers.NAME]``: mean and quantiles of a column that sites offer as NAME."""

    lower: _Bound = Field(description="Values below it count as it.")
    upper: _Bound = Field(description="Values above it count as it.")
    edges: Edges = Field((), description="Inner edges of a histogram, for quantiles.")


class StatisticsSection(Document):
    """``[statistics]``: what is counted, and below what nothing is shown."""

    floor: Annotated[float, Field(ge=1.0)] = Field(
        20.0, description="Units below which nothing of a group is shown."
    )
    confidence: Annotated[float, Field(gt=0.5, lt=1.0)] = Field(
        0.95, description="Of the intervals around each number."
    )
    records_a_unit: Edges = Field(
        (), description="Where a new bin begins: [2, 3, 6] for 1, 2, 3-5."
    )
    lengths: LengthsSection | None = None
    numbers: dict[_Name, NumberSection] = Field({}, description="By the name that sites offer.")
