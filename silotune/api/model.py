"""A trained model, ready to be asked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from silotune.api.frames import frame
from silotune.api.progress import Counting, bar, counting
from silotune.data.columns import pieces_of
from silotune.data.streams import format_of
from silotune.errors import ColumnMissing, ModelError
from silotune.inference.answers import Answered, answer_file, answers_to, fingerprint
from silotune.inference.calibration import calibrated
from silotune.inference.evaluated import FittedTemperature
from silotune.inference.records import given_by
from silotune.inference.redaction import Redaction, finding
from silotune.inference.written import WRITTEN, Answer
from silotune.models.prediction import Prediction
from silotune.models.sampling import GREEDY, Sampling, drawing
from silotune.models.task import LoadedModel
from silotune.plan.plan import Plan
from silotune.rounds.trained import find_trained

if TYPE_CHECKING:
    from pandas import DataFrame

_AT_ONCE = 256  # examples between two moves of the bar


def load(
    path: str | PathLike[str],
    *,
    base: str | PathLike[str] | None = None,
    device: str = "auto",
    plan: Plan | None = None,
) -> Model:
    """Load what was trained: of a finished run, or from an adapter's own folder.

    Parameters
    ----------
    path : Run or path
        A run, its directory, or an adapter's folder.
    base : path, optional
        Where the base model is on this machine, if not where the plan says.
    device : str
        ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
    plan : Plan, optional
        Of an adapter's folder of an earlier version, which has no plan in it.

    Raises
    ------
    RunDirectoryInvalid
        It is neither, or the run has no final adapter.
    ModelError
        The base model is not here or another one, or the adapter does not fit it.

    Examples
    --------
    >>> import silotune
    >>> model = silotune.load("runs/small", device="cpu")
    >>> answer, = model.predict(["asthma of the left side"])
    >>> answer.output in {"no", "yes"}
    True
    """
    found = find_trained(Path(path), plan=plan)
    loaded = found.load(base=None if base is None else str(base), device=device)
    return Model(loaded, folder=found.adapter)


def plan_of(model: Model | str | PathLike[str]) -> Plan:
    """The plan of what was trained, without loading it. Raises as `load` does."""
    return model.plan if isinstance(model, Model) else find_trained(Path(model)).plan


def loaded_of(model: Model | str | PathLike[str], *, base: str | None, device: str) -> Model:
    """A model as it was given, or loaded. Raises as `load` does."""
    return model if isinstance(model, Model) else load(model, base=base, device=device)


class Model:
    """A base model with a trained adapter. Make one with `silotune.load`.

    Attributes
    ----------
    loaded : LoadedModel
        The model itself, for whoever wants PyTorch: ``loaded.module``, ``loaded.tokenizer``.
    folder : Path
        The adapter's folder.
    settings : mapping
        What was chosen by `answering`.
    """

    def __init__(
        self, loaded: LoadedModel, *, folder: Path, settings: Mapping[str, Any] | None = None
    ) -> None:
        self.loaded, self.folder, self.settings = loaded, folder, dict(settings or {})

    def __repr__(self) -> str:
        return f"<silotune model {self.loaded.description}>"

    @property
    def plan(self) -> Plan:
        """The plan that it was trained by."""
        return self.loaded.plan

    @property
    def roles(self) -> tuple[str, ...]:
        """What an example consists of, by role: ``("text",)`` for a text classifier."""
        return self.plan.task.reads

    def predict(self, examples: Any, *, progress: bool = True) -> list[Prediction]:
        """What the model says of new examples.

        Parameters
        ----------
        examples : sequence of str, sequence of mappings, or DataFrame
            Texts; or examples by role, as mappings or as the columns of a data frame, of which other
            columns are left alone.
        progress : bool
            Show a bar where there are more than a few hundred.

        Returns
        -------
        list of Prediction
            One an example, in order: ``output`` (a label, a number, a text, ...) and ``probabilities``
            by label, where the task has them.

        Raises
        ------
        ColumnMissing
            An example lacks a role.

        Examples
        --------
        >>> import silotune
        >>> model = silotune.load("runs/small", device="cpu")
        >>> found = model.predict([{"text": "gout of the right side"}, {"text": "cut"}])
        >>> [sorted(one.probabilities) for one in found]
        [['no', 'yes'], ['no', 'yes']]
        """
        rows = by_role(examples, self.roles)
        found: list[Prediction] = []
        with bar(len(rows), "predicting", hidden=not progress or len(rows) <= _AT_ONCE) as shown:
            for start in range(0, len(rows), _AT_ONCE):
                some = rows[start : start + _AT_ONCE]
                found += self.loaded.task.predict(self.loaded, some)
                shown.update(len(some))
        return found

    def predict_frame(self, examples: Any, *, progress: bool = True) -> DataFrame:
        """Predictions beside what was asked, as a data frame.

        Returns
        -------
        DataFrame
            Of shape [examples, columns]: the roles, ``output``, and a column for each label's
            probability, named ``p(label)``. A data frame that was asked keeps its index.
        """
        rows = by_role(examples, self.roles)
        answers = self.predict(rows, progress=progress)
        found = frame(
            {
                **row,
                "output": answer.output,
                **{f"p({label})": p for label, p in answer.probabilities.items()},
            }
            for row, answer in zip(rows, answers, strict=True)
        )
        if hasattr(examples, "to_dict"):
            found.index = examples.index
        return found

    def answering(
        self,
        *,
        sampling: Sampling = GREEDY,
        threshold: float | None = None,
        temperature: str | PathLike[str] | None = None,
    ) -> Model:
        """The same model, answering in another way.

        Parameters
        ----------
        sampling : Sampling
            Of a language model: how its answers are drawn.
        threshold : float, optional
            Of token classification: how likely it must be that a word is part of anything.
        temperature : path, optional
            ``temperature.json`` of an evaluation: calibrates probabilities.

        Raises
        ------
        ModelError
            The task has no such setting.
        TemperatureUnfit
            The temperature is another model's.

        Examples
        --------
        >>> import silotune
        >>> silotune.load("runs/small", device="cpu").answering(threshold=0.2)
        Traceback (most recent call last):
        ...
        silotune.errors.ModelError: ST-300 text_classification finds nothing in a text
        """
        model, settings, task = self.loaded, dict(self.settings), self.plan.task
        if sampling != GREEDY:
            if not task.generates:
                raise ModelError(f"{self.plan.model.task} writes no text")
            model, settings["sampling"] = drawing(model, sampling), repr(sampling)
        if threshold is not None:
            if not task.each_token:
                raise ModelError(f"{self.plan.model.task} finds nothing in a text")
            model, settings["threshold"] = finding(model, threshold=threshold), threshold
        if temperature is not None:
            fitted = FittedTemperature.read(Path(temperature), model=fingerprint(model))
            model, settings["temperature"] = calibrated(model, fitted.value), fitted.value
        return Model(model, folder=self.folder, settings=settings)

    def answers(self, examples: Any) -> list[Answer | None]:
        """What `predict_file` writes beside each example; None to one without any text."""
        return answers_to(self.loaded, by_role(examples, self.roles))

    def predict_file(
        self,
        data: str | PathLike[str],
        out: str | PathLike[str] | None = None,
        *,
        columns: Mapping[str, str] | None = None,
        images: str | PathLike[str] | None = None,
        prefix: str = "",
        redact: bool = False,
        force: bool = False,
        progress: bool | Counting = True,
    ) -> Answered:
        """Write a file's records again, each with the model's answer; a killed call goes on.

        Parameters
        ----------
        data : path
            CSV, JSON lines, Parquet and others, perhaps packed; or a folder of images.
        out : path, optional
            Ends in .csv, .jsonl or .parquet; ``NAME.predictions.csv`` beside the data by default.
        columns : mapping of str to str, optional
            The column of each role, where it is not called like the role.
        images : path, optional
            The folder that paths of images are below; the file's own by default.
        prefix : str
            Before the names of the added columns.
        redact : bool
            Of token classification: texts are written with marks in place of what is found.
        force : bool
            Begin anew, whatever is there.
        progress : bool or context manager
            As for `silotune.evaluate`.

        Raises
        ------
        AnswersInTheWay
            `out` is there, or begun for another model, input or settings.
        DataError
            The records can't be read.

        Examples
        --------
        >>> import silotune
        >>> model = silotune.load("runs/small", device="cpu")
        >>> done = model.predict_file("notes.csv", columns={"text": "note"}, progress=False)
        >>> done.out.name, done.records
        ('notes.predictions.csv', 20)
        """
        named = {role: role for role in self.roles} | dict(columns or {})
        redaction = self._redaction(named) if redact else None
        with (
            given_by(Path(data), named, images=None if images is None else Path(images)) as given,
            counting(progress, "answering") as (started, advance),
        ):
            done = answer_file(
                self.loaded,
                given,
                _beside(Path(data)) if out is None else Path(out),
                prefix=prefix,
                options=self.settings | ({"redact": True} if redact else {}),
                revise=redaction or (lambda block, answers: block),
                force=force,
                started=started,
                advance=advance,
            )
        return done if redaction is None else replace(done, found=dict(redaction.found))

    def _redaction(self, columns: Mapping[str, str]) -> Redaction:
        if not self.plan.task.each_token:
            raise ModelError(f"{self.plan.model.task} finds nothing in a text")
        column = columns[self.roles[0]]
        if pieces_of(column) is not None:
            raise ColumnMissing("one column is redacted, and not a text of several")
        return Redaction(column)


def _beside(data: Path) -> Path:
    """``notes.predictions.csv`` for ``notes.csv`` and ``notes.csv.gz``, or for a folder ``notes``."""
    if data.is_dir():
        data = data.resolve()
        return data.with_name(f"{data.name}.predictions.csv")
    kind = format_of(data)
    end = f".{kind}" if kind in WRITTEN else ".csv"
    return data.with_name(f"{data.name.split('.')[0]}.predictions{end}")


def by_role(examples: Any, roles: Sequence[str]) -> list[dict[str, str]]:
    """Examples as a task takes them. Raises `ColumnMissing`, which quotes none."""
    if hasattr(examples, "to_dict"):
        examples = examples.to_dict("records")
    if isinstance(examples, str | Mapping):
        raise TypeError("examples are a list of texts or of mappings, not one of them")
    return list(_by_role(examples, roles))


def _by_role(examples: Any, roles: Sequence[str]) -> Iterator[dict[str, str]]:
    for number, example in enumerate(examples, start=1):
        row = {roles[0]: example} if isinstance(example, str) else example
        known = row if isinstance(row, Mapping) else {}
        if missing := [role for role in roles if not isinstance(known.get(role), str)]:
            raise ColumnMissing(
                f"example {number} has no text under {missing[0]!r}",
                remedy=f"Give a text, or a mapping with {', '.join(roles)}.",
            )
        yield {role: row[role] for role in roles}
