"""What a run directory says, read once into plain values for the report and the summary.

Nothing here decides what is good or bad; it only turns files into typed facts. Every part may be
missing: a run can be unfinished, without baselines, or without privacy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from silotune.errors import RunDirectoryInvalid
from silotune.events.errors import EventMalformed
from silotune.events.view import RunView
from silotune.simulation.run_directory import RunDirectory

Scores = Mapping[str, float]


@dataclass(frozen=True)
class Method:
    """One way of training and what it reached, as results.json has it."""

    key: str
    title: str
    private: bool
    epsilon: float | None
    test: Scores
    by_site: Mapping[str, Scores]
    seconds: float | None
    examples_seen: float | None


@dataclass(frozen=True)
class RunRecord:
    """A whole run directory: the resolved plan, the history, privacy and results."""

    directory: RunDirectory
    resolved: Mapping[str, Any]
    history: RunView
    privacy: Mapping[str, Any] | None
    methods: tuple[Method, ...]

    @property
    def plan(self) -> Mapping[str, Any]:
        """The plan as plain data (may be empty)."""
        plan = self.resolved.get("plan")
        return plan if isinstance(plan, Mapping) else {}

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
        )
    except EventMalformed as exc:
        raise RunDirectoryInvalid(
            f"{directory.events.path} has an event of another shape: {exc.detail}"
        ) from exc
    except (KeyError, TypeError, ValueError, AttributeError) as exc:
        raise RunDirectoryInvalid(f"{run_dir} has a file of another shape: {exc!r}") from exc


def _method(entry: Mapping[str, Any]) -> Method:
    return Method(
        key=str(entry["key"]),
        title=str(entry.get("title") or entry["key"]),
        private=bool(entry.get("private")),
        epsilon=_number(entry.get("epsilon")),
        test=_scores(entry.get("test")),
        by_site={str(k): _scores(v) for k, v in (entry.get("by_site") or {}).items()},
        seconds=_number(entry.get("seconds")),
        examples_seen=_number(entry.get("examples_seen")),
    )


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _scores(found: Mapping[str, Any] | None) -> Scores:
    """Named numbers; a null (a score that wasn't finite) is left out."""
    return {str(k): float(v) for k, v in (found or {}).items() if v is not None}
