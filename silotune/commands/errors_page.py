"""`silotune errors`: every error code with its cause and remedy; also the source of docs/errors.md."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated

import typer

from silotune.errors import SilotuneError, catalogue
from silotune.terminal import terminal

_HEAD = """# Error codes

Every error that silotune raises on purpose has a stable code. The command line prints the code, what
happened, why, and what to do, and exits with the exit code of the error's family. Between a site and
the coordinator only the code travels, never the detail. `silotune errors CODE` explains one code.

This page is generated: `silotune errors --markdown > docs/errors.md`.
"""

_JSON_FIELDS = ("code", "title", "cause", "advice", "exit_code")


def errors(
    code: Annotated[
        str | None, typer.Argument(help="One code, e.g. ST-401; all of them when left out.")
    ] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the page docs/errors.md.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON array.")] = False,
) -> None:
    """Explain error codes: cause, remedy and exit code."""
    if markdown:
        typer.echo(errors_page(), nl=False)
        return
    shown = [error for error in catalogue() if code in (None, error.code)]
    if not shown:
        raise typer.BadParameter(f"{code} is not a code of this version", param_hint="CODE")
    if as_json:
        rows = [{field: getattr(error, field) for field in _JSON_FIELDS} for error in shown]
        typer.echo(json.dumps(rows))
        return
    console = terminal()
    for error in shown:
        console.print(f"{error.code}  {error.title}", style="bold")
        console.print(f"  Why: {error.cause}\n  Do:  {error.advice}")


def errors_page() -> str:
    """The page docs/errors.md, in Markdown: a section a family, each with its exit code."""
    sections = [_HEAD, _family_table(families())]
    for family in families():
        sections.append(
            f"## {family.code}: {_plain(family.title)} (exit code {family.exit_code})\n"
        )
        sections += [_entry(error) for error in catalogue() if _belongs(error, family)]
    return "\n".join(sections)


def families() -> list[type[SilotuneError]]:
    """The root and the classes just below it, by code: each owns one exit code."""
    return [e for e in catalogue() if e is SilotuneError or SilotuneError in e.__bases__]


def _belongs(error: type[SilotuneError], family: type[SilotuneError]) -> bool:
    if family is SilotuneError:
        return error is SilotuneError
    return issubclass(error, family)


def _family_table(found: Sequence[type[SilotuneError]]) -> str:
    rows = [f"| {f.exit_code} | [{f.code}](#{f.code.lower()}) | {_plain(f.title)} |" for f in found]
    return "\n".join(["| exit code | family | |", "|---|---|---|", *rows, ""])


def _entry(error: type[SilotuneError]) -> str:
    return (
        f'<a id="{error.code.lower()}"></a>\n'
        f"**{error.code} {_plain(error.title)}.** {_plain(error.cause)}<br>\n"
        f"*What to do:* {_plain(error.advice)}\n"
    )


def _plain(text: str) -> str:
    """A sentence for Markdown; placeholders in angle brackets must not become HTML."""
    return text.replace("<", "&lt;").replace("|", "\\|")
