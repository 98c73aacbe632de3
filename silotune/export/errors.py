"""Errors of exports."""

from __future__ import annotations

from silotune.errors import EnvironmentFault


class ExportInTheWay(EnvironmentFault):
    """The place to write to holds this very run already."""

    code = "ST-760"
    title = "This run was exported there before"
    cause = "A second copy of the same curves would be drawn on top of the first."
    advice = "Give another folder with --out, or remove the earlier export."
