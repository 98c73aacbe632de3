"""Errors of applying a trained model to records."""

from __future__ import annotations

from silotune.errors import SilotuneError


class AnswersInTheWay(SilotuneError):
    """Answers would be written over a file, or behind those of something else."""

    code, exit_code = "ST-660", 60
    title = "Other answers are in the place of these"
    cause = "A file is there already, or what was begun there had another model, input or options."
    advice = "Give another --out, or --force to begin anew."
