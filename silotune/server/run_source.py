"""The coordinator's runs as a source of pages, streams and metrics."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from sqlalchemy import RowMapping

from silotune.events.errors import FileNotOffered, RunNotFound
from silotune.events.source import Offer, Row, RunFacts
from silotune.plan import SignedPlan
from silotune.server.arrays import packed
from silotune.server.errors import RunUnknown
from silotune.server.run_store import Runs
from silotune.server.store import Store

_PAGE = 5000


class StoredRuns:
    """`silotune.events.source.Source` over the coordinator's store.

    Parameters
    ----------
    store : Store
        Where the runs are.
    """

    def __init__(self, store: Store) -> None:
        self._runs = Runs(store)

    def runs(self) -> list[RunFacts]:
        """The newest 200 runs, newest first."""
        return [_facts(row) for row in self._runs.newest()]

    def facts(self, run: str) -> RunFacts:
        """One run. Raises `RunNotFound`."""
        return _facts(self._row(run))

    def events(self, run: str, *, after: int = 0, limit: int = 100_000) -> list[Row]:
        """Events behind an id, oldest first. Raises `RunNotFound`."""
        if after == 0:
            self._row(run)
        found: list[Row] = []
        while len(found) < limit:
            page = self._runs.events(run, after=after, limit=min(_PAGE, limit - len(found)))
            found += [event.as_dict() for event in page]
            if len(page) < _PAGE:
                break
            after = page[-1].id
        return found

    def files(self, run: str) -> list[Offer]:
        """The newest adapter once there is one, the signed plan, the events, sites' certificates."""
        row = self._row(run)
        adapter = [Offer("adapter.safetensors", f"Adapter after round {row['round']}")]
        others = [Offer("plan.json", "Signed plan"), Offer("events.jsonl", "Events")]
        names = self._runs.certificates(run)
        signed = [Offer(_certificate_of(s), f"Privacy certificate of {s}") for s in names]
        return (adapter if row["round"] else []) + others + signed

    def read(self, run: str, name: str) -> bytes:
        """The content of an offered file. Raises `FileNotOffered`."""
        row = self._row(run)
        if name == "plan.json":
            return str(row["plan"]).encode()
        if name == "events.jsonl":
            return "".join(json.dumps(event) + "\n" for event in self.events(run)).encode()
        for site, content in self._runs.certificates(run).items():
            if name == _certificate_of(site):
                return content.encode()
        found = self._runs.newest_adapter(run) if name == "adapter.safetensors" else None
        if found is None:
            raise FileNotOffered(f"{run} has no {name[:80]!r} to download")
        number, _, arrays = found
        return packed(arrays, {"round": number})

    def _row(self, run: str) -> RowMapping:
        try:
            return self._runs.get(run)
        except RunUnknown as exc:
            raise RunNotFound(f"there is no run {run[:100]!r}") from exc


def _certificate_of(site: str) -> str:
    return f"certificate-{site}.json"


@lru_cache(maxsize=256)
def _plan(signed: str) -> Mapping[str, Any]:
    """The plan as plain data; a run's never changes, and is asked for many times a second."""
    found: dict[str, Any] = json.loads(SignedPlan.model_validate_json(signed).plan)
    return found


def _facts(row: RowMapping) -> RunFacts:
    plan = _plan(row["plan"])
    return RunFacts(
        run=row["run"],
        name=row["plan_name"],
        purpose=str((plan.get("plan") or {}).get("purpose") or ""),
        state=row["state"],
        round=row["round"],
        rounds=row["rounds"],
        proposed_at=row["proposed_at"],
        plan_sha256=row["plan_sha256"],
        plan=plan,
    )
