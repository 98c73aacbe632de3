"""Runs in the store: plans, decisions, and the durable history that a `RoundLoop` writes.

`FederationLog` has what happens outside of any run: enrolments, alarms, people, who is silent.
`StoredRuns` is all of it as a source of pages, streams and metrics.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from numpy.typing import NDArray
from sqlalchemy import Connection, RowMapping, Table, delete, insert, select, update

from silotune.errors import AdapterMismatch, FileNotOffered, RunNotFound
from silotune.events.source import FileOffer, Row, RunFacts
from silotune.models.start import Earlier, in_folder
from silotune.plan.plan import Plan, stored_finds
from silotune.plan.sections import StartSection
from silotune.protocol.http import Decision, RunState
from silotune.rounds.run_directory import FOUND_FILES, Arrays, packed, unpacked
from silotune.server.errors import NotPossibleNow
from silotune.server.store.database import (
    ADAPTERS,
    CERTIFICATES,
    CHECKPOINTS,
    DECISIONS,
    EVENTS,
    RUNS,
    SECURE_ROUNDS,
    Store,
    large_rows,
)
from silotune.server.store.events import EventWriter, add_events, event_row, jsonable
from silotune.trust.signed import SignedPlan

_KEPT_ADAPTERS = 3  # rounds whose adapter is kept as bytes; of the others its hash


@dataclass(frozen=True, kw_only=True)
class StoredEvent:
    """Something that happened in a run, or in the federation (no run), in the order of `id`."""

    id: int
    run: str | None
    time: float
    event: str
    fields: dict[str, Any]

    @classmethod
    def of(cls, row: RowMapping) -> StoredEvent:
        """From a row of the table."""
        return cls(**{**row, "fields": json.loads(row["fields"])})

    def as_dict(self) -> dict[str, Any]:
        """Flat, as in the ``events.jsonl`` of a simulation."""
        return {"id": self.id, "time": self.time, "event": self.event, **self.fields}


class Runs:
    """All runs of a store."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def propose(self, plan: Plan, signed: SignedPlan, *, run: str, quorum: int) -> None:
        """Add a run that waits for the sites."""
        row = {
            "run": run,
            "plan": signed.model_dump_json(),
            "plan_sha256": plan.sha256,
            "plan_name": plan.plan.name,
            "rounds": plan.rounds.number,
            "quorum": quorum,
            "state": "proposed",
            "round": 0,
            "proposed_at": time.time(),
        }
        with self._store.transaction() as connection:
            connection.execute(insert(RUNS).values(row))

    def get(self, run: str) -> RowMapping:
        """A run's row. Raises `NotPossibleNow`."""
        with self._store.transaction() as connection:
            found = connection.execute(select(RUNS).where(RUNS.c.run == run)).mappings().first()
        if found is None:
            raise NotPossibleNow(f"there is no run {run!r}")
        return found

    def plan_of(self, run: str) -> Plan:
        """The plan of a run."""
        return Plan.from_canonical(self.signed_plan(run).plan)

    def signed_plan(self, run: str) -> SignedPlan:
        """The plan of a run, with its signature."""
        return SignedPlan.model_validate_json(self.get(run)["plan"])

    def newest(self, limit: int = 200) -> list[RowMapping]:
        """Rows of the newest runs, newest first."""
        query = select(RUNS).order_by(RUNS.c.proposed_at.desc()).limit(limit)
        with self._store.transaction() as connection:
            return list(connection.execute(query).mappings())

    def in_state(self, *states: RunState) -> list[str]:
        """Names of runs in one of these states, oldest first."""
        query = select(RUNS.c.run).where(RUNS.c.state.in_(states)).order_by(RUNS.c.proposed_at)
        with self._store.transaction() as connection:
            return list(connection.execute(query).scalars())

    def change(self, run: str, **values: Any) -> None:
        """Set columns of a run: its state, round, error code and so on."""
        with self._store.transaction() as connection:
            connection.execute(update(RUNS).where(RUNS.c.run == run).values(values))

    # --- decisions ---

    def decide(self, decision: Decision) -> bool:
        """Keep a site's word; a later one replaces an earlier. True if it changed something."""
        with self._store.transaction() as connection:
            same = (DECISIONS.c.run == decision.run) & (DECISIONS.c.site == decision.site)
            before = connection.execute(select(DECISIONS.c.body).where(same)).scalar()
            body = decision.model_dump_json()
            if before == body:
                return False
            connection.execute(delete(DECISIONS).where(same))
            row = {
                "run": decision.run,
                "site": decision.site,
                "verdict": decision.verdict,
                "reason": decision.reason,
                "decided_at": float(decision.decided_at),
                "body": body,
            }
            connection.execute(insert(DECISIONS).values(row))
        return True

    def decisions(self, run: str) -> dict[str, RowMapping]:
        """What the sites said to a run, by site."""
        query = select(DECISIONS).where(DECISIONS.c.run == run).order_by(DECISIONS.c.site)
        with self._store.transaction() as connection:
            return {row["site"]: row for row in connection.execute(query).mappings()}

    def approved(self, run: str) -> list[str]:
        """Sites that approve, sorted."""
        rows = self.decisions(run).values()
        return [row["site"] for row in rows if row["verdict"] == "approved"]

    # --- certificates, events and adapters ---

    def certificates(self, run: str) -> dict[str, str]:
        """Privacy certificates that sites handed in, by site."""
        query = select(CERTIFICATES).where(CERTIFICATES.c.run == run).order_by(CERTIFICATES.c.site)
        with self._store.transaction() as connection:
            return {row["site"]: row["content"] for row in connection.execute(query).mappings()}

    def events(self, run: str | None, *, after: int = 0, limit: int = 1000) -> list[StoredEvent]:
        """Events of a run, or of no run, behind an id, oldest first."""
        query = (
            select(EVENTS)
            .where(EVENTS.c.run == run, EVENTS.c.id > after)
            .order_by(EVENTS.c.id)
            .limit(limit)
        )
        with self._store.transaction() as connection:
            rows = list(connection.execute(query).mappings())
        return [StoredEvent.of(row) for row in rows]

    def newest_adapter(self, run: str) -> tuple[int, str, Arrays] | None:
        """Round, SHA-256 and named arrays of the newest adapter; None before the first round."""
        query = (
            select(ADAPTERS)
            .where(ADAPTERS.c.run == run, ADAPTERS.c.content.is_not(None))
            .order_by(ADAPTERS.c.round.desc())
            .limit(1)
        )
        with self._store.transaction() as connection:
            row = connection.execute(query).mappings().first()
        if row is None:
            return None
        content = self._store.vault.unseal(row["content"], name=_seal_name(run, "adapter"))
        return row["round"], row["sha256"], unpacked(content)[0]

    def find_start(self, start: StartSection) -> Earlier:
        """The adapter that a plan starts from: of a finished run here, or in a folder.

        Raises
        ------
        AdapterMismatch
            The run is not finished, or there is neither.
        """
        with self._store.transaction() as connection:
            query = select(RUNS.c.state).where(RUNS.c.run == start.adapter)
            state = connection.execute(query).scalar()
        if state is None:
            return in_folder(start)
        found = self.newest_adapter(start.adapter)
        if state != "finished" or found is None:
            raise AdapterMismatch(f"lora.start.adapter: run {start.adapter} is not finished")
        return Earlier(self.plan_of(start.adapter), found[2])


class RunWriter:
    """The `RunStore` of one run: what `silotune.rounds.rounds.RoundLoop` writes to.

    Parameters
    ----------
    store : Store
        Where.
    run : str
        The run's name.
    on_event : callable
        Called, without arguments, after an event is committed.
    on_checkpoint : callable
        Called with the round after its state is committed: from here on, replies may be forgotten.
    gathers : bool
        See `EventWriter`.
    """

    def __init__(
        self,
        store: Store,
        run: str,
        *,
        on_event: Callable[[], None],
        on_checkpoint: Callable[[int], None],
        gathers: bool = False,
    ) -> None:
        self._store, self._run, self._on_checkpoint = store, run, on_checkpoint
        self._writer = EventWriter(store, run, on_event=on_event, gathers=gathers)
        self._adapter: tuple[int, bytes] | None = None

    def append_event(self, kind: Any, **fields: Any) -> Mapping[str, Any]:
        """Record what happened (`EventWriter.append`)."""
        row = self._writer.append(str(kind), fields)
        return {"time": row["time"], "event": kind, **fields}

    def close(self) -> None:
        """Write what waits; a record that gathers has to be closed."""
        self._writer.close()

    def save_adapter(self, number: int, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Keep an adapter; it is written together with the checkpoint of its round."""
        self._adapter = (number, packed(arrays, {"round": number}))

    def save_checkpoint(self, arrays: Mapping[str, NDArray[Any]], state: Mapping[str, Any]) -> None:
        """Replace the state to resume from, and add the round's adapter, in one transaction.

        The event `round_saved` is of that transaction too: who reads it knows that the round can't
        be lost any more, and nobody reads of a round that could.
        """
        number = int(state["round"])
        sealed = self._store.vault.seal(
            packed(arrays, jsonable(state)), name=_seal_name(self._run, "checkpoint")
        )
        with self._writer.transaction() as connection, large_rows(connection):
            _replace(connection, CHECKPOINTS, run=self._run, round=number, content=sealed)
            if self._adapter is not None:
                saved = self._write_adapter(connection, *self._adapter)
                add_events(connection, [event_row(self._run, "round_saved", saved, time.time())])
            connection.execute(update(RUNS).where(RUNS.c.run == self._run).values(round=number))
        self._adapter = None
        self._on_checkpoint(number)

    def load_checkpoint(self) -> tuple[Arrays, dict[str, Any]] | None:
        """The last saved state, if any."""
        query = select(CHECKPOINTS.c.content).where(CHECKPOINTS.c.run == self._run)
        with self._store.transaction() as connection:
            sealed = connection.execute(query).scalar()
        if sealed is None:
            return None
        name = _seal_name(self._run, "checkpoint")
        return unpacked(self._store.vault.unseal(sealed, name=name))

    def save_secure_round(self, number: int, content: bytes) -> None:
        """Replace what a secure round has settled."""
        sealed = self._store.vault.seal(content, name=_seal_name(self._run, "secure"))
        with self._writer.transaction() as connection:
            _replace(connection, SECURE_ROUNDS, run=self._run, round=number, content=sealed)

    def load_secure_round(self, number: int) -> bytes | None:
        """What is kept of a secure round, if it is the newest."""
        query = select(SECURE_ROUNDS.c.content).where(
            SECURE_ROUNDS.c.run == self._run, SECURE_ROUNDS.c.round == number
        )
        with self._store.transaction() as connection:
            sealed = connection.execute(query).scalar()
        if sealed is None:
            return None
        return self._store.vault.unseal(sealed, name=_seal_name(self._run, "secure"))

    def was_evaluated(self, number: int) -> bool:
        """Whether the metrics that the sites released after a round are on record."""
        query = select(EVENTS.c.fields).where(
            EVENTS.c.run == self._run, EVENTS.c.event == "evaluated"
        )
        with self._store.transaction() as connection:
            found = [json.loads(text) for text in connection.execute(query).scalars()]
        return any(fields["round"] == number for fields in found)

    def _write_adapter(
        self, connection: Connection, number: int, content: bytes
    ) -> Mapping[str, Any]:
        """Write an adapter; its round, hash and size."""
        mine = ADAPTERS.c.run == self._run
        connection.execute(delete(ADAPTERS).where(mine, ADAPTERS.c.round >= number))
        old = update(ADAPTERS).where(mine, ADAPTERS.c.round <= number - _KEPT_ADAPTERS)
        connection.execute(old.values(content=None))
        saved = {
            "round": number,
            "sha256": hashlib.sha256(content).hexdigest(),
            "bytes": len(content),
        }
        row = {
            **saved,
            "run": self._run,
            "content": self._store.vault.seal(content, name=_seal_name(self._run, "adapter")),
        }
        connection.execute(insert(ADAPTERS).values(row))
        return saved


def _replace(connection: Connection, table: Table, *, run: str, **values: Any) -> None:
    """Put a run's one row in place of the one before.

    SQLite writes values of one size over each other. A row that is deleted, or may get another key, is
    overwritten with zeros first: of a checkpoint of megabytes, at every round.
    """
    mine = update(table).where(table.c.run == run)
    if not connection.execute(mine.values(values)).rowcount:
        connection.execute(insert(table).values(run=run, **values))


def _seal_name(run: str, what: str) -> str:
    return f"{run}/{what}"


_ENDLESS = "running"


class FederationLog:
    """The federation's own events, to write and, for `silotune.events.source.Feed`, to read.

    Parameters
    ----------
    store : Store
        Where.
    on_event : callable
        Called, without arguments, after an event is committed.
    """

    def __init__(self, store: Store, *, on_event: Callable[[], None]) -> None:
        self._store, self._on_event = store, on_event
        self._runs = Runs(store)

    def append(self, event: str, /, **fields: Any) -> None:
        """Record what happened; on return it is on the disk."""
        with self._store.transaction() as connection:
            add_events(connection, [event_row(None, event, fields, time.time())])
        self._on_event()

    def facts(self, run: str) -> RunFacts:
        """A log without an end."""
        return RunFacts(
            run=run, name="", purpose="", state=_ENDLESS, round=0, rounds=0, proposed_at=None
        )

    def events(self, run: str, *, after: int = 0, limit: int = 100_000) -> list[Row]:
        """Events behind an id, oldest first."""
        del run
        return [event.as_dict() for event in self._runs.events(None, after=after, limit=limit)]

    def newest(self, kind: str, *, limit: int = 50) -> list[Row]:
        """The newest events of a kind, newest first."""
        query = (
            select(EVENTS)
            .where(EVENTS.c.run.is_(None), EVENTS.c.event == kind)
            .order_by(EVENTS.c.id.desc())
            .limit(limit)
        )
        with self._store.transaction() as connection:
            rows = list(connection.execute(query).mappings())
        return [StoredEvent.of(row).as_dict() for row in rows]


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

    def files(self, run: str) -> list[FileOffer]:
        """The newest adapter once there is one, the signed plan, the events, sites' certificates."""
        row = self._row(run)
        adapter = [FileOffer("adapter.safetensors", f"Adapter after round {row['round']}")]
        if kind := stored_finds(_plan(row["plan"])):
            # bare sums would tell what lies below the floor
            adapter = [FileOffer(FOUND_FILES[kind], "What was counted")]
        others = [FileOffer("plan.json", "Signed plan"), FileOffer("events.jsonl", "Events")]
        names = self._runs.certificates(run)
        signed = [FileOffer(_certificate_of(s), f"Privacy certificate of {s}") for s in names]
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
        if kind := stored_finds(_plan(row["plan"])):
            return self._told(run, name, kind=kind)
        found = self._runs.newest_adapter(run) if name == "adapter.safetensors" else None
        if found is None:
            raise FileNotOffered(f"{run} has no {name[:80]!r} to download")
        number, _, arrays = found
        return packed(arrays, {"round": number})

    def _told(self, run: str, name: str, *, kind: str) -> bytes:
        """The one other file of a run that counts, or of a vote."""
        told = [e["found"] for e in self.events(run) if e["event"] == kind]
        if name != FOUND_FILES[kind] or not told:
            raise FileNotOffered(f"{run} has no {name[:80]!r} to download")
        return json.dumps({"run": run, **told[-1]}, indent=2).encode()

    def _row(self, run: str) -> RowMapping:
        try:
            return self._runs.get(run)
        except NotPossibleNow as exc:
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
