"""What is typed to vary a setting of a plan: two ends, or the values themselves."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from typing import Any

from silotune.errors import PlanInvalid

_WIDE = 10.0  # a range as wide as this is searched by its logarithm


@dataclass(frozen=True, kw_only=True)
class Range:
    """What one setting is searched in: numbers from `low` to `high`, or one of `choices`.

    Attributes
    ----------
    key : str
        Dotted key of the plan.
    low, high : float or int
        Both ends are tried, too; whole numbers if both are.
    choices : tuple
        Values as TOML has them; empty for a range of numbers.
    """

    key: str
    low: float = 0.0
    high: float = 0.0
    choices: tuple[Any, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Range:
        """Read ``key=low:high`` or ``key=a,b,c``.

        Raises
        ------
        PlanInvalid
            It is neither.
        """
        key, sign, given = text.partition("=")
        low, colon, high = given.partition(":")
        try:
            if sign and key and colon:
                ends = [tomllib.loads(f"v = {end}")["v"] for end in (low, high)]
                if all(type(end) in {int, float} for end in ends) and ends[0] < ends[1]:
                    return cls(key=key, low=ends[0], high=ends[1])
            elif sign and key and given:
                return cls(key=key, choices=tuple(tomllib.loads(f"v = [{given}]")["v"]))
        except tomllib.TOMLDecodeError:
            pass
        raise PlanInvalid(
            f"--vary {text}: expected key=low:high, or key=value,value, with values as TOML has them: "
            "0.1 and not .1, texts in quotes"
        )

    @property
    def by_logarithm(self) -> bool:
        """Whether small numbers are as interesting as large ones: both ends tell."""
        return not self.choices and self.low > 0 and self.high / self.low >= _WIDE

    @property
    def ends(self) -> tuple[Any, ...]:
        """Values that the plan must be able to take."""
        return self.choices or (self.low, self.high)

    def __str__(self) -> str:
        """For people."""
        if self.choices:
            return f"{self.key} among {', '.join(map(str, self.choices))}"
        return f"{self.key} from {self.low:g} to {self.high:g}"
