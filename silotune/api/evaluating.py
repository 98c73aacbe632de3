"""A trained model on labelled records that it did not learn from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from silotune.api.frames import frame
from silotune.api.model import Model, load, plan_of
from silotune.api.progress import Counting, counting
from silotune.inference import evaluation
from silotune.inference.evaluated import FittedTemperature, ModelEvaluation
from silotune.inference.figures import Bootstrap
from silotune.inference.records import Given
from silotune.inference.thresholds import ThresholdRule
from silotune.plan.plan import Plan

if TYPE_CHECKING:
    from pandas import DataFrame

PathText = str | PathLike[str]


@dataclass(frozen=True)
class EvaluatedModel:
    """What `silotune.evaluate` found: exact figures of one's own records, and not for sharing.

    Attributes
    ----------
    figures : ModelEvaluation
        All of it: metrics, labels, confusion, calibration, threshold, comparison, groups.
    """

    figures: ModelEvaluation

    def metrics(self) -> DataFrame:
        """One row a metric of all records: ``value`` and its interval, ``low`` to ``high``."""
        rows = ({"metric": key, **one.model_dump()} for key, one in self.figures.metrics.items())
        return frame(rows, index="metric")

    def labels(self) -> DataFrame:
        """One row a label: ``records``, and the value of each of its figures, such as ``recall``."""
        rows = []
        for label in self.figures.labels:
            said = label.model_dump()
            rows.append({k: v["value"] if isinstance(v, dict) else v for k, v in said.items()})
        return frame(rows, index="label")

    def confusion(self) -> DataFrame:
        """Records by their true label (rows) and by what is answered (columns), [labels, labels]."""
        names = self.figures.label_names
        counts = zip(names, self.figures.confusion, strict=True)
        rows = ({"truth": name, **dict(zip(names, row, strict=True))} for name, row in counts)
        return frame(rows, index="truth")

    def _repr_html_(self) -> str:
        html: str = self.metrics().to_html(na_rep="")
        return html

    def write(self, folder: PathText) -> Path:
        """Write evaluation.json, a page with pictures, and temperature.json; the page's path."""
        from silotune.report.evaluation_page import render_evaluation
        from silotune.trust.files import create_private_folder, replace_file

        out, found = Path(folder), self.figures
        create_private_folder(out)
        replace_file(out / "evaluation.json", found.model_dump_json(indent=2).encode() + b"\n")
        replace_file(out / "evaluation.html", render_evaluation(found).encode())
        if (fitted := found.temperature) is not None:
            saved = FittedTemperature(
                model=found.model, value=fitted.value, records=fitted.parts.chosen_on
            )
            replace_file(out / "temperature.json", saved.model_dump_json(indent=2).encode() + b"\n")
        return out / "evaluation.html"


def evaluate(
    model: Model | PathText,
    data: PathText | DataFrame,
    *,
    columns: Mapping[str, str] | None = None,
    unit: str | None = None,
    group: str | None = None,
    least: int = 10,
    against: Model | PathText | None = None,
    choose_on: PathText | DataFrame | None = None,
    positive: str = "",
    threshold: str = "max-f1",
    draws: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    base: str | None = None,
    device: str = "auto",
    progress: bool | Counting = True,
) -> EvaluatedModel:
    """Evaluate a trained model on labelled records; nothing of it is sent anywhere.

    Parameters
    ----------
    model : Model, Run or path
        What is evaluated.
    data : path or DataFrame
        Labelled records.
    columns : mapping of str to str, optional
        The column of each role of the task, where it is not called like the role.
    unit : str, optional
        The column that says whose records they are: intervals are over these.
    group : str, optional
        Figures by this column, too; groups of fewer than `least` units are not shown.
    against : Model, Run or path, optional
        Another model to compare with, on the same records.
    choose_on : path or DataFrame, optional
        Records to choose temperature and threshold on; half of the units by default.
    positive, threshold : str
        The label that a threshold is for, and how it is chosen: ``max-f1``, ``sensitivity=0.95`` or
        ``specificity=0.9``.
    draws, confidence, seed
        Of the bootstrap.
    base, device
        As for `silotune.load`.
    progress : bool or context manager
        Show a bar; or what tells, by two functions, how many records there are and were looked at.

    Raises
    ------
    EnvironmentFault
        scikit-learn is not here: ``pip install 'silotune[evaluate]'``.
    DataError
        The records can't be used; the message quotes none.

    Examples
    --------
    >>> import silotune
    >>> found = silotune.evaluate("runs/small", "labelled.csv", device="cpu", progress=False)
    >>> found.confusion().shape
    (2, 2)
    >>> found.metrics().loc["accuracy", "value"] <= 1.0
    np.True_
    """
    plan = model.plan if isinstance(model, Model) else plan_of(model)
    roles = {role: role for role in (*plan.task.reads, str(plan.task.target))}
    roles |= dict(columns or {})
    roles |= {role: name for role, name in (("unit", unit), ("group", group)) if name is not None}
    with _given(data, plan, roles) as given, _given(choose_on, plan, roles) as chosen:
        # What is wrong with the records is told before models are loaded, which takes time.
        records = sum(one.outline().records for one in (given, chosen) if one is not None)
        assert given is not None
        ours = _model(model, base, device)
        other = None if against is None else _model(against, base, device)
        with counting(progress, "looking at records") as (started, advance):
            started(records, 0)
            found = evaluation.evaluate(
                ours.loaded,
                given,
                against=None if other is None else other.loaded,
                other=_name(against),
                choose_on=chosen,
                wanted=evaluation.Wanted(
                    positive=positive,
                    rule=ThresholdRule.parse(threshold),
                    least=least,
                    bootstrap=Bootstrap(draws=draws, confidence=confidence, seed=seed),
                ),
                looking=advance,
            )
    return EvaluatedModel(found)


def _name(other: Model | PathText | None) -> str:
    if other is None:
        return ""
    return (other.folder if isinstance(other, Model) else Path(other)).resolve().name


def _model(model: Model | PathText, base: str | None, device: str) -> Model:
    return model if isinstance(model, Model) else load(model, base=base, device=device)


@contextmanager
def _given(
    data: PathText | DataFrame | None, plan: Plan, roles: Mapping[str, str]
) -> Iterator[Given | None]:
    """Records as the evaluation reads them; a data frame lies in a private file meanwhile."""
    labels = plan.model.labels
    if data is None:
        yield None
    elif isinstance(data, str | PathLike):
        yield Given(path=Path(data), roles=dict(roles), labels=labels, strict=False)
    else:
        with TemporaryDirectory() as folder:
            path = Path(folder) / "records.parquet"
            data.to_parquet(path)
            yield Given(path=path, roles=dict(roles), labels=labels, strict=False)
