"""``[policy]`` and ``[resources]`` of site.toml: what a site allows, and what it gives.

A clause of the policy that is left out allows nothing. So a new clause of a later version refuses
until somebody at the site has decided about it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime, time, timedelta
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from silotune.plan_sections import Positive, Section

_DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_HOURS = re.compile(r"(\w{3})(?:-(\w{3}))? (\d\d):(\d\d)-(\d\d):(\d\d)")
_DAY = 24 * 60

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Words = tuple[Annotated[str, Field(min_length=1)], ...]


@dataclass(frozen=True)
class Window:
    """A time of the week in which training is allowed, in the machine's local time.

    Attributes
    ----------
    days : frozenset of int
        Days on which it begins, Monday is 0.
    start, length : int
        Minutes after midnight, and how many minutes from there on, perhaps into the next day.
    """

    days: frozenset[int]
    start: int
    length: int

    def holds(self, moment: datetime) -> bool:
        """Whether `moment` is within it."""
        minutes = moment.hour * 60 + moment.minute
        today = moment.weekday() in self.days and self.start <= minutes < self.start + self.length
        yesterday = (moment.weekday() - 1) % 7 in self.days
        return today or (yesterday and minutes + _DAY < self.start + self.length)

    def next_start(self, moment: datetime) -> datetime:
        """When it begins next, after `moment`."""
        at = time(self.start // 60, self.start % 60)
        days = (moment.date() + timedelta(days=n) for n in range(8))
        starts = (datetime.combine(day, at, moment.tzinfo) for day in days)
        return next(s for s in starts if s.weekday() in self.days and s > moment)


def parse_window(text: str) -> Window:
    """Read ``"Mon-Fri 19:00-07:00"`` or ``"Sun 00:00-24:00"``.

    Raises
    ------
    ValueError
        It has another form.
    """
    match = _HOURS.fullmatch(text)
    if match is None or match[1] not in _DAYS or (match[2] or match[1]) not in _DAYS:
        raise ValueError(f'{text!r} is not of the form "Mon-Fri 19:00-07:00"')
    first, last = _DAYS.index(match[1]), _DAYS.index(match[2] or match[1])
    days = frozenset((first + n) % 7 for n in range((last - first) % 7 + 1))
    hour, minute, end_hour, end_minute = (int(match[n]) for n in range(3, 7))
    start, end = hour * 60 + minute, end_hour * 60 + end_minute
    if max(minute, end_minute) > 59 or start >= _DAY or end > _DAY:
        raise ValueError(f"{text!r}: a time is between 00:00 and 24:00")
    return Window(days, start, (end - start) % _DAY or _DAY)


def _hours(text: str) -> str:
    parse_window(text)
    return text


class PolicyConfig(Section):
    """``[policy]``: what a plan may ask of this site; a key that is left out allows nothing."""

    approval: Literal["manual", "auto"] = Field(
        "manual", description="Whether a person must approve each plan that passes."
    )
    max_epsilon: Positive | None = Field(None, description="Of one run.")
    max_total_epsilon: Positive | None = Field(None, description="Of all runs on a dataset.")
    max_delta: Annotated[float, Field(gt=0.0, lt=0.01)] | None = None
    allow_large_delta: bool = Field(
        False, description="Accept a delta at or above 1/declared_units, which promises little."
    )
    require_privacy: bool = Field(True, description="Refuse plans without differential privacy.")
    allow_seeded_noise: bool = Field(
        False, description="Accept plans whose noise can be repeated: such runs are not private."
    )
    require_secure_aggregation: bool = True
    min_cohort: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Sites that must take part in every round."
    )
    base_models: dict[Sha256, Annotated[str, Field(min_length=1)]] = Field(
        {}, description="SHA-256 of the weights, and the folder or cached hub id here."
    )
    tasks: Words = ()
    target_modules: Words = ()
    strategies: Words = ()
    max_rounds: Annotated[int, Field(ge=1)] | None = None
    max_upload_mb: Positive | None = Field(None, description="Millions of bytes a round.")
    hours: tuple[Annotated[str, AfterValidator(_hours)], ...] = Field(
        (), description="When training is allowed, in local time."
    )

    @property
    def windows(self) -> tuple[Window, ...]:
        """`hours`, read."""
        return tuple(parse_window(text) for text in self.hours)


class ResourcesConfig(Section):
    """``[resources]``: what the daemon may use of this machine."""

    threads: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Processor threads; PyTorch's own choice when absent."
    )
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"
    memory_mb: Annotated[int, Field(ge=512)] | None = Field(
        None, description="Memory of the process; a step that needs more fails and sends nothing."
    )
    max_rank: Annotated[int, Field(ge=1)] | None = Field(
        None,
        description="PUBLIC. Largest adapter rank; for strategies that let ranks differ by site.",
    )
