"""The run directory: everything that a simulation leaves on disk, and the only code that writes it.

One run, one folder, plain files: JSON for facts, JSON lines for what happened in time, safetensors
for arrays. Each whole file appears by an atomic rename, and each line by one write, so that a
process killed at any instant leaves a directory that can be read and resumed.

`RunRecord` is what a run directory says, read once into plain values for the report and the summary. It
does not decide what is good or bad. Every part may be missing: a run can be unfinished, without
baselines, or without privacy.

The adapters of the last round, the best and every n-th are kept. A run goes on from its checkpoint, so
none of them is needed for that; they are for who wants to look back. Their number has a bound, however
many rounds there are.
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from silotune.errors import EventMalformed, RunDirectoryInvalid
from silotune.events.schema import written
from silotune.events.view import RunView
from silotune.plan.document import canonical_json
from silotune.plan.plan import stored_finds
from silotune.plan.tasks import METRICS
from silotune.protocol.errors import StoreUnusable

FOUND_FILES = {"statistics": "statistics.json", "votes": "votes.json"}
"""In the directory of a run that trains nothing: what `silotune.rounds.estimates.find` or
`silotune.rounds.votes.find` made of its sums, by `silotune.plan.plan.Plan.finds`."""

_REQUIRED = ("plan.toml", "resolved.json")
_STATE_KEY = "silotune"

Arrays = dict[str, NDArray[Any]]


class JsonLines:
    """A file of JSON objects, one a line, with one writer and any number of readers.

    A line is written by a single ``write`` on a file opened for appending. The tail after the last
    newline is what a killed writer left: readers skip it, and the next writer removes it, so that
    it never fuses with a new line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._tail_checked = False

    def append(self, row: Mapping[str, Any]) -> None:
        """Append one object; on return it is with the operating system (kill -9 can't lose it)."""
        line = (json.dumps(jsonable(row), separators=(",", ":"), allow_nan=False) + "\n").encode()
        with self._lock:
            if not self._tail_checked:
                self._drop_torn_tail()
                self._tail_checked = True
            with self.path.open("ab", buffering=0) as file:
                file.write(line)

    def read(self) -> list[dict[str, Any]]:
        """All whole lines; an absent file is an empty one.

        Raises
        ------
        RunDirectoryInvalid
            A line that ends in a newline is not a JSON object.
        """
        return list(self)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return
        except OSError as exc:
            raise RunDirectoryInvalid(f"{self.path}: {exc.strerror or exc}") from exc
        for number, line in enumerate(content.split(b"\n")[:-1], start=1):
            yield _parse_object(line, f"{self.path}, line {number}")

    def _drop_torn_tail(self) -> None:
        try:
            with self.path.open("r+b") as file:
                content = file.read()
                whole = content.rfind(b"\n") + 1
                if whole != len(content):
                    file.truncate(whole)
        except FileNotFoundError:
            pass


class RunDirectory:
    """Typed access to one run's folder.

    Build it with `create` (a new run) or `open` (an existing one). Writers are the run loop's
    process alone; anybody may read at any time, also while the run goes on.

    Attributes
    ----------
    root : Path
        The folder.
    events, metrics : JsonLines
        ``events.jsonl`` (what happened) and ``metrics.jsonl`` (one line a round).
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.events = JsonLines(root / "events.jsonl")
        self.metrics = JsonLines(root / "metrics.jsonl")

    @classmethod
    def create(cls, parent: Path, name: str, *, plan_toml: str) -> Self:
        """Make ``parent/<name>-<YYYYmmdd-HHMMSS>`` (local time) with a copy of the plan's text.

        A folder of that name gets ``-2``, ``-3``... behind it: two runs never share one.
        """
        stem = f"{name}-{datetime.now().astimezone():%Y%m%d-%H%M%S}"
        parent.mkdir(parents=True, exist_ok=True)
        number = 1
        while True:
            root = parent / (stem if number == 1 else f"{stem}-{number}")
            try:
                root.mkdir()
                break
            except FileExistsError:
                number += 1
        (root / "adapters").mkdir()
        (root / "sites").mkdir(mode=0o700)
        write_atomically(root / "plan.toml", plan_toml.encode())
        return cls(root)

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open an existing run; nothing is written.

        Raises
        ------
        RunDirectoryInvalid
            No such folder, or it lacks a file that every run writes.
        """
        if not path.is_dir():
            raise RunDirectoryInvalid(f"{path} is not a folder")
        missing = [name for name in _REQUIRED if not (path / name).is_file()]
        if missing:
            raise RunDirectoryInvalid(f"{path} has no {' and no '.join(missing)}")
        return cls(path)

    # --- paths ---

    @property
    def name(self) -> str:
        """The folder's own name, which is the run's name too."""
        return self.root.resolve().name

    @property
    def plan_path(self) -> Path:
        """``plan.toml``: a copy of the plan as it was given."""
        return self.root / "plan.toml"

    @property
    def checkpoint_path(self) -> Path:
        """``checkpoint.safetensors``: the server's state after its last finished round."""
        return self.root / "checkpoint.safetensors"

    @property
    def final_adapter(self) -> Path:
        """``adapters/final``: the finished adapter in PEFT's format (a folder)."""
        return self.root / "adapters" / "final"

    @property
    def report_path(self) -> Path:
        """``report.html``."""
        return self.root / "report.html"

    def site(self, name: str) -> Path:
        """``sites/<name>``, made (mode 0700) if it isn't there. Raises `RunDirectoryInvalid`."""
        if name in {"", ".", ".."} or any(sign in name for sign in "/\\\0"):
            raise RunDirectoryInvalid(f"{name!r} can't be the name of a site's folder")
        folder = self.root / "sites" / name
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return folder

    def adapter_of_round(self, number: int) -> Path:
        """``adapters/round-0001.safetensors`` for round 1."""
        return self.root / "adapters" / f"round-{number:04d}.safetensors"

    # --- events and facts ---

    def append_event(self, kind: str, **fields: Any) -> dict[str, Any]:
        """Append to ``events.jsonl`` and return the event as written: time, event, fields.

        Raises
        ------
        EventMalformed
            There is no such kind (`silotune.events.schema`), or the fields are not its own; nothing
            is written.
        """
        event = written(kind, jsonable({"time": time.time(), **fields}))
        self.events.append(event)
        return event

    def was_evaluated(self, number: int) -> bool:
        """Whether the metrics that the sites released after a round are on record."""
        wanted = {"event": "evaluated", "round": number, "view": "released"}
        return any(wanted.items() <= event.items() for event in self.events)

    def write_json(self, name: str, value: Any) -> Path:
        """Write ``<name>`` (e.g. ``privacy.json``) so that a crash leaves the old or the new file.

        Non-finite numbers become null: a diverged run must be recordable, and JSON has no NaN.
        """
        path = self.root / name
        text = json.dumps(jsonable(value), indent=2, allow_nan=False) + "\n"
        write_atomically(path, text.encode())
        return path

    def read_json(self, name: str) -> dict[str, Any]:
        """Read a file that must be there. Raises `RunDirectoryInvalid`."""
        found = self.find_json(name)
        if found is None:
            raise RunDirectoryInvalid(f"{self.root} has no {name}")
        return found

    def find_json(self, name: str) -> dict[str, Any] | None:
        """Read a file that may be absent (None). Raises `RunDirectoryInvalid` if it is broken."""
        path = self.root / name
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as exc:
            raise RunDirectoryInvalid(f"{path}: {exc.strerror or exc}") from exc
        return _parse_object(content, str(path))

    # --- arrays ---

    def save_adapter(self, number: int, arrays: Mapping[str, NDArray[Any]]) -> Path:
        """Write the adapter after round `number` (named arrays, e.g. ``layout.unpack(flat)``)."""
        path = self.adapter_of_round(number)
        write_atomically(path, packed(arrays, {"round": number}))
        return path

    def load_adapter(self, number: int) -> dict[str, NDArray[Any]]:
        """Read the adapter after round `number`. Raises `RunDirectoryInvalid`."""
        return load_arrays(self.adapter_of_round(number))[0]

    def adapter_rounds(self) -> list[int]:
        """Rounds whose adapter is on disk, ascending."""
        names = (path.stem for path in (self.root / "adapters").glob("round-*.safetensors"))
        return sorted(int(name.removeprefix("round-")) for name in names)

    def save_checkpoint(self, arrays: Mapping[str, NDArray[Any]], state: Mapping[str, Any]) -> None:
        """Write the server's state: arrays and a JSON-able mapping, in ONE file.

        One file and one rename: arrays and state can never be of different rounds.
        """
        write_atomically(self.checkpoint_path, packed(arrays, state))

    def save_secure_round(self, number: int, content: bytes) -> None:
        """Replace what a secure round has settled, in ``secure-round.bin``."""
        write_atomically(self.root / "secure-round.bin", number.to_bytes(8, "big") + content)

    def load_secure_round(self, number: int) -> bytes | None:
        """What is kept of a secure round, if it is the newest."""
        path = self.root / "secure-round.bin"
        kept = path.read_bytes() if path.exists() else b""
        return kept[8:] if int.from_bytes(kept[:8], "big") == number else None

    def load_checkpoint(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]] | None:
        """Read arrays and state; None when no round has finished. Raises `RunDirectoryInvalid`."""
        if not self.checkpoint_path.exists():
            return None
        return load_arrays(self.checkpoint_path)


def packed(arrays: Mapping[str, NDArray[Any]], state: Mapping[str, Any]) -> bytes:
    """Arrays of any shape and type, and a JSON-able mapping, as one safetensors file.

    The bytes are a function of the content alone, so equal states give equal files.
    """
    # safetensors writes a strided view's base buffer; order="C" copies only what isn't contiguous.
    content = {name: np.asarray(array, order="C") for name, array in sorted(arrays.items())}
    return bytes(save(content, metadata={_STATE_KEY: canonical_json(jsonable(state))}))


def unpacked(content: bytes) -> tuple[Arrays, dict[str, Any]]:
    """Read what `packed` wrote. Raises `StoreUnusable`."""
    try:
        arrays = dict(load(content))  # checks the header and every offset
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        return arrays, json.loads(header.get("__metadata__", {}).get(_STATE_KEY, "{}"))
    except (SafetensorError, ValueError, AttributeError) as exc:
        raise StoreUnusable("a stored adapter or checkpoint is damaged") from exc


def load_arrays(path: Path) -> tuple[Arrays, dict[str, Any]]:
    """Read a file of `packed` arrays. Raises `RunDirectoryInvalid`."""
    try:
        return unpacked(path.read_bytes())
    except (OSError, StoreUnusable) as exc:
        raise RunDirectoryInvalid(f"{path} can't be read: {exc}") from exc


def jsonable(value: Any) -> Any:
    """`value` as plain JSON data: NumPy to Python, paths to strings, NaN and infinity to None."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        items = sorted(value) if isinstance(value, (set, frozenset)) else value
        return [jsonable(item) for item in items]
    if isinstance(value, np.ndarray | np.generic):
        return jsonable(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    return value


def _parse_object(content: bytes, where: str) -> dict[str, Any]:
    try:
        parsed = json.loads(content)
    except ValueError as exc:
        raise RunDirectoryInvalid(f"{where}: not JSON") from exc
    if not isinstance(parsed, dict):
        raise RunDirectoryInvalid(f"{where}: not a JSON object")
    return parsed


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside `path`, sync, rename over it, sync the folder (rename is atomic in POSIX)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


Scores = Mapping[str, float]


@dataclass(frozen=True)
class Method:
    """One way of training and what it reached, as results.json has it.

    Attributes
    ----------
    by_site : Mapping[str, Scores]
        Scores on each site's own held-out data.
    recall : Scores
        Of one model on everybody's data: the share of each label's records that it found.
    everywhere : Mapping[str, Scores]
        Of a method that gives every site a model of its own: that model's scores on everybody's data.
    """

    key: str
    title: str
    private: bool
    epsilon: float | None
    test: Scores
    by_site: Mapping[str, Scores]
    seconds: float | None
    examples_seen: float | None
    recall: Scores = field(default_factory=dict)
    everywhere: Mapping[str, Scores] = field(default_factory=dict)


@dataclass(frozen=True)
class RunRecord:
    """A whole run directory: the resolved plan, the history, privacy and results.

    `labels` are the shares of the labels among each site's held-out records.
    """

    directory: RunDirectory
    resolved: Mapping[str, Any]
    history: RunView
    privacy: Mapping[str, Any] | None
    methods: tuple[Method, ...]
    labels: Mapping[str, Scores] = field(default_factory=dict)

    @property
    def plan(self) -> Mapping[str, Any]:
        """The plan as plain data (may be empty)."""
        plan = self.resolved.get("plan")
        return plan if isinstance(plan, Mapping) else {}

    @property
    def finds(self) -> str:
        """Statistics or votes, of a run that trains no adapter; else empty."""
        return stored_finds(self.plan)

    @property
    def sites(self) -> tuple[str, ...]:
        """Every site's name, in the order of the run."""
        listed = [str(site["name"]) for site in self.resolved.get("sites", ())]
        return tuple(dict.fromkeys([*listed, *self.history.sites]))

    def method(self, key: str) -> Method | None:
        """The method of this key, if it was run."""
        return next((method for method in self.methods if method.key == key), None)


def read_record(run_dir: Path) -> RunRecord:
    """Read everything. Raises `RunDirectoryInvalid` for a folder that is no run or is damaged."""
    directory = RunDirectory.open(run_dir)
    history = RunView(directory.name)
    try:
        history.extend(directory.events)
        results = directory.find_json("results.json") or {}
        return RunRecord(
            directory=directory,
            resolved=directory.read_json("resolved.json"),
            history=history,
            privacy=directory.find_json("privacy.json"),
            methods=tuple(_method(entry) for entry in results.get("methods", ())),
            labels=_by_site(results.get("labels")),
        )
    except EventMalformed as exc:
        raise RunDirectoryInvalid(
            f"{directory.events.path} has an event of another shape: {exc.detail}"
        ) from exc
    except (KeyError, TypeError, ValueError, AttributeError) as exc:
        raise RunDirectoryInvalid(f"{run_dir} has a file of another shape: {exc!r}") from exc


def read_beside(record: RunRecord, others: Sequence[Path]) -> list[RunRecord]:
    """Other runs of a run's plan, its seed apart. Raises `RunDirectoryInvalid` for any other run."""
    found = []
    for path in others:
        other = read_record(path)
        if other.directory.root.resolve() == record.directory.root.resolve():
            raise RunDirectoryInvalid(f"{path} is the run itself, not another one beside it")
        if _unseeded(other.plan) != _unseeded(record.plan):
            raise RunDirectoryInvalid(
                f"{path} is a run of another plan than {record.directory.name}"
            )
        found.append(other)
    return found


def _unseeded(plan: Mapping[str, Any]) -> dict[str, Any]:
    return {**plan, "plan": {**(plan.get("plan") or {}), "seed": None}}


def _method(entry: Mapping[str, Any]) -> Method:
    return Method(
        key=str(entry["key"]),
        title=str(entry.get("title") or entry["key"]),
        private=bool(entry.get("private")),
        epsilon=_number(entry.get("epsilon")),
        test=_scores(entry.get("test")),
        by_site=_by_site(entry.get("by_site")),
        seconds=_number(entry.get("seconds")),
        examples_seen=_number(entry.get("examples_seen")),
        recall=_scores(entry.get("recall")),
        everywhere=_by_site(entry.get("everywhere")),
    )


def _by_site(found: Mapping[str, Any] | None) -> dict[str, Scores]:
    return {str(site): _scores(scores) for site, scores in (found or {}).items()}


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _scores(found: Mapping[str, Any] | None) -> Scores:
    """Named numbers; a null (a score that wasn't finite) is left out."""
    return {str(k): float(v) for k, v in (found or {}).items() if v is not None}


_MARKS = 20


def every(rounds: int) -> int:
    """The n of every n-th round."""
    return max(1, math.ceil(rounds / _MARKS))


def most_kept(rounds: int) -> int:
    """How many adapters a run of so many rounds leaves at most."""
    marks = rounds // every(rounds)
    return min(rounds, marks + 2)


def spare(view: RunView, have: Collection[int], *, newest: int, rounds: int) -> list[int]:
    """Rounds whose adapter may go, once that of the newest round is on the disk.

    Parameters
    ----------
    view : RunView
        The run so far: it knows the best round on validation data.
    have : collection of int
        Rounds whose adapter is on the disk.
    """
    kept = {newest, best(view)}
    return [n for n in have if n not in kept and n % every(rounds) and n < newest]


def best(view: RunView) -> int | None:
    """The round with the best score on validation data, the first of equals; None without any."""
    looks = [found for found in view.evaluations if found.split == "validation"]
    for metric in METRICS:
        sign = 1.0 if metric.higher_is_better else -1.0
        scored = [
            (sign * found.pooled[metric.key], -found.number)
            for found in looks
            if metric.key in found.pooled
        ]
        if scored:
            return -max(scored)[1]
    return None
