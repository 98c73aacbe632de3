"""What is wrong with a table's rows, told by place and count and never by content."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from silotune.errors import DataError, RecordInvalid

_SHOWN = 5


@dataclass(frozen=True)
class Faults:
    """Collects the faults of one table, then refuses it with all of them in one message.

    Parameters
    ----------
    source : str
        The file or query, as messages name it.
    """

    source: str
    lines: list[str] = field(default_factory=list)

    def add(self, problem: str, rows: Sequence[int], *, column: str | None = None) -> None:
        """Note a fault of some rows (spreadsheet numbers); of no rows, nothing is noted."""
        if rows:
            where = f"column {column!r}: " if column is not None else ""
            self.lines.append(f"{where}{problem} in {rows_in_words(rows)}")

    def check(self, error: type[DataError] = RecordInvalid) -> None:
        """Raise `error` if any fault was noted."""
        if self.lines:
            listed = "\n".join(f"  - {line}" for line in self.lines)
            raise error(f"{self.source}:\n{listed}")


def rows_in_words(rows: Sequence[int]) -> str:
    """The first few rows and their number: ``row 7``, ``3 rows (2, 5, 9)``, ``9 rows (2, ...)``."""
    if len(rows) == 1:
        return f"row {rows[0]}"
    first = ", ".join(str(row) for row in rows[:_SHOWN])
    return f"{len(rows)} rows ({first}{', ...' if len(rows) > _SHOWN else ''})"
