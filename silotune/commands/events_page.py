"""`silotune events`: the event schema, for people and for programs; also makes docs/events.md."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from pydantic.fields import FieldInfo

from silotune.events.schema import KINDS, SCHEMA_VERSION, Event, kind_of

_HEAD = f"""# Events

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
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON Schema.")] = False,
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
    return _HEAD + _table(Event, common=True) + "".join(_section(model) for model in KINDS)


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
    "float | None": "number or null",
    "int | None": "integer or null",
    "str | None": "text or null",
}


def _type(field: FieldInfo) -> str:
    """The type in words that need no Python."""
    annotation = field.annotation
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    text = text.replace("typing.", "").replace("pathlib.", "")
    if text.startswith("Literal["):
        return "one of " + text[8:-1].replace("'", "`")
    plain = {"str": "text", "int": "integer", "float": "number"}
    structured = {
        "tuple[str, ...]": "list of text",
        "dict[str, float | None]": "object of numbers or null",
        "dict[str, dict[str, float | None]]": "object of objects of numbers or null",
    }
    return {**plain, **_NAMES, **structured}.get(text, text.replace("|", "\\|"))
