"""An evaluation of a trained model on labelled records that it did not learn from.

What needs nothing to be chosen is measured on all records. A temperature and a threshold are chosen on
one part of the units (a file of their own, or half of them) and measured on the other: a figure on the
records that a number was chosen on would flatter it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from silotune.errors import ModelError
from silotune.inference.answers import fingerprint
from silotune.inference.calibration import calibration_of, fitted_temperature, tempered
from silotune.inference.evaluated import (
    AgainstOther,
    Figure,
    GroupFigures,
    Groups,
    LabelFigures,
    ModelEvaluation,
    Temperature,
    Threshold,
    TwoParts,
)
from silotune.inference.figures import (
    Bootstrap,
    Classified,
    Differences,
    Ints,
    Observed,
    require_sklearn,
)
from silotune.inference.groups import shown_groups
from silotune.inference.observed import SeenRecords, look
from silotune.inference.records import Given
from silotune.inference.significance import delong, mcnemar
from silotune.inference.thresholds import MAX_F1, Decided, ThresholdRule
from silotune.models.task import LoadedModel
from silotune.trust.files import file_sha256

LEAST_UNITS = 10
"""Units that a group has at least whose figures are shown."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is asked of an evaluation.

    Attributes
    ----------
    positive : str
        The label that a threshold is for; of two labels the last one where it is empty.
    rule : ThresholdRule
        How the threshold is chosen.
    least : int
        Units that a shown group has at least.
    bootstrap : Bootstrap
        How intervals are made; its seed also divides the units into two halves.
    """

    positive: str = ""
    rule: ThresholdRule = MAX_F1
    least: int = LEAST_UNITS
    bootstrap: Bootstrap = field(default_factory=Bootstrap)


def evaluate(
    model: LoadedModel,
    given: Given,
    *,
    against: LoadedModel | None = None,
    other: str = "",
    choose_on: Given | None = None,
    wanted: Wanted | None = None,
    looking: Callable[[int], None] = lambda records: None,
) -> ModelEvaluation:
    """Evaluate a model on a file of labelled records.

    Parameters
    ----------
    model : LoadedModel
        What is evaluated.
    given : Given
        The records, with the columns of all roles of the task, and perhaps ``unit`` and ``group``.
    against, other : LoadedModel, str
        Another model of the same task and labels to compare with, and its name.
    choose_on : Given, optional
        Records to choose a temperature and a threshold on, instead of half of the units.
    wanted : Wanted, optional
        Settings.
    looking : callable
        Told how many records were looked at.

    Raises
    ------
    EnvironmentFault
        scikit-learn is not here.
    ModelError
        The other model has another task or other labels; or there is no such positive label.
    TooFewRecords, RecordInvalid, ColumnMissing, DatasetUnreadable
        The records can't be used.
    """
    require_sklearn()
    wanted, plan = wanted or Wanted(), model.plan
    if against is not None and _said_of(against) != _said_of(model):
        raise ModelError(
            f"{other}: another task or other labels",
            remedy="Compare with an adapter that answers the same question.",
        )
    positive = _positive(plan.model.labels, wanted.positive)
    digest = file_sha256(given.path)
    models = [model, *([against] if against is not None else [])]
    found = look(models, given, advance=looking)
    chosen = None if choose_on is None else look([model], choose_on, advance=looking)
    one = _One(found, chosen, wanted, positive)
    return ModelEvaluation(
        plan=plan.plan.name,
        plan_sha256=plan.sha256,
        model=fingerprint(model),
        task=plan.model.task,
        kind=plan.task.counts,
        data=given.path.name,
        data_sha256=digest,
        records=len(found.units),
        units=len(set(found.units)),
        unit_column=given.roles.get("unit", ""),
        left_out=found.left_out,
        confidence=wanted.bootstrap.confidence,
        draws=wanted.bootstrap.draws,
        label_names=plan.model.labels,
        positive=positive or "",
        **one.figures(),
        comparison=one.comparison(other) if against is not None else None,
        groups=one.groups(given.roles["group"]) if "group" in given.roles else None,
    )


def _said_of(model: LoadedModel) -> tuple[str, tuple[str, ...]]:
    return model.plan.model.task, model.plan.model.labels


def _positive(labels: Sequence[str], asked: str) -> str | None:
    if asked and asked not in labels:
        raise ModelError(
            "the positive label is not one of the model's",
            remedy=f"Give --positive one of {', '.join(map(repr, labels))}.",
        )
    return asked or (labels[-1] if len(labels) == 2 else None)


class _One:
    """The figures of one evaluation."""

    def __init__(
        self, found: SeenRecords, chosen: SeenRecords | None, wanted: Wanted, positive: str | None
    ) -> None:
        self._found, self._chosen, self._wanted, self._label = found, chosen, wanted, positive
        self._this: Observed = found.observed[0]
        self._unit_of = found.unit_of

    @property
    def _place(self) -> int | None:
        """Of the positive label."""
        assert isinstance(self._this, Classified)
        return None if self._label is None else self._this.names.index(self._label)

    def _measured(self, observed: Observed, rows: Ints) -> dict[str, Figure]:
        return self._wanted.bootstrap.figures(observed, rows, self._unit_of)

    def figures(self) -> dict[str, object]:
        """What depends on this model alone."""
        every = self._measured(self._this, self._found.rows)
        found: dict[str, object] = {"metrics": {n: f for n, f in every.items() if "/" not in n}}
        if not isinstance(self._this, Classified):
            return found
        counts = self._this.confusion(self._found.rows)
        found["labels"] = tuple(
            LabelFigures(
                label=name,
                records=int(counts[at].sum()),
                predicted=int(counts[:, at].sum()),
                **{key: every[f"{key}/{name}"] for key in _OF_LABEL},
            )
            for at, name in enumerate(self._this.names)
        )
        found["confusion"] = tuple(tuple(map(int, row)) for row in counts)
        found["calibration"] = calibration_of(
            self._this.truth, self._this.shares, positive=self._place, of=self._label or ""
        )
        return found | self._choices(self._this)

    def _choices(self, this: Classified) -> dict[str, object]:
        """What is chosen on one part of the units and measured on the other."""
        choosing, scored, how = self._parts(this)
        if not len(choosing.truth) or not len(scored):
            return {}
        parts = TwoParts(how=how, chosen_on=len(choosing.truth), scored_on=len(scored))
        truth, shares = this.truth[scored], this.shares[scored]
        value = fitted_temperature(choosing.truth, choosing.shares)
        before, after = (
            calibration_of(truth, tempered(shares, t), positive=self._place, of=self._label or "")
            for t in (1.0, value)
        )
        found: dict[str, object] = {
            "temperature": Temperature(parts=parts, value=value, before=before, after=after)
        }
        if (place := self._place) is None:
            return found
        threshold = self._wanted.rule.choose(choosing.truth == place, choosing.shares[:, place])
        if threshold is not None:
            decided = Decided(
                positive=this.truth == place, scores=this.shares[:, place], threshold=threshold
            )
            found["threshold"] = Threshold(
                parts=parts,
                label=self._label or "",
                rule=str(self._wanted.rule),
                value=threshold,
                figures=self._measured(decided, scored),
            )
        return found

    def _parts(self, this: Classified) -> tuple[Classified, Ints, str]:
        """What is chosen on, and the rows that are scored; no unit is in both."""
        units = np.array(self._found.units)
        if self._chosen is not None:
            chosen = self._chosen.observed[0]
            assert isinstance(chosen, Classified)
            named = [
                unit.startswith("row ") or unit not in set(units) for unit in self._chosen.units
            ]
            return _taken(chosen, np.flatnonzero(named)), self._found.rows, "a file of its own"
        names = sorted(set(self._found.units))
        order = np.random.default_rng(self._wanted.bootstrap.seed).permutation(len(names))
        first = {names[at] for at in order[: len(names) // 2]}
        inside = np.array([unit in first for unit in self._found.units])
        return _taken(this, np.flatnonzero(inside)), np.flatnonzero(~inside), "half of the units"

    def comparison(self, other: str) -> AgainstOther:
        """How the model does against the other one, on all records."""
        this, that = self._found.observed
        measured = self._measured(Differences(this=this, other=that), self._found.rows)
        values = that.measure(self._found.rows)
        found = AgainstOther(
            other=other,
            metrics={n: Figure(value=_defined(v)) for n, v in values.items() if "/" not in n},
            differences={n: f for n, f in measured.items() if "/" not in n},
        )
        if not isinstance(this, Classified) or not isinstance(that, Classified):
            return found
        tested = mcnemar(this.answers == this.truth, that.answers == that.truth)
        found = found.model_copy(update={"mcnemar": tested})
        if (place := self._place) is None:
            return found
        areas = delong(
            this.truth == place,
            this.shares[:, place],
            that.shares[:, place],
            label=self._label or "",
            confidence=self._wanted.bootstrap.confidence,
        )
        return found.model_copy(update={"delong": areas})

    def groups(self, column: str) -> Groups:
        """Figures by group, of the groups that may be shown."""
        groups = np.array(self._found.groups)
        rows_of = {name: np.flatnonzero(groups == name) for name in dict.fromkeys(groups.tolist())}
        shown = shown_groups(
            {name: self._sizes(rows) for name, rows in rows_of.items()}, least=self._wanted.least
        )
        return Groups(
            column=column,
            least=self._wanted.least,
            shown=tuple(
                GroupFigures(
                    group=name,
                    records=len(rows_of[name]),
                    units=len(np.unique(self._unit_of[rows_of[name]])),
                    figures=self._of_group(rows_of[name]),
                )
                for name in shown
            ),
            hidden=len(rows_of) - len(shown),
            hidden_records=sum(len(rows) for name, rows in rows_of.items() if name not in shown),
        )

    def _sizes(self, rows: Ints) -> tuple[int, ...]:
        """Units of a group: with the positive label and without; or all."""
        units = self._unit_of[rows]
        if not isinstance(self._this, Classified) or self._place is None:
            return (len(np.unique(units)),)
        is_it = self._this.truth[rows] == self._place
        return len(np.unique(units[is_it])), len(np.unique(units[~is_it]))

    def _of_group(self, rows: Ints) -> Mapping[str, Figure]:
        found = self._measured(self._this, rows)
        if not isinstance(self._this, Classified):
            return found
        figures = {name: found[name] for name in ("accuracy", "macro_f1")}
        if self._place is not None:
            decided = Decided(
                positive=self._this.truth == self._place,
                scores=(self._this.answers == self._place).astype(np.float64),
                threshold=0.5,
            )
            said = self._measured(decided, rows)
            figures |= {name: said[name] for name in ("sensitivity", "specificity")}
            figures["auroc"] = found[f"auroc/{self._label}"]
        return figures


_OF_LABEL = ("precision", "recall", "f1", "auroc", "average_precision")


def _taken(observed: Classified, rows: NDArray[np.int64]) -> Classified:
    return replace(observed, truth=observed.truth[rows], shares=observed.shares[rows])


def _defined(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
