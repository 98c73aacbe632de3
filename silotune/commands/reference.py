"""`silotune errors` and `events`: error codes and the event schema, for people and for programs.

Both also make their page: docs/errors.md, docs/events.md.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from pydantic.fields import FieldInfo

from silotune.commands.folder import AsJson
from silotune.errors import SilotuneError, catalogue
from silotune.events.schema import KINDS, SCHEMA_VERSION, Event, kind_of
from silotune.terminal import terminal

_ERRORS_HEAD = """# Error codes

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
    as_json: AsJson = False,
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
    sections = [_ERRORS_HEAD, _family_table(families())]
    for family in families():
        sections.append(
            f"## {family.code}: {_plain(family.title)} (exit code {family.exit_code})\n"
        )
        own = [e for e in catalogue() if issubclass(e, family)]
        sections += [_entry(error) for error in ([family] if family is SilotuneError else own)]
    return "\n".join(sections)


def families() -> list[type[SilotuneError]]:
    """The root and the classes just below it, by code: each owns one exit code."""
    return [e for e in catalogue() if e is SilotuneError or SilotuneError in e.__bases__]


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


_EVENTS_HEAD = f"""# Events

What happens in a run or a federation is told in events: flat JSON objects, one schema for a
simulation's `events.jsonl`, the coordinator's store, the gRPC stream (`silotune admin watch`), the
dashboard, webhooks and alerts. This page is generated: `silotune events --markdown > docs/events.md`.
`silotune events --json` prints the same as a JSON Schema.

Schema version {SCHEMA_VERSION}. A kind never changes its meaning; no field is ever removed or retyped.
New kinds and new optional fields may come: readers must pass over what they don't know. Figures may
be `null`: not finite, or not known.

```json
{{"id":812,"time":1795321642.61,"event":"site_replied","run":"icd-20261122","round":7,"site":"north","bytes":3080}}
```

Every event has these fields:

"""


def events(
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the page docs/events.md.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """List the kinds of events that runs and federations tell."""
    if markdown:
        typer.echo(events_page(), nl=False)
    elif as_json:
        typer.echo(json.dumps(json_schema(), indent=2))
    else:
        for model in KINDS:
            typer.echo(f"{kind_of(model):20} {_about(model)}")


def events_page() -> str:
    """The page docs/events.md, in Markdown."""
    return _EVENTS_HEAD + _table(Event, common=True) + "".join(_section(model) for model in KINDS)


def json_schema() -> dict[str, Any]:
    """A JSON Schema (draft 2020-12) that every event of this version satisfies."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "silotune event",
        "version": SCHEMA_VERSION,
        "oneOf": [model.model_json_schema(by_alias=True) for model in KINDS],
    }


def _about(model: type[Event]) -> str:
    return (model.__doc__ or "").strip()


def _section(model: type[Event]) -> str:
    return f"\n## `{kind_of(model)}`\n\n{_about(model)}\n\n{_table(model)}"


def _table(model: type[Event], *, common: bool = False) -> str:
    own = {
        name: field
        for name, field in model.model_fields.items()
        if common or name not in Event.model_fields
    }
    if not own:
        return "No further fields.\n"
    rows = [
        f"| `{name}` | {_type(field)} | {'yes' if field.is_required() else 'no'} "
        f"| {field.description or ''} |"
        for name, field in own.items()
    ]
    return "\n".join(["| field | type | always | |", "|---|---|---|---|", *rows, ""])


_NAMES = {
    "str": "text",
    "int": "integer",
    "float": "number",
    "float | None": "number or null",
    "int | None": "integer or null",
    "str | None": "text or null",
    "tuple[str, ...]": "list of text",
    "dict[str, float | None]": "object of numbers or null",
    "dict[str, dict[str, float | None]]": "object of objects of numbers or null",
}


def _type(field: FieldInfo) -> str:
    """The type in words that need no Python."""
    annotation = field.annotation
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    text = text.replace("typing.", "").replace("pathlib.", "")
    if text.startswith("Literal["):
        return "one of " + text[8:-1].replace("'", "`")
    return _NAMES.get(text, text.replace("|", "\\|"))
