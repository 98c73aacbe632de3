"""What an evaluation found, as it is stored: evaluation.json, the page and the terminal say the same.

Everything in it is of a site's own records, exact, and for its own people.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from silotune.inference.errors import TemperatureUnfit


class StoredFigures(BaseModel):
    """A part of the stored format."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Figure(StoredFigures):
    """A figure and the bootstrap interval of it over units; None where it is not defined."""

    value: float | None
    low: float | None = None
    high: float | None = None


class LabelFigures(StoredFigures):
    """How well one label is told from all others; `records` are those that have it.

    Of what is found in texts they are entities, and `predicted` those that were found.
    """

    label: str
    records: int
    predicted: int
    precision: Figure
    recall: Figure
    f1: Figure
    auroc: Figure
    average_precision: Figure


OF_LABEL = ("precision", "recall", "f1", "auroc", "average_precision")
"""Figures of a label; where a task has no probabilities, the last two have no value."""

MOST_POINTS = 2000
"""Of a picture."""


class Estimates(StoredFigures):
    """Numbers of some records, at most `MOST_POINTS` of them: what is true, and what was said."""

    truth: tuple[float, ...]
    said: tuple[float, ...]


class Bin(StoredFigures):
    """Records whose probability is in [low, high): their mean probability, and how often it is so."""

    low: float
    high: float
    records: int
    probability: float | None
    share: float | None


class Calibration(StoredFigures):
    """How far probabilities are frequencies.

    Attributes
    ----------
    of : str
        Whose probability: the positive label, or "" for the label that was answered.
    ece : float
        Expected calibration error over the bins.
    brier, log_loss : float
        Of all labels' probabilities.
    """

    of: str
    bins: tuple[Bin, ...]
    ece: float
    brier: float
    log_loss: float


class TwoParts(StoredFigures):
    """Where something was chosen, and where it was scored: no unit is in both."""

    how: str
    chosen_on: int
    scored_on: int


class Temperature(StoredFigures):
    """A temperature fitted on one part, and the calibration of the other without and with it."""

    parts: TwoParts
    value: float
    before: Calibration
    after: Calibration


class Threshold(StoredFigures):
    """A threshold for the positive label, chosen on one part, and how it does on the other."""

    parts: TwoParts
    label: str
    rule: str
    value: float
    figures: Mapping[str, Figure]


class McNemar(StoredFigures):
    """The exact test of two models' mistakes: records that only one of them has right."""

    only_this: int
    only_other: int
    p_value: float


class DeLong(StoredFigures):
    """The test of two areas under the ROC curve on the same records."""

    label: str
    auroc: float
    other: float
    difference: float
    low: float
    high: float
    p_value: float


class AgainstOther(StoredFigures):
    """A model against another on the same records; differences are the first less the other."""

    other: str
    metrics: Mapping[str, Figure]
    differences: Mapping[str, Figure]
    mcnemar: McNemar | None = None
    delong: DeLong | None = None


class GroupFigures(StoredFigures):
    """Figures of one group that is large enough to be shown."""

    group: str
    records: int
    units: int
    figures: Mapping[str, Figure]


class Groups(StoredFigures):
    """Figures by group.

    Attributes
    ----------
    column : str
        What groups.
    least : int
        Units that a shown group has at least, with the positive label and without, too.
    shown : tuple of GroupFigures
        Groups that are shown.
    hidden, hidden_records : int
        How many are not, and their records together.
    """

    column: str
    least: int
    shown: tuple[GroupFigures, ...]
    hidden: int
    hidden_records: int


class ModelEvaluation(StoredFigures):
    """A whole evaluation.

    Attributes
    ----------
    kind : str
        What kind of counts the plan's task has.
    left_out : tuple of str
        What of the file was not evaluated and why, by place and count.
    confidence, draws : float, int
        Of the intervals.
    metrics : mapping of str to Figure
        Of all records.
    labels, confusion
        By label, in the plan's order; rows of the matrix are the truth.
    estimates : Estimates, optional
        Of a task that answers numbers.
    """

    @property
    def told_of_labels(self) -> tuple[str, ...]:
        """The figures that some label has."""
        return tuple(
            key
            for key in OF_LABEL
            if any(getattr(row, key).value is not None for row in self.labels)
        )

    @property
    def counted(self) -> str:
        """What a label's figures count."""
        return "entities" if self.kind == "entities" else "records"

    format: Literal[1] = 1
    not_for_sharing: Literal[True] = True
    plan: str
    plan_sha256: str
    model: str
    task: str
    kind: str
    data: str
    data_sha256: str
    records: int
    units: int
    unit_column: str
    left_out: tuple[str, ...] = ()
    confidence: float
    draws: int
    metrics: Mapping[str, Figure]
    label_names: tuple[str, ...] = ()
    labels: tuple[LabelFigures, ...] = ()
    confusion: tuple[tuple[int, ...], ...] = ()
    positive: str = ""
    calibration: Calibration | None = None
    temperature: Temperature | None = None
    threshold: Threshold | None = None
    estimates: Estimates | None = None
    comparison: AgainstOther | None = None
    groups: Groups | None = None


class FittedTemperature(StoredFigures):
    """temperature.json: what divides the logits of one trained model, fitted on so many records."""

    format: Literal[1] = 1
    model: str
    value: Annotated[float, Field(gt=0.0, le=1000.0)]
    records: int

    @classmethod
    def read(cls, path: Path, *, model: str) -> FittedTemperature:
        """Read the file of a model, as `silotune.inference.answers.fingerprint` names it.

        Raises
        ------
        TemperatureUnfit
            It is no such file, or of another model.
        """
        try:
            found = cls.model_validate_json(path.read_bytes())
        except (OSError, ValueError):
            raise TemperatureUnfit(f"{path} is no temperature that was fitted") from None
        if found.model != model:
            raise TemperatureUnfit(f"{path} was fitted for another adapter")
        return found


_TITLES = {
    "macro_f1": "macro-F1",
    "f1": "F1",
    "auroc": "AUROC",
    "mae": "MAE",
    "rmse": "RMSE",
    "r2": "R\N{SUPERSCRIPT TWO}",
    "spearman": "Spearman",
    "micro_f1": "micro-F1",
    "entity_f1": "entity F1",
    "average_precision": "average precision",
    "negative_predictive_value": "negative predictive value",
}


def title_of(name: str) -> str:
    """A figure's name for people."""
    return _TITLES.get(name, name.replace("_", " "))


def in_words(figure: Figure, *, sign: str = "") -> str:
    """A figure with its interval."""
    if figure.value is None:
        return "\N{EN DASH}"
    value = f"{figure.value:{sign}.3f}"
    if figure.low is None or figure.high is None:
        return _minus(value)
    return _minus(f"{value} ({figure.low:{sign}.3f} to {figure.high:{sign}.3f})")


def _minus(text: str) -> str:
    return text.replace("-", "\N{MINUS SIGN}")
