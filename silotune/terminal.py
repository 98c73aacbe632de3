"""The terminal: what is printed is what was said, and nothing in it is read as markup.

Rich reads ``[policy]`` and ``:x:`` in any text as a style and an emoji, and leaves them out. So every
console of the product comes from here, with both switched off; a style is given by
`rich.text.Text`. Help texts, which Typer has Rich read, are made literal in one place, too.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from typer.core import TyperArgument, TyperGroup
from typer.models import ArgumentInfo
from typer.utils import get_params_from_function


def terminal(*, stderr: bool = False) -> Console:
    """A console that prints texts as they are."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


def show_rows(rows: Iterable[Mapping[str, object]], columns: Sequence[str]) -> None:
    """Print a table; what doesn't fit is folded, but a site's six words are never broken."""
    table = Table()
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column == "words")
    for row in rows:
        table.add_row(*(_cell(column, str(row[column])) for column in columns))
    terminal().print(table)


def _cell(column: str, text: str) -> str:
    if column != "words":
        return text
    words = text.split("-")
    return "-\n".join("-".join(words[i : i + 2]) for i in range(0, len(words), 2))


def headed(heading: str, rest: str, *, style: str = "bold", indent: int = 0) -> Text:
    """A line that begins with a styled word or two."""
    return Text.assemble(" " * indent, (heading, style), " ", rest)


def say(sentence: str, *, stderr: bool = False) -> None:
    """Print a sentence: broken between words on a terminal, in one line anywhere else."""
    console = terminal(stderr=stderr)
    console.print(sentence, soft_wrap=not console.is_terminal)


_LAYOUT = "\n\t\xa0\u202f\u3000\xad\u200d"  # breaks and spaces of every script, joiners


def inert(text: str, *, keep: str = _LAYOUT) -> str:
    """A text from outside, without control or direction marks, which a terminal would obey."""
    return "".join(c if c.isprintable() or c in keep else "\N{REPLACEMENT CHARACTER}" for c in text)


def octets(number: float) -> str:
    """Bytes for a reader: ``76.8 kB``."""
    for divisor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= divisor:
            return f"{number / divisor:.1f} {unit}"
    return f"{number:.0f} B"


class LiteralGroup(TyperGroup):
    """The root of the command line: shows every help text below it as it was written."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        _make_literal(self)


def _make_literal(command: click.Command) -> None:
    if command.help:
        command.help = _literal(command.help)
    if command.epilog:
        command.epilog = _literal(command.epilog)
    for parameter in command.params:
        if isinstance(parameter, TyperArgument) and command.callback is not None:
            # Typer 0.20 loses the help of arguments with Click 8.5, which has one of its own.
            info = get_params_from_function(command.callback)[str(parameter.name)].default
            parameter.help = info.help if isinstance(info, ArgumentInfo) else None
        if text := getattr(parameter, "help", None):
            parameter.help = _literal(text)
    for sub in getattr(command, "commands", {}).values():
        _make_literal(sub)


def _literal(text: str) -> str:
    """A help text that Rich shows as it is, its paragraphs filled to the width of the terminal."""
    paragraphs = inspect.cleandoc(text).split("\n\n")
    return "\n\n".join(escape(" ".join(part.split())) for part in paragraphs)
