"""A site's privacy ledger: what was spent on each dataset, durably, before anything leaves.

The ledger stores privacy events, never an epsilon; epsilon is recomputed from them. A run first
*reserves* its whole cost, which is the one place where a full composition is computed; each release
is then *charged* by taking its mechanisms out of the reservation, in constant time; at its end the
run *settles*, which frees what it did not use.

Datasets are keyed by name, whatever their content: epsilon adds up over every version of the data,
because most people are in most versions. A site that replaces a dataset by one with *none* of the
same people in it may account for it apart by a key ``name@fingerprint``.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from silotune.errors import (
    BudgetExceeded,
    EventInvalid,
    LedgerDamaged,
    ReleaseConflict,
    ReservationInvalid,
)
from silotune.privacy.ledger_table import LedgerEntry, LedgerTable, Row
from silotune.privacy.tally import Tally, epsilon_of, fits, tally_of, tally_of_text, total
from silotune.trust.chain import Head

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    from silotune.privacy.events import DpEvent


LEDGER_FILE = "ledger.sqlite"
"""Name of the ledger in a site's state folder."""

_DATASET = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}(@[0-9a-f]{8,64})?")
_RUN = re.compile(r".{1,200}")
_RELEASE = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")


def require_dataset_key(key: str) -> str:
    """The key itself, if it is one: a name, or ``name@fingerprint`` of 8 to 64 hex digits.

    A fingerprint is sound only if contents with different ones have no privacy unit in common: each has
    a budget of its own. Raises `ValueError`.
    """
    if not _DATASET.fullmatch(key):
        raise ValueError(f"not a dataset name with an optional fingerprint: {key!r}")
    return key


@dataclass(frozen=True)
class Budget:
    """What a dataset may spend over its whole life."""

    epsilon: float
    delta: float


@dataclass(frozen=True)
class ReleaseKey:
    """What makes a release the same release: asked again, it is sent again and not charged again.

    Parameters
    ----------
    run : str
        The run's id: at most 200 printable characters.
    round : int
        From 1; 0 for what comes before the first round.
    release : str
        What it is within the round, e.g. ``"update"`` or ``"metrics"``: a short lower-case name.
    """

    run: str
    round: int
    release: str

    def __post_init__(self) -> None:
        if not _RUN.fullmatch(self.run) or not self.run.isprintable():
            raise ValueError("a run's id is 1 to 200 printable characters")
        if self.round < 0 or not _RELEASE.fullmatch(self.release):
            raise ValueError(f"not a release: round {self.round}, {self.release!r}")


@dataclass(frozen=True)
class RunAccount:
    """One run's account on one dataset.

    Attributes
    ----------
    reserved, charged : Mapping[str, int]
        Tallies: canonical JSON of a mechanism -> how often.
    open : bool
        Whether it may still charge what it reserved.
    charges : int
        Number of charged releases.
    settled : int
        How often it was settled.
    """

    dataset: str
    run: str
    plan_sha256: str
    budget: Budget
    reserved: Mapping[str, int]
    open: bool = True
    charged: Mapping[str, int] = field(default_factory=dict)
    charges: int = 0
    settled: int = 0

    @property
    def committed(self) -> Tally:
        """Charges, and what the reservation still allows on top of them."""
        charged = Counter(self.charged)
        return charged | Counter(self.reserved) if self.open else charged


_NOTHING = '{"kind":"NoOp"}'
"""Event of a release that rests on the charge of several rounds."""

_BLOCK = "block"  # what that charge is called; nothing leaves under it

_CHARGING = frozenset({"charge", "restore"})


@dataclass(frozen=True)
class _Paid:
    """A charged release: what it cost, and the content that left under it, once there is one."""

    dataset: str
    cost: Mapping[str, int]
    payload_sha256: str | None
    settled: int


@dataclass(frozen=True)
class _Demand:
    """What a run would hold after a row is appended, and whether that needs a check."""

    held: Mapping[str, int]
    budget: Budget
    covered: bool


class Ledger:
    """The ledger of one site. Any number of threads and processes may use the same file.

    Parameters
    ----------
    path : Path
        The SQLite file; see `silotune.privacy.ledger_table.LedgerTable` for the files beside it.
    create : bool
        Start an empty ledger if there is none.
    to_disk : bool
        See `silotune.privacy.ledger_table.LedgerTable`; False in simulations only.

    Attributes
    ----------
    path : Path
        The SQLite file.

    Raises
    ------
    LedgerDamaged
        Missing, edited, truncated or rolled back: nothing may be released on its word.
    FileExposed
        Other accounts of the machine may read or write it.
    """

    def __init__(self, path: Path, *, create: bool = True, to_disk: bool = True) -> None:
        self.path = path
        self._runs: dict[tuple[str, str], RunAccount] = {}
        self._vouched: Head | None = None
        self._charged: dict[str, Tally] = {}  # by dataset
        self._paid: dict[ReleaseKey, _Paid] = {}
        self._newest: dict[tuple[str, str], int] = {}  # charged round, by run and release
        self._table = LedgerTable(path, observe=self._observe, create=create, to_disk=to_disk)

    def close(self) -> None:
        """Close the file; the object can't be used afterwards."""
        self._table.close()

    @property
    def head(self) -> Head:
        """Number and hash of the newest row."""
        return self._table.head

    def reserve(
        self, dataset: str, run: str, plan_sha256: str, event: DpEvent, *, budget: Budget
    ) -> None:
        """Set aside the whole cost of a run, before its first release.

        Asking again for the same run, with the same plan, event and budget, changes nothing. A
        settled run that asks again gets back what it had not charged, if the budget still has it.

        Raises
        ------
        BudgetExceeded
            Spent, plus other runs' open reservations, plus this event, is over the budget.
        ReservationInvalid
            The run reserved before under another plan or with another event.
        """
        asked = _cost(event)

        def demand() -> _Demand | None:
            account = self._runs.get((dataset, run))
            if account is None:
                return _Demand(asked, budget, covered=False)
            if (account.plan_sha256, account.reserved) != (plan_sha256, asked):
                raise ReservationInvalid(f"run {run!r} reserved before as something else")
            if account.open and account.budget == budget:
                return None
            return _Demand(asked | Counter(account.charged), budget, covered=False)

        what = {"plan_sha256": plan_sha256, "event": _text(event), "budget": _text_of(budget)}
        self._append_within(_entry("reserve", dataset, run, **what), demand)

    def charge(
        self,
        dataset: str,
        key: ReleaseKey,
        plan_sha256: str,
        event: DpEvent,
        payload_sha256: str | None = None,
        *,
        block: int | None = None,
    ) -> bool:
        """Charge a release; when this returns, the charge is on the disk.

        A release is charged before its content is made, and `bind` names the content afterwards;
        with `payload_sha256` both are done at once. The same key is not charged again. What the
        run's reservation doesn't cover is charged only if the budget allows it on top of everything
        else.

        With `block`, the first of several rounds that one charge is for, all of `event` is charged
        there, once, and the release is written down as one that rests on it and costs nothing more.
        Such rounds come one after the other: the proof that one charge is enough takes them in their
        order. A run that was settled and asks again, perhaps of books that were restored, pays again.

        Returns
        -------
        bool
            Whether it was charged now, and not before.

        Raises
        ------
        ReleaseConflict
            The key was charged with another payload or event, or a later round under a charge of
            several.
        ReservationInvalid
            The run has not reserved, or under another plan.
        BudgetExceeded
            Not covered by the reservation, nor by the rest of the budget.
        """
        if block is not None:
            self.charge(dataset, self._block_key(dataset, key.run, block), plan_sha256, event)
        asked: Tally = Counter() if block is not None else _cost(event)

        def demand() -> _Demand | None:
            if block is not None:
                self._require_covered(dataset, key, block)
            paid = self._paid.get(key)
            if paid is not None:
                content = {payload_sha256, paid.payload_sha256} if payload_sha256 else set()
                same = paid.dataset == dataset and Counter(paid.cost) == Counter(asked)
                if not same or len(content) > 1:
                    raise ReleaseConflict(f"{key} was charged with other content")
                return None
            account = self._runs.get((dataset, key.run))
            if account is None or account.plan_sha256 != plan_sha256:
                raise ReservationInvalid(f"run {key.run!r} has not reserved under this plan")
            charged = asked + Counter(account.charged)
            covered = account.open and fits(charged, account.reserved)
            held = charged | Counter(account.reserved) if account.open else charged
            return _Demand(held, account.budget, covered=covered)

        text = _text(event) if block is None else _NOTHING
        what = {"plan_sha256": plan_sha256, "event": text}
        entry = _entry_of(key, "charge", dataset, payload_sha256=payload_sha256, **what)
        return self._append_within(entry, demand)

    def _block_key(self, dataset: str, run: str, block: int) -> ReleaseKey:
        """What pays for a block of rounds, as the run was last opened."""
        account = self._runs.get((dataset, run))
        times = account.settled if account else 0
        return ReleaseKey(run, block, f"{_BLOCK}-{times}" if times else _BLOCK)

    def _require_covered(self, dataset: str, key: ReleaseKey, block: int) -> None:
        if self._block_key(dataset, key.run, block) not in self._paid:
            raise ReleaseConflict(f"no charge of its block covers {key}")
        if self._newest.get((key.run, key.release), 0) > key.round:
            raise ReleaseConflict(f"{key} was asked for after a later round")

    def bind(self, dataset: str, key: ReleaseKey, payload_sha256: str) -> None:
        """Name the content of a charged release: from now on only this may leave under the key.

        Raises
        ------
        ReleaseConflict
            Nothing was charged under the key, or it has other content already.
        """
        with self._table.transaction() as append:
            paid = self._paid.get(key)
            if paid is None or paid.dataset != dataset:
                raise ReleaseConflict(f"{key} was not charged")
            if paid.payload_sha256 not in {None, payload_sha256}:
                raise ReleaseConflict(f"{key} was released with other content")
            if paid.payload_sha256 is None:
                append(_entry_of(key, "release", dataset, payload_sha256=payload_sha256))

    def settle(self, dataset: str, run: str) -> None:
        """End a run's reservation and free what it has not charged; nothing if none is open."""
        with self._table.transaction() as append:
            account = self._runs.get((dataset, run))
            if account is not None and account.open:
                append(_entry("settle", dataset, run))

    def vouch(self, dataset: str, run: str, line: Head) -> None:
        """Write down that the site's audit log has a line, by its place."""
        entry = _entry("audit", dataset, run, round=line.seq, payload_sha256=line.hash)
        with self._table.transaction() as append:
            append(entry)

    @property
    def vouched(self) -> Head | None:
        """The newest line of the audit log that `vouch` wrote down, if there is one."""
        with self._table.transaction():
            return self._vouched

    def restore(
        self, dataset: str, name: str, missing: Mapping[str, int], *, budget: Budget
    ) -> None:
        """Charge what lost rows of this ledger had charged, whatever the budget says.

        Parameters
        ----------
        name : str
            Of the restoration: it stands in the place of a run.
        missing : mapping of str to int
            A tally.
        budget : Budget
            The dataset's, to be shown with it.
        """
        from silotune.privacy.events import ComposedDpEvent, SelfComposedDpEvent, from_json

        parts = [
            SelfComposedDpEvent(from_json(leaf), count) for leaf, count in sorted(missing.items())
        ]
        what = {"event": _text(ComposedDpEvent(parts)), "budget": _text_of(budget)}
        entry = _entry("restore", dataset, name, **what)
        with self._table.transaction() as append:
            append(entry)

    def standing(self, *, upto: int | None = None) -> dict[str, dict[str, tuple[int, int]]]:
        """By dataset and mechanism: how often it was charged, and how often with open reservations.

        Parameters
        ----------
        upto : int, optional
            Only rows up to this number, and charges alone.
        """
        if upto is not None:
            early: dict[str, Tally] = {}
            for row in self._table.rows():
                if row.seq <= upto and row.entry.kind in _CHARGING:
                    spent = early.setdefault(row.entry.dataset, Counter())
                    spent.update(tally_of_text(row.entry.event or ""))
            return {d: {leaf: (n, n) for leaf, n in t.items()} for d, t in early.items()}
        with self._table.transaction():
            charged = {name: Counter(tally) for name, tally in self._charged.items()}
            open_accounts = [account for account in self._runs.values() if account.open]
        held = {name: Counter(tally) for name, tally in charged.items()}
        for account in open_accounts:
            rest = account.committed - Counter(account.charged)
            held.setdefault(account.dataset, Counter()).update(rest)
        return {
            name: {leaf: (charged.get(name, Counter())[leaf], n) for leaf, n in tally.items()}
            for name, tally in held.items()
        }

    def hash_of(self, seq: int) -> str:
        """Hash of a row by its number; empty if there is no such row."""
        return self._table.hash_of(seq)

    def witnessed(self) -> Head | None:
        """The head that the coordinator counter-signed last, as far as this site kept it."""
        return self._table.witnessed()

    def payload_of(self, key: ReleaseKey, *, since_opened: bool = False) -> str | None:
        """SHA-256 of what was released under `key`, or None if nothing was.

        With `since_opened`, only of what was charged since the run was last settled, if it ever was.
        """
        with self._table.transaction():
            paid = self._paid.get(key)
            if paid is None:
                return None
            old = paid.settled < self._runs[paid.dataset, key.run].settled
            return None if since_opened and old else paid.payload_sha256

    def events(self, dataset: str, *, run: str | None = None) -> list[DpEvent]:
        """Charged events of a dataset, oldest first; of one run only, if named."""
        from silotune.privacy.events import from_json

        return [
            from_json(row.entry.event)
            for row in self._table.rows()
            if row.entry.kind in _CHARGING
            and row.entry.event is not None
            and row.entry.dataset == dataset
            and run in {None, row.entry.run}
        ]

    def spent(self, dataset: str, delta: float, *, run: str | None = None) -> float:
        """Epsilon of all that was charged to a dataset (by one run, if named), recomputed."""
        charged = [a.charged for a in self.runs(dataset) if run in {None, a.run}]
        return epsilon_of(total(charged), delta=delta)

    def committed(self, dataset: str, delta: float) -> float:
        """Epsilon of all charges together with what open reservations may still charge."""
        return epsilon_of(total(a.committed for a in self.runs(dataset)), delta=delta)

    def runs(self, dataset: str | None = None) -> list[RunAccount]:
        """Accounts of all runs, that with the newest reservation last."""
        with self._table.transaction():
            return [a for a in self._runs.values() if dataset in {None, a.dataset}]

    def rows(self) -> list[Row]:
        """Every row of the ledger, oldest first."""
        return self._table.rows()

    def verify(self, *, trusted: Ed25519PublicKey | None = None) -> Head:
        """Check the whole ledger against its chain, its head and the counter-signed head.

        With `trusted`, the coordinator's key, a counter-signed head must be there and be its work.
        Raises `LedgerDamaged`.
        """
        return self._table.verify(trusted=trusted)

    def witness(self, head: Head, signature: bytes, key: Ed25519PublicKey) -> None:
        """Keep the head that the coordinator counter-signed (`Head.sign`).

        Raises `LedgerDamaged` if the signature is wrong or this ledger never had that head.
        """
        self._table.witness(head, signature, key)

    def _append_within(self, entry: LedgerEntry, demand: Callable[[], _Demand | None]) -> bool:
        """Append `entry` once what it leads to is covered by a reservation or by the budget.

        Returns False if there was nothing to append.
        """
        approved: tuple[Tally, Budget] | None = None
        while True:
            with self._table.transaction() as append:
                wish = demand()
                if wish is None:
                    return False
                whole = self._others(entry) + Counter(wish.held) if not wish.covered else None
                if whole is None or approved == (whole, wish.budget):
                    append(entry)
                    return True
            # A composition can take seconds: other runs go on meanwhile, and the verdict counts
            # only if, back in a transaction, everything still adds up to the same.
            self._require_within(entry, whole, wish.budget)
            approved = (whole, wish.budget)

    def _others(self, entry: LedgerEntry) -> Tally:
        return total(
            account.committed
            for account in self._runs.values()
            if account.dataset == entry.dataset and account.run != entry.run
        )

    def _require_within(self, entry: LedgerEntry, whole: Tally, budget: Budget) -> None:
        reached = epsilon_of(whole, delta=budget.delta)
        if reached <= budget.epsilon:
            return
        accounts = self.runs(entry.dataset)
        spent = total(a.charged for a in accounts)
        reserved = total(a.committed for a in accounts) - spent
        parts = {"asked": tally_of_text(entry.event or ""), "spent": spent, "reserved": reserved}
        listed = ", ".join(
            f"{name} {epsilon_of(part, delta=budget.delta):.4f}" for name, part in parts.items()
        )
        left = max(0.0, budget.epsilon - self.committed(entry.dataset, budget.delta))
        raise BudgetExceeded(
            f"dataset {entry.dataset!r}, run {entry.run!r}, epsilon at delta = {budget.delta:g}: "
            f"{listed}, together {reached:.4f}; budget {budget.epsilon:.4f}, left {left:.4f}"
        )

    def _observe(self, row: Row) -> None:
        """Fold one row into the accounts."""
        try:
            self._fold(row.entry)
        except (KeyError, TypeError, ValueError, EventInvalid) as exc:
            raise LedgerDamaged(
                f"{self.path}: row {row.seq} has a valid hash but makes no sense to this version"
            ) from exc

    def _fold(self, entry: LedgerEntry) -> None:
        place = (entry.dataset, entry.run)
        if entry.kind == "settle":
            account = self._runs[place]
            self._runs[place] = replace(account, open=False, settled=account.settled + 1)
            return
        if entry.kind == "audit":
            self._vouched = Head(int(entry.round or 0), entry.payload_sha256 or "")
            return
        if entry.kind == "release":
            key = _key_of(entry)
            self._paid[key] = replace(self._paid[key], payload_sha256=entry.payload_sha256)
            return
        tally = tally_of_text(entry.event or "")
        if entry.kind in _CHARGING:
            self._charged.setdefault(entry.dataset, Counter()).update(tally)
        if entry.kind in {"reserve", "restore"}:
            before = self._runs.pop(place, None)
            account = RunAccount(
                dataset=entry.dataset,
                run=entry.run,
                plan_sha256=entry.plan_sha256 or "",
                budget=Budget(**json.loads(entry.budget or "")),
                reserved=tally,
            )
            if entry.kind == "restore":
                account = replace(account, reserved={}, open=False, charged=tally, charges=1)
            elif before is not None:
                plan, budget = account.plan_sha256, account.budget
                account = replace(
                    before, plan_sha256=plan, budget=budget, reserved=tally, open=True
                )
            self._runs[place] = account
        elif entry.kind == "charge":
            account = self._runs[place]
            charged = Counter(account.charged) + Counter(tally)
            key = _key_of(entry)
            charges = account.charges + (not key.release.startswith(_BLOCK))
            self._runs[place] = replace(account, charged=charged, charges=charges)
            content = entry.payload_sha256
            self._paid[key] = _Paid(entry.dataset, tally, content, settled=account.settled)
            line = key.run, key.release
            self._newest[line] = max(key.round, self._newest.get(line, 0))
        else:
            raise ValueError(entry.kind)


def _key_of(entry: LedgerEntry) -> ReleaseKey:
    return ReleaseKey(entry.run, int(entry.round or 0), entry.release or "")


def _cost(event: DpEvent) -> Tally:
    tally = tally_of(event)
    if not tally:
        raise ValueError("an event that costs nothing has no place in the ledger")
    return tally


def _text(event: DpEvent) -> str:
    from silotune.privacy.events import to_json

    return str(to_json(event))


def _text_of(budget: Budget) -> str:
    return json.dumps(asdict(budget), sort_keys=True, allow_nan=False)


def _entry(kind: str, dataset: str, run: str, **columns: Any) -> LedgerEntry:
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    run = ReleaseKey(run, 0, kind).run
    return LedgerEntry(kind, require_dataset_key(dataset), run, now, **columns)


def _entry_of(key: ReleaseKey, kind: str, dataset: str, **columns: Any) -> LedgerEntry:
    return _entry(kind, dataset, key.run, round=key.round, release=key.release, **columns)


def open_ledger(place: Path) -> Ledger:
    """The ledger at a file, or in a site's state folder; it must be there.

    Raises
    ------
    LedgerDamaged
        No ledger there, or not a whole one.
    """
    return Ledger(place / LEDGER_FILE if place.is_dir() else place, create=False)


def find_ledger(state: Path) -> Ledger | None:
    """The ledger of a site's state folder; None if it has none yet."""
    path = state / LEDGER_FILE
    return Ledger(path, create=False) if path.exists() else None
