"""What is done with a trained adapter for others: `silotune serve` and `silotune export adapter`."""

from __future__ import annotations

import json
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import click
import typer
from typer.core import TyperGroup

from silotune.commands.asked import Base, Device, Trained
from silotune.commands.folder import AsJson
from silotune.commands.results import export as curves
from silotune.terminal import say, terminal


def serve(  # noqa: PLR0917 - one a command-line option
    path: Trained,
    host: Annotated[
        str, typer.Option(help="Address to listen on; any other than this machine's needs TLS.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8080,
    token_file: Annotated[
        Path | None,
        typer.Option(
            help="File (mode 0600) whose first line is the token; made if it isn't there. Without "
            "it a token is made and printed once."
        ),
    ] = None,
    tls_certificate: Annotated[Path | None, typer.Option(help="Of the server, in PEM.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its private key, in PEM.")] = None,
    batch: Annotated[
        int, typer.Option(min=1, max=1024, help="Examples that are computed together.")
    ] = 32,
    waiting: Annotated[
        int, typer.Option(min=1, help="Examples that may wait; more are refused with 503.")
    ] = 512,
    deadline: Annotated[
        float, typer.Option(min=0.1, help="Seconds that a request may take, waiting included.")
    ] = 30.0,
    base: Base = None,
    device: Device = "auto",
) -> None:
    """Serve a trained model over HTTP until Ctrl-C: JSON in, JSON out, described by /openapi.json.

    POST /v1/predict answers examples, POST /v1/chat/completions (of a language model) conversations as
    OpenAI's API does. Every request needs the token (Authorization: Bearer TOKEN), but for /health.
    /metrics is for Prometheus. Texts are neither logged nor kept.
    """
    # Judged before the model is loaded, which takes time.
    from silotune.api.model import load, plan_of
    from silotune.serving.app import Limits, require_served
    from silotune.serving.server import Place, token_of
    from silotune.serving.server import serve as serving

    place = Place(host=host, port=port, certificate=tls_certificate, key=tls_key)
    place.require_allowed(own_token=token_file is not None)
    require_served(plan_of(path))
    token, new = token_of(token_file)
    with terminal(stderr=True).status("Loading the model"):
        model = load(path, base=base, device=device)

    def said(url: str) -> None:
        if token_file is None:
            say(f"Token (shown this once): {token}")
        elif new:
            say(f"A new token is in {token_file}")
        say(f"Serving {model.plan.plan.name} at {url}; Ctrl-C ends it")

    limits = Limits(batch=batch, waiting=waiting, seconds=deadline)
    serving(model, token=token, place=place, said=said, limits=limits)


class _Exports(TyperGroup):
    """`silotune export RUN --to tensorboard`, as it was before there was more to export, is `curves`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse, with the name of the command that was left out."""
        if args and args[0] not in {*self.commands, "--help"}:
            args = ["curves", *args]
        return super().parse_args(ctx, args)


exports = typer.Typer(
    cls=_Exports,
    no_args_is_help=True,
    help="Write a run's curves, or its adapter, for other programs.",
)
exports.command("curves")(curves)


class ExportForm(StrEnum):
    """What other programs load."""

    PEFT = "peft"
    MERGED = "merged"
    ONNX = "onnx"
    INT8 = "int8"


@exports.command("adapter")
def adapter(  # noqa: PLR0917 - one a command-line option
    path: Trained,
    to: Annotated[Path, typer.Option(help="Folder to make.")],
    form: Annotated[
        ExportForm,
        typer.Option(
            "--format",
            help="peft: the adapter, for PEFT. merged: the whole model, for Transformers. onnx: one "
            "graph, head included. int8: that graph with 8-bit weights.",
        ),
    ] = ExportForm.PEFT,
    base: Base = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="Largest difference of an answer that is let pass, in parts of the largest: 1e-4 for "
            "peft, 1e-3 for merged and onnx, 0.1 for int8.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a trained adapter in a form that other programs load, and show that it answers alike.

    What was written is loaded again by those programs' own means and asked about public texts; if an
    answer differs by more than the tolerance, nothing is left. The sites' certificates, the card and a
    signed release travel with it. onnx and int8 need `pip install 'silotune[onnx]'`.
    """
    from silotune.api.exporting import export_adapter

    console = terminal(stderr=True)
    with console.status(f"Writing {form} and comparing its answers"):
        made = export_adapter(path, to, form=form.value, base=base, tolerance=tolerance)
    if as_json:
        facts: dict[str, Any] = asdict(made) | {"folder": str(made.folder)}
        typer.echo(json.dumps(facts))
        return
    say(
        f"Wrote {made.folder} ({form}). About {made.texts} public texts its answers differ from "
        f"the adapter's by {made.difference:.2g} of the largest at most; {made.tolerance:.2g} passes."
    )
    signed = "a signed release" if made.released else "no signed release"
    say(f"With it go {made.certificates} certificates of sites and {signed}.")
    if not made.released:
        say(
            "It has not passed the gate: `silotune release` says what must be shown before it leaves."
        )
