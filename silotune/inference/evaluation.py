"""An evaluation of a trained model on labelled records that it did not learn from.

What needs nothing to be chosen is measured on all records. A temperature and a threshold are chosen on
one part of the units (a file of their own, or half of them) and measured on the other: a figure on the
records that a number was chosen on would flatter it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from silotune.errors import ModelError
from silotune.inference.answers import fingerprint
from silotune.inference.calibration import calibration_of, fitted_temperature, tempered
from silotune.inference.evaluated import (
    MOST_POINTS,
    OF_LABEL,
    AgainstOther,
    Estimates,
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
    Estimated,
    FoundEntities,
    Ints,
    Labelled,
    Observed,
    SeveralHold,
    require_sklearn,
)
from silotune.inference.groups import shown_groups
from silotune.inference.observed import NAMELESS, SeenRecords, look
from silotune.inference.records import LabelledRecords
from silotune.inference.significance import delong, mcnemar
from silotune.inference.thresholds import MAX_F1, Decided, ThresholdRule
from silotune.models.task import LoadedModel
from silotune.plan.plan import Plan

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
    chosen_on : str
        What the records are called that are given to choose on.
    """

    positive: str = ""
    rule: ThresholdRule = MAX_F1
    least: int = LEAST_UNITS
    bootstrap: Bootstrap = field(default_factory=Bootstrap)
    chosen_on: str = "a file of its own"


def evaluate(
    model: LoadedModel,
    source: LabelledRecords,
    *,
    against: LoadedModel | None = None,
    other: str = "",
    choose_on: LabelledRecords | None = None,
    wanted: Wanted | None = None,
    looking: Callable[[int], None] = lambda records: None,
) -> ModelEvaluation:
    """Evaluate a model on labelled records.

    Parameters
    ----------
    model : LoadedModel
        What is evaluated.
    source : LabelledRecords
        The records, with all roles of the task, and perhaps ``unit`` and ``group``: a `Given` file, or
        `HeldOut` of a site's dataset.
    against, other : LoadedModel, str
        Another model of the same task and labels to compare with, and its name.
    choose_on : LabelledRecords, optional
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
    positive = _positive(plan, wanted.positive)
    digest = source.digest
    models = [model, *([against] if against is not None else [])]
    found = look(models, source, advance=looking)
    chosen = None if choose_on is None else look([model], choose_on, advance=looking)
    one = _One(found, chosen, wanted, positive)
    return ModelEvaluation(
        plan=plan.plan.name,
        plan_sha256=plan.sha256,
        model=fingerprint(model),
        task=plan.model.task,
        kind=plan.task.counts,
        data=source.title,
        data_sha256=digest,
        records=len(found.units),
        units=len(set(found.units)),
        unit_column=source.unit_column,
        left_out=found.left_out,
        confidence=wanted.bootstrap.confidence,
        draws=wanted.bootstrap.draws,
        label_names=plan.model.labels,
        positive=positive or "",
        **one.figures(),
        comparison=one.comparison(other) if against is not None else None,
        groups=one.groups(source.group_column) if source.group_column else None,
    )


def _said_of(model: LoadedModel) -> tuple[str, str, tuple[str, ...]]:
    """What a model answers; one label and several labels are two kinds of one task."""
    plan = model.plan
    return plan.model.task, plan.task.counts, plan.model.labels


def _positive(plan: Plan, asked: str) -> str | None:
    """The label that a threshold is for: of two of which one holds the last, else the one asked for."""
    kind, labels = plan.task.counts, plan.model.labels
    if not asked:
        return labels[-1] if kind == "confusion" and len(labels) == 2 else None
    if kind not in {"confusion", "cells"}:
        raise ModelError(
            f"{plan.model.task} gives no label a probability", remedy="Leave --positive out."
        )
    if asked not in labels:
        raise ModelError(
            "the positive label is not one of the model's",
            remedy=f"Give --positive one of {', '.join(map(repr, labels))}.",
        )
    return asked


def _one_label_each(observed: Observed, positive: str | None) -> Classified | None:
    """Records as those of one label each: of several labels, the positive one against its absence."""
    if isinstance(observed, Classified):
        return observed
    if isinstance(observed, SeveralHold) and positive is not None:
        return observed.of(observed.names.index(positive))
    return None


class _One:
    """The figures of one evaluation."""

    def __init__(
        self, found: SeenRecords, chosen: SeenRecords | None, wanted: Wanted, positive: str | None
    ) -> None:
        self._found, self._chosen, self._wanted, self._label = found, chosen, wanted, positive
        self._this: Observed = found.observed[0]
        self._one, *other = (_one_label_each(each, positive) for each in found.observed)
        self._other = other[0] if other else None
        self._unit_of = found.unit_of

    @property
    def _place(self) -> int | None:
        """Of the positive label."""
        if self._one is None or self._label is None:
            return None
        several = isinstance(self._this, SeveralHold)
        return len(self._one.names) - 1 if several else self._one.names.index(self._label)

    def _measured(self, observed: Observed, rows: Ints) -> dict[str, Figure]:
        return self._wanted.bootstrap.figures(observed, rows, self._unit_of)

    def figures(self) -> dict[str, object]:
        """What depends on this model alone."""
        every = self._measured(self._this, self._found.rows)
        found: dict[str, object] = {"metrics": {n: f for n, f in every.items() if "/" not in n}}
        found["labels"] = self._labels(every)
        if isinstance(self._this, Estimated):
            found["estimates"] = self._estimates(self._this)
        if isinstance(self._this, Classified):
            counts = self._this.confusion(self._found.rows)
            found["confusion"] = tuple(tuple(map(int, row)) for row in counts)
        if (one := self._one) is None:
            return found
        found["calibration"] = calibration_of(
            one.truth, one.shares, positive=self._place, of=self._label or ""
        )
        return found | self._choices(one)

    def _labels(self, every: Mapping[str, Figure]) -> tuple[LabelFigures, ...]:
        """The figures of each label, of those that were measured."""
        if isinstance(self._this, Labelled):
            names, there = self._this.names, self._this.holds.sum(0)
            answered = self._this.said.sum(0)
        elif isinstance(self._this, FoundEntities):
            names = self._this.plan.model.labels
            _, answered, there = self._this.of_labels(self._found.rows)
        else:
            return ()
        nothing = Figure(value=None)
        return tuple(
            LabelFigures(
                label=name,
                records=int(there[at]),
                predicted=int(answered[at]),
                **{key: every.get(f"{key}/{name}", nothing) for key in OF_LABEL},
            )
            for at, name in enumerate(names)
        )

    def _estimates(self, this: Estimated) -> Estimates:
        """Some records' numbers, for a picture."""
        rows = self._found.rows
        if len(rows) > MOST_POINTS:
            rng = np.random.default_rng(self._wanted.bootstrap.seed)
            rows = np.sort(rng.choice(rows, MOST_POINTS, replace=False))
        return Estimates(
            truth=tuple(this.truth[rows].tolist()), said=tuple(this.said[rows].tolist())
        )

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
        fitted = Temperature(parts=parts, value=value, before=before, after=after)
        # One temperature of several labels would not be the one of any of them.
        found: dict[str, object] = (
            {} if isinstance(self._this, SeveralHold) else {"temperature": fitted}
        )
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
        if self._chosen is not None:
            scored = set(self._found.units)
            chosen = _one_label_each(self._chosen.observed[0], self._label)
            assert chosen is not None  # of the same task
            named = [unit.startswith(NAMELESS) or unit not in scored for unit in self._chosen.units]
            return _taken(chosen, np.flatnonzero(named)), self._found.rows, self._wanted.chosen_on
        names = sorted(set(self._found.units))
        order = np.random.default_rng(self._wanted.bootstrap.seed).permutation(len(names))
        first = {names[at] for at in order[: len(names) // 2]}
        inside = np.array([unit in first for unit in self._found.units])
        return _taken(this, np.flatnonzero(inside)), np.flatnonzero(~inside), "half of the units"

    def comparison(self, other: str) -> AgainstOther:
        """How the model does against the other one, on all records."""
        this, that = self._found.observed
        one, two = self._one, self._other
        measured = self._measured(Differences(this=this, other=that), self._found.rows)
        values = that.measure(self._found.rows)
        found = AgainstOther(
            other=other,
            metrics={n: Figure(value=_defined(v)) for n, v in values.items() if "/" not in n},
            differences={n: f for n, f in measured.items() if "/" not in n},
        )
        if one is None or two is None:
            return found
        tested = mcnemar(one.answers == one.truth, two.answers == two.truth)
        found = found.model_copy(update={"mcnemar": tested})
        if (place := self._place) is None:
            return found
        areas = delong(
            one.truth == place,
            one.shares[:, place],
            two.shares[:, place],
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
        if self._one is None or self._place is None:
            return (len(np.unique(units)),)
        is_it = self._one.truth[rows] == self._place
        return len(np.unique(units[is_it])), len(np.unique(units[~is_it]))

    def _of_group(self, rows: Ints) -> Mapping[str, Figure]:
        found = self._measured(self._this, rows)
        figures = {name: figure for name, figure in found.items() if "/" not in name}
        if self._one is None or self._place is None:
            return figures
        decided = Decided(
            positive=self._one.truth == self._place,
            scores=(self._one.answers == self._place).astype(np.float64),
            threshold=0.5,
        )
        said = self._measured(decided, rows)
        figures |= {name: said[name] for name in ("sensitivity", "specificity")}
        return figures | {"auroc": found[f"auroc/{self._label}"]}


def _taken(observed: Classified, rows: NDArray[np.int64]) -> Classified:
    return replace(observed, truth=observed.truth[rows], shares=observed.shares[rows])


def _defined(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
