"""What a run directory says, read once into plain values for the report and the summary.

Nothing here decides what is good or bad; it only turns files into typed facts. Every part may be
missing: a run can be unfinished, without baselines, or without privacy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from silotune.errors import RunDirectoryInvalid
from silotune.events.errors import EventMalformed
from silotune.events.view import RunView
from silotune.simulation.run_directory import RunDirectory

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
