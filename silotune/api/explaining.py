"""Which tokens of texts speak for a model's answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path

from silotune.api.model import Model, loaded_of, plan_of
from silotune.inference import explanation
from silotune.inference.explanation import Explanation
from silotune.inference.records import Given

Example = Mapping[str, str]
FIRST = 10
"""Records of a file that are explained where none are named."""


def explain(
    model: Model | str | PathLike[str],
    texts: Iterable[str | Example],
    *,
    label: str = "",
    base: str | None = None,
    device: str = "auto",
) -> Iterator[Explanation]:
    """Explain the labels of texts, by integrated gradients; it stays on this machine.

    Parameters
    ----------
    model : Model, Run or path
        Of a task that gives a text, or a pair of texts, one label or several.
    texts : iterable of str or mapping
        What is explained, one after the other; the texts of a pair by role.
    label : str
        The label to explain; the likeliest where it is empty.
    base, device
        As for `silotune.load`.

    Yields
    ------
    Explanation
        Of each text: ``label``, ``probability``, ``tokens`` with what each adds to the label's logit,
        and whether these add up (``complete``).

    Raises
    ------
    EnvironmentFault
        captum is not here: ``pip install 'silotune[explain]'``.
    ModelError
        The task gives no such labels, or the model has no such label.

    Examples
    --------
    >>> import silotune
    >>> found, = silotune.explain("runs/small", ["gout of the left side"], device="cpu")
    >>> found.complete, abs(sum(part for _, part in found.tokens) - found.total) < 1e-6
    (True, True)
    """
    explanation.require_captum()  # before a model is loaded, which takes time
    explanation.require_explainable(plan_of(model))
    asked = loaded_of(model, base=base, device=device)
    first = next(iter(asked.roles), "text")
    for text in texts:
        example = {first: text} if isinstance(text, str) else text
        yield explanation.explain(asked.loaded, example, label=label)


def given_records(
    data: str | PathLike[str], columns: Mapping[str, str], *, rows: Sequence[int] = ()
) -> list[tuple[int, dict[str, str]]]:
    """Records of a file to explain: each with its row, by role.

    Parameters
    ----------
    data : path
        Of any format that `silotune predict --data` reads.
    columns : mapping of str to str
        The column of each role that the model reads.
    rows : sequence of int
        Which, as a spreadsheet numbers them; the first `FIRST` where it is empty.

    Raises
    ------
    DataError
        The file can't be read, or has no such row; the message quotes none.
    """
    return Given(path=Path(data), roles=dict(columns), strict=False).chosen(rows, first=FIRST)
