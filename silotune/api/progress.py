"""What is shown while something takes time: the command line's display, or a bar in a notebook."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from rich.console import Console

from silotune.events.view import RunView
from silotune.simulation.progress import Progress, round_line
from silotune.terminal import headed, terminal

Listener = Callable[[Mapping[str, Any]], None]
Say = Callable[[str], None]
Counting = AbstractContextManager[tuple[Callable[..., None], Callable[[int], None]]]
"""Tells, by two functions, how many records there are, done already included, and were looked at."""


def silent(said: object) -> None:
    """Show nothing."""


def console_of(progress: bool | Console) -> Console | None:
    """Where progress goes: a console that was given, the usual one, or nowhere."""
    if isinstance(progress, Console):
        return progress
    return terminal() if progress else None


def noting(console: Console | None) -> Say:
    """Print sentences that whoever simulates should know."""
    if console is None:
        return silent

    def note(sentence: str) -> None:
        line = headed("Note.", f"{sentence}.", style="yellow")
        console.print(line, soft_wrap=not console.is_terminal)

    return note


@contextmanager
def rounds(console: Console | None) -> Iterator[Listener]:
    """Show a run as it goes on, by its events."""
    if console is None:
        yield silent
    elif console.is_jupyter:
        with bar(0, "rounds") as shown:
            yield _Rounds(shown)
    else:
        with Progress(console) as progress:
            yield progress


@contextmanager
def attacking(console: Console | None) -> Iterator[Say]:
    """Show which attack is under way."""
    if console is None:
        yield silent
    elif not console.is_terminal:
        yield console.print
    else:
        with console.status("Attacking") as status:
            yield status.update


@contextmanager
def bar(total: int, title: str, *, hidden: bool = False) -> Iterator[Any]:
    """A bar of tqdm: a widget in a notebook that has widgets, a line of text anywhere else."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a notebook without widgets is told so by tqdm at import
        from tqdm.auto import tqdm
    with tqdm(total=total, desc=title, disable=hidden, dynamic_ncols=True) as shown:
        yield shown


def counting(progress: bool | Counting, title: str) -> Counting:
    """What tells how far records have come: what was given, or a bar that is shown or not."""
    return _bar(title, hidden=not progress) if isinstance(progress, bool) else progress


@contextmanager
def _bar(
    title: str, *, hidden: bool
) -> Iterator[tuple[Callable[..., None], Callable[[int], None]]]:
    with bar(0, title, hidden=hidden) as shown:

        def started(total: int, before: int, title: str = title) -> None:
            shown.reset(total)
            shown.set_description(title, refresh=False)
            shown.update(before)

        def advance(records: int) -> None:
            shown.update(records)

        yield started, advance


class _Rounds:
    """A bar over the rounds of a run, with its newest score and epsilon behind it."""

    def __init__(self, shown: Any) -> None:
        self._shown, self._view = shown, RunView("")

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Take note of one event."""
        view = self._view
        view.extend([event])
        if event.get("event") in {"run_started", "round_finished", "evaluated", "run_resumed"}:
            self._shown.total, self._shown.n = view.planned, view.done
            if view.finished_rounds:
                _, _, words = round_line(view).partition(": ")
                self._shown.set_postfix_str(words, refresh=False)
            self._shown.refresh()
        elif found := view.baseline:
            self._shown.set_postfix_str(f"baseline {found.number} of {found.of}")
