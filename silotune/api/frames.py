"""Rows as data frames of pandas, and figures of matplotlib: both only where somebody asks for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from silotune.errors import ExtraMissing

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

INSTALL = "pip install 'silotune[notebook]'"


def frame(rows: Iterable[Mapping[str, Any]], *, index: str | None = None) -> DataFrame:
    """One row a mapping, columns in the order in which they come.

    Raises
    ------
    ExtraMissing
        pandas is not installed.
    """
    try:
        import pandas as pd
    except ImportError as exc:
        raise ExtraMissing("pandas is not installed", remedy=INSTALL) from exc
    found = pd.DataFrame(list(rows))
    if index is not None and index in found.columns:
        found = found.set_index(index)
    return found


def require_figures() -> None:
    """Raise `ExtraMissing` where matplotlib is not installed."""
    from silotune.report.report import can_draw

    if not can_draw():
        raise ExtraMissing("matplotlib is not installed", remedy=INSTALL)


def shown(figure: Figure) -> Figure:
    """The figure, such that a notebook shows it as a picture, also where nobody imported pyplot."""
    try:
        from IPython.core.getipython import get_ipython
        from IPython.core.pylabtools import select_figure_formats
    except ImportError:
        return figure
    if (shell := get_ipython()) is not None:
        select_figure_formats(shell, {"png"})
    return figure
