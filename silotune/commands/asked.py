"""What commands share that ask a trained model: the options, columns by role, and a bar over records."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from silotune.terminal import terminal

if TYPE_CHECKING:
    from silotune.plan.plan import Plan

Trained = Annotated[
    Path,
    typer.Argument(
        metavar="RUN|ADAPTER",
        help="A finished run's directory, in runs/, or the folder of its adapter.",
        show_default=False,
    ),
]
Base = Annotated[
    str | None,
    typer.Option(help="Where the base model is on this machine, if not where the plan says."),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
ColumnOption = Annotated[
    list[str] | None,
    typer.Option(
        "--column",
        metavar="[ROLE=]NAME",
        help="The column of a role, if it is not called as the role: --column text=note, or "
        "--column note for the first thing that the model reads. '{title}: {body}' puts columns "
        "together. Repeatable.",
    ),
]

Images = Annotated[
    Path | None,
    typer.Option(
        help="Of a task on images: the folder that paths are below; the table's own if absent."
    ),
]


def require_sees(plan: Plan, images: Path | None) -> None:
    """Refuse a folder of images where none are read."""
    if images is not None and not plan.task.sees:
        raise typer.BadParameter(f"{plan.model.task} reads no images", param_hint="--images")


def named_columns(
    given: Sequence[str], roles: Sequence[str], *, made_of: Mapping[str, str] | None = None
) -> dict[str, str]:
    """The column of each role, as ``--column`` names it, else called as the role is.

    A role may be made of another one that `made_of` names it by: a text of its words.
    """
    found = {role: role for role in roles}
    for text in given:
        role, sign, column = text.partition("=")
        if sign and (made_of or {}).get(role) in roles:
            found.pop((made_of or {})[role], None)
            found[role] = column
        elif sign and role in found:
            found[role] = column
        elif sign and role.isidentifier() and column and " " not in role:
            raise typer.BadParameter(
                f"there is no role {role!r}; there are {', '.join(roles)}", param_hint="--column"
            )
        else:
            found[roles[0]] = text
    return found


def in_turn(texts: Sequence[str], roles: Sequence[str]) -> list[dict[str, str]]:
    """Texts of the command line by role: of a pair, one after the other."""
    size = len(roles)
    if len(texts) % size:
        raise typer.BadParameter(
            f"the model reads {' and '.join(roles)}: give {size} texts a record"
        )
    return [
        dict(zip(roles, texts[start : start + size], strict=True))
        for start in range(0, len(texts), size)
    ]


@contextmanager
def counted(title: str) -> Iterator[tuple[Any, Any]]:
    """A bar over records on a terminal; nothing anywhere else. Gives what starts and advances it."""
    console = terminal(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(
        *columns,
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bars:
        task = bars.add_task(title, total=None)

        def started(total: int, done: int, title: str = title) -> None:
            bars.reset(task, total=total, completed=done, description=title)

        yield started, lambda records: bars.advance(task, records)
