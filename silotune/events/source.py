"""Where runs are read from: a coordinator's store, or the run directories of simulations.

Pages, streams and metrics know only `Source`; so a simulation opens in the very pages that show a
federation. `Feed` tells events as they come to any number of watchers: each is read once, whoever
watches.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import threading
import time
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from silotune.errors import FileNotOffered, RunDirectoryInvalid, RunNotFound
from silotune.events.view import RunView

Row = dict[str, Any]
"""An event as flat JSON data, with its ``id``."""


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What is known of a run without reading its events.

    `state` is ``proposed``, ``running``, ``paused``, ``finished``, ``stopped`` or ``failed``, or of a
    simulation whose process died ``interrupted``; times are Unix times; `plan` is the plan as plain
    data.
    """

    run: str
    name: str
    purpose: str
    state: str
    round: int
    rounds: int
    proposed_at: float | None
    plan_sha256: str = ""
    plan: Mapping[str, Any] = field(default_factory=dict)

    @property
    def planned_epsilon(self) -> float | None:
        """The plan's epsilon; None without differential privacy."""
        section = self.plan.get("privacy") or {}
        return section.get("epsilon") if section.get("mode", "none") != "none" else None


@dataclass(frozen=True, kw_only=True)
class SiteFacts:
    """A site of the federation.

    `status` is ``active`` or ``revoked``; `last_seen` the Unix time until which its heartbeats were
    good; `words` its identity in six words; `books` says why its books are not those that were signed
    last, and is empty if they are.
    """

    site: str
    status: str
    online: bool
    last_seen: float | None
    words: str
    certificate_sha256: str = ""
    books: str = ""


@dataclass(frozen=True, kw_only=True)
class RequestFacts:
    """A request to be enrolled: ``waiting``, ``approved`` or ``refused``, and why."""

    request: str
    site: str
    state: str
    reason: str
    requested_at: float
    words: str


@dataclass(frozen=True)
class FileOffer:
    """A file that may be downloaded."""

    name: str
    title: str


class Readable(Protocol):
    """Where the events of something that goes on are read: any `Source`."""

    def facts(self, run: str) -> RunFacts:
        """Its state."""

    def events(self, run: str, *, after: int = 0) -> list[Row]:
        """Events behind an id, oldest first."""


class Source(Readable, Protocol):
    """Runs and their events, for readers. Safe for threads."""

    def runs(self) -> list[RunFacts]:
        """Every run, newest first."""

    def events(self, run: str, *, after: int = 0, limit: int = 100_000) -> list[Row]:
        """Events behind an id, oldest first; ids only grow. Raises `RunNotFound`."""

    def files(self, run: str) -> Sequence[FileOffer]:
        """What can be downloaded of a run now."""

    def read(self, run: str, name: str) -> bytes:
        """The content of an offered file. Raises `FileNotOffered`."""


class Views:
    """Runs folded from a source and kept up to date: each event is read and folded once.

    Parameters
    ----------
    source : Source
        Where from.
    most : int
        Runs whose fold is kept; the one that was asked for longest ago goes first.
    """

    def __init__(self, source: Source, *, most: int = 32) -> None:
        self._source, self._most = source, most
        self._views: dict[str, RunView] = {}
        self._lock = threading.RLock()

    @property
    def lock(self) -> threading.RLock:
        """Held while a view is read, so that nobody folds into it meanwhile."""
        return self._lock

    def get(self, run: str) -> RunView:
        """The run up to its newest event; read it under `lock`. Raises `RunNotFound`."""
        with self._lock:
            view = self._views.pop(run, None) or RunView(run)
            view.extend(self._source.events(run, after=view.last_id))
            self._views[run] = view
            while len(self._views) > self._most:
                del self._views[next(iter(self._views))]
            return view


class RunDirectories:
    """The run directories of simulations, as a source: one, or a folder that holds several.

    An event's id is the number of its line.

    Raises
    ------
    RunDirectoryInvalid
        Neither a run directory nor a folder with one in it.
    """

    def __init__(self, root: Path) -> None:
        self._root = root.resolve()
        self._read: dict[str, tuple[int, str, int]] = {}  # size of the events, and what they say
        self._single = (root / "resolved.json").is_file()
        if not self._single and not self._found():
            raise RunDirectoryInvalid(f"{root} is no run directory and has none in it")

    def runs(self) -> list[RunFacts]:
        """Every run, newest first."""
        found = [self.facts(name) for name in self._found()]
        return sorted(found, key=lambda f: (f.proposed_at or 0.0, f.run), reverse=True)

    def facts(self, run: str) -> RunFacts:
        """One run. Raises `RunNotFound`."""
        folder = self._folder(run)
        try:
            resolved = json.loads((folder / "resolved.json").read_bytes())
        except (OSError, ValueError) as exc:
            raise RunDirectoryInvalid(f"{folder}: resolved.json can't be read") from exc
        plan = resolved.get("plan") or {}
        about = plan.get("plan") or {}
        state, number = self._progress(folder)
        if state == "running" and not is_held(folder):
            state = "interrupted"
        return RunFacts(
            run=run,
            name=str(about.get("name") or run),
            purpose=str(about.get("purpose") or ""),
            state=state,
            round=number,
            rounds=int((plan.get("rounds") or {}).get("number") or 0),
            proposed_at=(folder / "plan.toml").stat().st_mtime,
            plan_sha256=str(resolved.get("plan_sha256") or ""),
            plan=plan,
        )

    def events(self, run: str, *, after: int = 0, limit: int = 100_000) -> list[Row]:
        """Events behind a line number, oldest first. Raises `RunNotFound`."""
        path = self._folder(run) / "events.jsonl"
        try:
            lines = path.read_bytes().split(b"\n")[:-1]
        except FileNotFoundError:
            return []
        found = []
        for number, line in enumerate(lines[after : after + limit], start=after + 1):
            try:
                found.append({"id": number, **json.loads(line)})
            except (ValueError, TypeError) as exc:
                raise RunDirectoryInvalid(f"{path}, line {number}: not a JSON object") from exc
        return found

    def files(self, run: str) -> list[FileOffer]:
        """What can be downloaded now: the adapter, the report, plan, privacy and results."""
        folder = self._folder(run)
        offers = [FileOffer(name, title) for name, title in _FILES if (folder / name).is_file()]
        if newest := self._adapter(folder):
            offers.insert(0, FileOffer("adapter.safetensors", f"Adapter, {newest.stem}"))
        return offers

    def read(self, run: str, name: str) -> bytes:
        """The content of an offered file. Raises `FileNotOffered`."""
        folder = self._folder(run)
        path = self._adapter(folder) if name == "adapter.safetensors" else None
        if any(name == offered for offered, _ in _FILES):
            path = folder / name
        if path is None or not path.is_file():
            raise FileNotOffered(f"{run} has no {name[:80]!r} to download")
        return path.read_bytes()

    def _found(self) -> list[str]:
        if self._single:
            return [self._root.name]
        return [path.parent.name for path in self._root.glob("*/resolved.json")]

    def _folder(self, run: str) -> Path:
        # Only names that the listing has: what comes in a URL is never joined to a path.
        if run not in self._found():
            raise RunNotFound(f"there is no run {run[:100]!r} in {self._root}")
        return self._root if self._single else self._root / run

    @staticmethod
    def _adapter(folder: Path) -> Path | None:
        return max((folder / "adapters").glob("round-*.safetensors"), default=None)

    def _progress(self, folder: Path) -> tuple[str, int]:
        """State and last finished round, from the end of the events."""
        try:
            with (folder / "events.jsonl").open("rb") as file:
                size = file.seek(0, 2)
                known = self._read.get(folder.name)
                if known and known[0] == size:
                    return known[1:]
                file.seek(max(0, size - _TAIL))
                lines = file.read().split(b"\n")[:-1]
        except FileNotFoundError:
            return "proposed", 0
        view = RunView(folder.name)
        view.state = "running"  # where it began is not in the end of a long file
        telling = [line for line in lines if any(kind in line for kind in _TELLING)]
        # The first line may have lost its beginning.
        view.extend(json.loads(line) for line in telling if line.startswith(b"{"))
        self._read[folder.name] = (size, view.state, view.done)
        return view.state, view.done


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold a run directory while a process runs it: nobody else does, and watchers see that it lives.

    Raises
    ------
    RunDirectoryInvalid
        Another process runs it.
    """
    with (folder / _LOCK).open("wb") as file:
        for attempt in range(_ATTEMPTS):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as exc:
                if attempt == _ATTEMPTS - 1:
                    raise RunDirectoryInvalid(f"{folder} is being run by another process") from exc
                time.sleep(0.05)  # a watcher looks for an instant
        yield


def is_held(folder: Path) -> bool:
    """Whether a process runs it now; of a directory of an older version also yes."""
    try:
        with (folder / _LOCK).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (BlockingIOError, FileNotFoundError):
        return True
    return False


_LOCK = "run.lock"
_ATTEMPTS = 40
_TAIL = 200_000
_TELLING = (b'"event":"run_', b'"event":"round_')
_FILES = (
    ("report.html", "Report"),
    ("statistics.json", "What was counted"),
    ("votes.json", "What was voted for"),
    ("plan.toml", "Plan"),
    ("privacy.json", "Privacy statement"),
    ("results.json", "Results"),
    ("events.jsonl", "Events"),
)


OVER = frozenset({"finished", "stopped", "failed", "interrupted"})
"""States after which nothing more happens in a run."""

_LOOK_SECONDS = 0.5
_BATCH_SECONDS = 2.0  # at least between two batches: each is a message to each watcher
_KEPT = 2000  # events that late watchers need not read for themselves


@dataclass(frozen=True, eq=False)
class Batch:
    """Events that came together, and the run's state then; the same object for every watcher.

    So whoever turns it into bytes can do that once: it is hashed by what it is, not by what it holds.
    """

    rows: tuple[Row, ...] = ()
    state: str = ""


@dataclass
class _Tail:
    """The newest events of a run; `rows` has every event behind `base`."""

    base: int
    rows: list[Row] = field(default_factory=list)
    state: str = ""
    batches: dict[int, Batch] = field(default_factory=dict)
    over: bool = False
    watchers: int = 0
    news: asyncio.Event = field(default_factory=asyncio.Event)
    pump: asyncio.Task[None] | None = None
    error: Exception | None = None

    @property
    def newest(self) -> int:
        return int(self.rows[-1]["id"]) if self.rows else self.base

    def behind(self, after: int) -> Batch:
        """Events behind an id; until there are more, the same object for the same id."""
        if after not in self.batches:
            rows = tuple(row for row in self.rows if row["id"] > after)
            self.batches[after] = Batch(rows, self.state)
        return self.batches[after]

    def wake(self) -> None:
        self.batches.clear()
        self.news.set()
        self.news = asyncio.Event()


class Feed:
    """Live events of a source, within one event loop.

    A source is looked at four times a second while somebody watches: what happens in between goes
    to every watcher at once, so that many of them cost little more than one.

    Parameters
    ----------
    source : Readable
        Where events are read, in a thread of their own.
    """

    def __init__(self, source: Readable) -> None:
        self._source = source
        self._tails: dict[str, _Tail] = {}

    async def follow(
        self, run: str, *, after: int = 0, keep_alive: float = 15.0
    ) -> AsyncGenerator[Batch, None]:
        """Batches of events behind an id, until the run is over.

        An empty batch comes when nothing happened for `keep_alive` seconds.

        Raises
        ------
        RunNotFound
            There is no such run.
        """
        await asyncio.to_thread(self._source.facts, run)
        tail = self._tails.setdefault(run, _Tail(base=after))
        tail.watchers += 1
        if tail.pump is None:
            tail.pump = asyncio.create_task(self._pump(run, tail))
        try:
            while True:
                news = tail.news
                if after < tail.base:
                    older = await asyncio.to_thread(self._source.events, run, after=after)
                    batch = Batch(tuple(older), tail.state)
                else:
                    batch = tail.behind(after)
                if batch.rows:
                    after = int(batch.rows[-1]["id"])
                    yield batch
                elif tail.error is not None:
                    raise tail.error
                elif tail.over:
                    return
                elif not await _set_within(news, keep_alive):
                    yield Batch()
        finally:
            tail.watchers -= 1
            if not tail.watchers:
                tail.pump.cancel()
                self._tails.pop(run, None)

    def _look(self, run: str, newest: int) -> tuple[RunFacts, list[Row]]:
        """How a run is, and its events behind an id."""
        # The state first: an event of it may be written a moment later, and is seen then.
        facts = self._source.facts(run)
        return facts, self._source.events(run, after=newest)

    async def _pump(self, run: str, tail: _Tail) -> None:
        was_over = False
        try:
            while True:
                facts, found = await asyncio.to_thread(self._look, run, tail.newest)
                tail.rows += found
                if len(tail.rows) > 2 * _KEPT:
                    tail.base = int(tail.rows[-_KEPT - 1]["id"])
                    del tail.rows[:-_KEPT]
                tail.state = facts.state
                tail.over = was_over and not found
                was_over = facts.state in OVER
                if found or tail.over:
                    tail.wake()
                if tail.over:
                    return
                await asyncio.sleep(_BATCH_SECONDS if found else _LOOK_SECONDS)
        except Exception as exc:
            tail.error = exc  # for the watchers to raise
            tail.wake()


async def _set_within(event: asyncio.Event, seconds: float) -> bool:
    try:
        await asyncio.wait_for(event.wait(), seconds)
    except TimeoutError:
        return False
    return True
