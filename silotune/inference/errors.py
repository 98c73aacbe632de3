"""Errors of applying a trained model to records."""

from __future__ import annotations

from silotune.errors import RunError


class AnswersInTheWay(RunError):
    """Answers would be written over a file, or behind those of something else."""

    code = "ST-660"
    title = "Other answers are in the place of these"
    cause = "A file is there already, or what was begun there had another model, input or options."
    advice = "Give another --out, or --force to begin anew."


class TemperatureUnfit(RunError):
    """A temperature file can't be used with a model."""

    code = "ST-661"
    title = "The temperature is not this model's"
    cause = "The file is missing, damaged, or was fitted for another adapter."
    advice = "Fit one: silotune evaluate RUN --data FILE --out FOLDER writes temperature.json."


class SplitUnknown(RunError):
    """Which of a site's records a model was trained on is not known here."""

    code = "ST-662"
    title = "Which records were held out is not known"
    cause = (
        "A site's records are split by a secret in its state folder, or, in a simulation, in the "
        "run directory under sites/NAME. It is not here, so held-out records can't be told from those "
        "that the model was trained on."
    )
    advice = (
        "Evaluate where the site's state is, or give the run directory with its folder sites; or give "
        "records that the model did not learn from: --data FILE."
    )
