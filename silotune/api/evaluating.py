"""A trained model on labelled records that it did not learn from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from silotune.api.frames import frame
from silotune.api.model import Model, loaded_of, plan_of
from silotune.api.progress import Counting, counting
from silotune.api.site import Site
from silotune.data.columns import by_asked
from silotune.inference import evaluation
from silotune.inference.evaluated import FittedTemperature, ModelEvaluation
from silotune.inference.figures import Bootstrap, require_sklearn
from silotune.inference.held_out import HeldOut, held_out
from silotune.inference.records import Given, LabelledRecords
from silotune.inference.thresholds import ThresholdRule
from silotune.plan.plan import Plan
from silotune.rounds.trained import find_trained

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
    data: PathText | DataFrame | None = None,
    *,
    site: PathText | None = None,
    columns: Mapping[str, str] | None = None,
    label_separator: str | None = None,
    images: PathText | None = None,
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
    data : path or DataFrame, optional
        Labelled records.
    site : path, optional
        Instead of them, the folder of a site.toml, or the file: the test part of its dataset, as its own
        split has it, is evaluated, and the validation part chooses temperature and threshold.
    columns : mapping of str to str, optional
        The column of each role of the task, where it is not called like the role; ``words`` and ``tags``
        may stand for a text and its spans.
    label_separator : str, optional
        Between several labels of a record, where they are no list.
    images : path, optional
        The folder that paths of images are below: by default the file's, or of a data frame the current.
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
    SplitUnknown
        The secret that tells which records a site held out is not here.
    ValueError
        Not one of `data` and `site` is given, or beside a site what it says itself.

    Examples
    --------
    >>> import silotune
    >>> found = silotune.evaluate("runs/small", "labelled.csv", device="cpu", progress=False)
    >>> found.confusion().shape
    (2, 2)
    >>> found.metrics().loc["accuracy", "value"] <= 1.0
    np.True_
    """
    require_sklearn()  # before models are loaded, which takes time
    plan, rule = plan_of(model), ThresholdRule.parse(threshold)
    place = None if images is None else Path(images)
    given: AbstractContextManager[LabelledRecords | None]
    chosen: AbstractContextManager[LabelledRecords | None]
    if site is None:
        roles = _roles(plan, columns or {}, {"unit": unit, "group": group})
        given = _given(data, plan, roles, label_separator, place)
        chosen = _given(choose_on, plan, roles, label_separator, place)
        if data is None:
            raise ValueError("give labelled records as data, or the folder of a site")
    else:
        if any(
            one is not None for one in (data, choose_on, columns, label_separator, unit, images)
        ):
            raise ValueError("a site says what is evaluated and chosen on, and how it is read")
        test, validation = _held_out(model, site, plan, group or "")
        given, chosen = nullcontext(test), nullcontext(validation)
    with given as records, chosen as choosing:
        # What is wrong with the records is told before models are loaded, which takes time.
        number = sum(one.size() for one in (records, choosing) if one is not None)
        assert records is not None
        ours = loaded_of(model, base=base, device=device)
        other = None if against is None else loaded_of(against, base=base, device=device)
        with counting(progress, "looking at records") as (started, advance):
            started(number, 0)
            found = evaluation.evaluate(
                ours.loaded,
                records,
                against=None if other is None else other.loaded,
                other=_name(against),
                choose_on=choosing,
                wanted=evaluation.Wanted(
                    positive=positive,
                    rule=rule,
                    least=least,
                    bootstrap=Bootstrap(
                        draws=draws,
                        confidence=confidence,
                        seed=seed,
                        advance=_drawing(draws, started, advance),
                    ),
                    chosen_on="a file of its own" if site is None else "the validation part",
                ),
                looking=advance,
            )
    return EvaluatedModel(found)


def _roles(
    plan: Plan, columns: Mapping[str, str], also: Mapping[str, str | None]
) -> dict[str, str]:
    """The column of each role that is read."""
    named = by_asked(columns)
    found = {role: role for role in plan.task.in_order if role not in named} | dict(columns)
    return found | {role: name for role, name in also.items() if name is not None}


def _held_out(
    model: Model | PathText, site: PathText, plan: Plan, group: str
) -> tuple[HeldOut, HeldOut | None]:
    trained = find_trained(model.folder if isinstance(model, Model) else Path(model))
    return held_out(Site(site).config, plan, run=trained.run_folder, group=group)


def _drawing(
    draws: int, started: Callable[..., None], advance: Callable[[int], None]
) -> Callable[[int], None]:
    """Shows the draws of one set of figures after the other."""
    drawn = 0

    def drew(number: int) -> None:
        nonlocal drawn
        if drawn % draws == 0:
            started(draws, 0, title="drawing for intervals")
        drawn += number
        advance(number)

    return drew


def _name(other: Model | PathText | None) -> str:
    if other is None:
        return ""
    return (other.folder if isinstance(other, Model) else Path(other)).resolve().name


@contextmanager
def _given(
    data: PathText | DataFrame | None,
    plan: Plan,
    roles: Mapping[str, str],
    separator: str | None,
    images: Path | None,
) -> Iterator[Given | None]:
    """Records as the evaluation reads them; a data frame lies in a private file meanwhile."""
    read: Any = {"roles": dict(roles), "labels": plan.model.labels, "separator": separator}
    if data is None:
        yield None
    elif isinstance(data, str | PathLike):
        yield Given(path=Path(data), strict=False, images=images, **read)
    else:
        with TemporaryDirectory() as folder:
            path = Path(folder) / "records.parquet"
            data.to_parquet(path)
            yield Given(path=path, strict=False, images=images or Path(), **read)
