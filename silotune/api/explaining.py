"""Which tokens of texts speak for a model's answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from os import PathLike

from silotune.api.model import Model, load
from silotune.inference import explanation
from silotune.inference.explanation import Explanation


def explain(
    model: Model | str | PathLike[str],
    texts: Iterable[str],
    *,
    label: str = "",
    base: str | None = None,
    device: str = "auto",
) -> Iterator[Explanation]:
    """Explain the labels of texts, by integrated gradients; it stays on this machine.

    Parameters
    ----------
    model : Model, Run or path
        Of a task that gives a text one label.
    texts : iterable of str
        What is explained, one after the other.
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
    asked = model if isinstance(model, Model) else load(model, base=base, device=device)
    first = next(iter(asked.roles), "text")
    for text in texts:
        yield explanation.explain(asked.loaded, {first: text}, label=label)
