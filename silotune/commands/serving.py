"""What is done with a trained adapter for others: `silotune serve` and `silotune export adapter`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from silotune.terminal import say


def serve(  # noqa: PLR0917 - one a command-line option
    path: Annotated[
        Path,
        typer.Argument(help="A finished run's directory, or an adapter's.", show_default=False),
    ],
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
    base: Annotated[
        str | None,
        typer.Option(help="Where the base model is here, if not where the plan says."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Serve a trained model over HTTP until Ctrl-C: JSON in, JSON out, described by /openapi.json.

    POST /v1/predict answers examples, POST /v1/chat/completions (of a language model) conversations as
    OpenAI's API does. Every request needs the token (Authorization: Bearer TOKEN), but for /health.
    /metrics is for Prometheus. Texts are neither logged nor kept.
    """
    # Judged before the model is loaded, which takes time.
    from silotune.api.model import load
    from silotune.serving.app import Limits
    from silotune.serving.server import Place, token_of
    from silotune.serving.server import serve as serving

    place = Place(host=host, port=port, certificate=tls_certificate, key=tls_key)
    place.require_allowed(own_token=token_file is not None)
    token, new = token_of(token_file)
    model = load(path, base=base, device=device)

    def said(url: str) -> None:
        if token_file is None:
            say(f"Token (shown this once): {token}")
        elif new:
            say(f"A new token is in {token_file}")
        say(f"Serving {model.plan.plan.name} at {url}; Ctrl-C ends it")

    limits = Limits(batch=batch, waiting=waiting, seconds=deadline)
    serving(model, token=token, place=place, said=said, limits=limits)
