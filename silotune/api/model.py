"""A trained model, ready to be asked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from silotune.api.frames import frame
from silotune.api.progress import bar
from silotune.errors import ColumnMissing
from silotune.models.prediction import Prediction
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


def plan_of(path: str | PathLike[str]) -> Plan:
    """The plan of what was trained, without loading it. Raises as `load` does."""
    return find_trained(Path(path)).plan


class Model:
    """A base model with a trained adapter. Make one with `silotune.load`.

    Attributes
    ----------
    loaded : LoadedModel
        The model itself, for whoever wants PyTorch: ``loaded.module``, ``loaded.tokenizer``.
    folder : Path
        The adapter's folder.
    """

    def __init__(self, loaded: LoadedModel, *, folder: Path) -> None:
        self.loaded, self.folder = loaded, folder

    def __repr__(self) -> str:
        return f"<silotune model {self.loaded.description}>"

    @property
    def plan(self) -> Plan:
        """The plan that it was trained by."""
        return self.loaded.plan

    @property
    def roles(self) -> tuple[str, ...]:
        """What an example consists of, by role: ``("text",)`` for a text classifier."""
        return roles_asked(self.plan)

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


def roles_asked(plan: Plan) -> tuple[str, ...]:
    """The roles of an example that is asked about: without what is to be predicted."""
    return plan.task.reads


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
