"""What is wrong with a table's rows, told by place and count and never by content."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from silotune.errors import DataError, RecordInvalid

_SHOWN = 5


@dataclass(frozen=True)
class LeftOut:
    """Rows of a source that are not used, and why. Private: it is for people at the site.

    Attributes
    ----------
    problem : str
        What is wrong with them.
    rows : tuple of int
        Their numbers, as the reader of the source counts.
    column : str or None
        The column that it was seen in.
    values : mapping of str to int
        How often which label occurs, where the label is what is wrong: for a local terminal only.
    """

    problem: str
    rows: tuple[int, ...]
    column: str | None = None
    values: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        where = f"column {self.column!r}: " if self.column is not None else ""
        return f"{where}{self.problem} in {rows_in_words(self.rows)}"

    @property
    def told(self) -> str:
        """In words, with the labels that it is about: for a terminal of the site's own people."""
        if not self.values:
            return str(self)
        counted = sorted(self.values.items(), key=lambda item: (-item[1], item[0]))
        listed = ", ".join(f"{label!r} ({count})" for label, count in counted[:_SHOWN])
        more = len(counted) - _SHOWN
        return f"{self}: {listed}{f' and {more} more' if more > 0 else ''}"


@dataclass(frozen=True)
class Faults:
    """Collects the faults of one table; whoever can't leave rows out refuses it with all of them.

    Parameters
    ----------
    source : str
        The file or query, as messages name it.
    """

    source: str
    found: list[LeftOut] = field(default_factory=list)

    def add(
        self,
        problem: str,
        rows: Sequence[int],
        *,
        column: str | None = None,
        values: Sequence[str] = (),
    ) -> None:
        """Note a fault of some rows (spreadsheet numbers); of no rows, nothing is noted."""
        if rows:
            self.found.append(LeftOut(problem, tuple(rows), column, Counter(values)))

    def check(self, error: type[DataError] = RecordInvalid) -> None:
        """Raise `error` if any fault was noted."""
        if self.found:
            listed = "\n".join(f"  - {fault}" for fault in self.found)
            raise error(f"{self.source}:\n{listed}")


def rows_in_words(rows: Sequence[int]) -> str:
    """The first few rows and their number: ``row 7``, ``3 rows (2, 5, 9)``, ``9 rows (2, ...)``."""
    if len(rows) == 1:
        return f"row {rows[0]}"
    first = ", ".join(str(row) for row in rows[:_SHOWN])
    return f"{len(rows)} rows ({first}{', ...' if len(rows) > _SHOWN else ''})"
