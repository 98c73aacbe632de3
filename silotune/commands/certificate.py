"""``silotune certificate``: check what a site says a run has cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from silotune.terminal import headed, terminal

if TYPE_CHECKING:
    from silotune.privacy.certificate import Measured, Verified

app = typer.Typer(
    no_args_is_help=True,
    help="""Check privacy certificates.

    At the end of a run each site signs a certificate: the privacy unit, epsilon and delta, and the
    events they follow from. Anybody can check one, offline, with this command alone.
    """,
)


@app.callback()
def _group() -> None:
    """Keep `verify` a command of its own while it is the only one."""


@app.command()
def verify(
    path: Annotated[Path, typer.Argument(exists=True, help="The certificate.json of a site.")],
    key: Annotated[
        str | None,
        typer.Option(
            "--key",
            metavar="SHA256",
            help="Fingerprint of the site's key, from a source other than this file.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Check the signature and compute epsilon again from the events; exit 40 if they disagree.

    Without --key this shows that nothing was changed after signing, not who signed: compare the
    fingerprint with the one the site tells you.
    """
    from silotune.privacy import certificate

    verified = certificate.verify(path, key_sha256=key)
    if as_json:
        shown = {
            "valid": True,
            "epsilon": verified.epsilon,
            "key_sha256": verified.key_sha256,
            "key_known": key is not None,
            "certificate": verified.body.model_dump(mode="json"),
        }
        typer.echo(json.dumps(shown, indent=2))
        return
    console = terminal()
    console.print(headed("Valid.", f"{verified.body.statement}."))
    table = Table(show_header=False)
    for name, value in _rows(verified).items():
        table.add_row(name, value)
    console.print(table)
    if key is None:
        console.print("Compare the key's fingerprint with the one the site tells you.")


def _rows(verified: Verified) -> dict[str, str]:
    body = verified.body
    return {
        "site": body.site,
        "run": body.run,
        "dataset": body.dataset,
        "unit": f"{body.unit} ({body.adjacency_in_words})",
        "epsilon, recomputed": f"{verified.epsilon:.6f} at delta = {body.delta:g}",
        "mechanisms": "\n".join(
            f"{m.times} x Gaussian, sigma {m.sigma:.4f}, rate {m.rate:.4g}" for m in body.mechanisms
        ),
        "epsilon against": "\n".join(f"{to}: {epsilon:.4f}" for to, epsilon in body.exposed_to),
        "measured": _measured(body.measured),
        "clipping": ", ".join(f"{name} {norm:g}" for name, norm in body.clips.items()),
        "noise": body.noise_in_words,
        "accountant": body.accountant_in_words,
        "plan": body.plan_sha256,
        "base model": body.model_sha256,
        "ledger": f"row {body.ledger_seq}, {body.ledger_head}",
        "signed": f"{body.time} by silotune {body.code_version}",
        "key": verified.key_sha256,
    }


def _measured(measured: Measured | None) -> str:
    """What attacks reached, beside what is proven."""
    if measured is None:
        return "no attack was tried"
    bounds = {"one step": measured.audit, "the adapter": measured.membership}
    lines = [
        f"{name}: at least {bound.lower_bound:.2f} of {bound.claimed:.2f}, {bound.canaries} canaries"
        for name, bound in bounds.items()
        if bound is not None
    ]
    return "\n".join(
        [*lines, f"at {measured.confidence:.0%} confidence; a low bound proves nothing"]
    )
