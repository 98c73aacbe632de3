"""`silotune explain`: which tokens of a text speak for an answer."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from silotune.commands.folder import AsJson
from silotune.commands.predict import Base, Device, Trained
from silotune.terminal import terminal

if TYPE_CHECKING:
    from silotune.inference.explanation import Explanation

_STRONG, _WEAK = 0.5, 0.15  # of the largest part


def explain(  # noqa: PLR0917 - one a command-line option
    run: Trained,
    texts: Annotated[list[str], typer.Argument(help="Texts to explain the labels of.")],
    label: Annotated[
        str, typer.Option(help="The label to explain; the likeliest when absent.")
    ] = "",
    base: Base = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Say which tokens of a text speak for a label, and which against it; on this machine only.

    Integrated gradients: what all tokens add is the label's logit less that of a text of padding, which
    is checked and told. In a terminal, tokens that speak for the label are green and underlined, those
    against it red; the strongest are bold. It shows what the model looks at, and not what is so. Needs
    `pip install 'silotune[explain]'`.

    It prints records: for this site's own people.
    """
    from silotune.api.explaining import explain as explained

    found_all = explained(run, texts, label=label, base=base, device=device)
    for text, found in zip(texts, found_all, strict=True):
        if as_json:
            typer.echo(json.dumps({"text": text, **asdict(found)}))
        else:
            _print(found)


def _print(found: Explanation) -> None:
    console = terminal()
    console.print(Text(f"{found.label}  {found.probability:.0%}", style="bold"))
    most = max((abs(part) for _, part in found.tokens), default=0.0) or 1.0
    words = [Text(word, style=_style(part / most)) for word, part in found.tokens]
    console.print(Text(" ").join(words))
    strongest = sorted(found.tokens, key=lambda token: -abs(token[1]))[:8]
    for word, part in strongest:
        console.print(f"  {part:+.3f}  {word}")
    holds = "as it should be" if found.complete else "which is NOT close: don't rely on it"
    console.print(
        f"All tokens add {found.total:+.3f} to the logit; it differs by {found.difference:+.3f} from "
        f"that of padding ({found.steps} steps), {holds}.",
        style="dim" if found.complete else "bold red",
    )


def _style(part: float) -> str:
    """How a token is shown, by its part of the strongest one's."""
    if abs(part) < _WEAK:
        return ""
    bold = "bold " if abs(part) >= _STRONG else ""
    return f"{bold}green underline" if part > 0 else f"{bold}red"
