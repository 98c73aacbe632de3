"""What people may ask of a running coordinator: the one door behind gRPC and the dashboard.

Everybody who is known may look. Whoever acts must be an operator, and every attempt, allowed or not, is
written to the audit log and to the store with the name of who did it, before the answer goes out.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from silotune.errors import SilotuneError
from silotune.events.source import Row
from silotune.flower.superlink import LinkState
from silotune.plan.plan import Plan
from silotune.server.books import Books
from silotune.server.conductor import Conductor
from silotune.server.enrolment import Registrar
from silotune.server.store.database import Store
from silotune.server.store.people import Actions
from silotune.server.store.runs import FederationLog, StoredRuns
from silotune.trust.audit import AuditLog
from silotune.trust.errors import NotPermitted
from silotune.trust.identity import Person, six_words


@dataclass(frozen=True, kw_only=True)
class SiteOverview:
    """A site of the federation.

    Attributes
    ----------
    last_seen : float or None
        Unix time until which its heartbeats were good.
    books : str
        Why its books are not those that were signed last; empty if they are.
    """

    site: str
    status: str
    online: bool
    last_seen: float | None
    words: str
    books: str = ""


@dataclass(frozen=True, kw_only=True)
class RequestRow:
    """A request to be enrolled: ``waiting``, ``approved`` or ``refused``."""

    request: str
    site: str
    state: str
    reason: str
    requested_at: float
    words: str


class Operations:
    """Questions and actions, each in somebody's name.

    Parameters
    ----------
    store, conductor, registrar, books, link, audit, log
        The coordinator's parts.
    """

    def __init__(
        self,
        *,
        store: Store,
        conductor: Conductor,
        registrar: Registrar,
        books: Books,
        link: LinkState,
        audit: AuditLog,
        log: FederationLog,
    ) -> None:
        self.source, self.actions = StoredRuns(store), Actions(store)
        self.log = log
        self.conductor = conductor
        self._registrar, self._link, self._audit = registrar, link, audit
        self._books = books

    @property
    def federation(self) -> str:
        """Its name."""
        return self._registrar.federation

    # --- questions ---

    def done(self) -> list[dict[str, Any]]:
        """What people did, newest first."""
        return [dict(row) for row in self.actions.newest()]

    def alarms(self) -> list[Row]:
        """What only an attack or a mistake explains, newest first: events of kind ``alarm``."""
        return self.log.newest("alarm")

    def sites(self) -> list[SiteOverview]:
        """Every site that is or was in the roster."""
        sightings, enrolled = self._link.sightings(), self._registrar.enrolled
        found = []
        for member in self._registrar.roster.members:
            active = enrolled.get(member.name)
            seen = sightings.get(active.node) if active else None
            found.append(
                SiteOverview(
                    site=member.name,
                    status=member.status,
                    online=bool(seen and seen.online),
                    last_seen=seen.until if seen and seen.until else None,
                    words=member.words,
                    books=self._books.of(member.name).halted,
                )
            )
        return found

    def requests(self) -> list[RequestRow]:
        """Requests to be enrolled, newest first."""
        return [
            RequestRow(
                request=row["id"],
                site=row["site"],
                state=row["state"],
                reason=row["reason"],
                requested_at=row["requested_at"],
                words=six_words(
                    name=row["site"], signing_key=row["signing_key"], node_key=row["node_key"]
                ),
            )
            for row in self._registrar.requests()
        ]

    # --- actions ---

    def submit(self, person: Person, plan: str, *, quorum: int | None = None) -> str:
        """Propose a plan, given as its canonical JSON, to the sites; the run's name."""
        with self._acting(person, "submit", hashlib.sha256(plan.encode()).hexdigest()):
            return self.conductor.propose(Plan.from_canonical(plan), quorum=quorum)

    def pause(self, person: Person, run: str) -> None:
        """Pause a run after its round."""
        with self._acting(person, "pause", run):
            self.conductor.pause(run)

    def resume(self, person: Person, run: str) -> None:
        """Go on with a run."""
        with self._acting(person, "resume", run):
            self.conductor.resume(run)

    def stop(self, person: Person, run: str) -> None:
        """End a run for good."""
        with self._acting(person, "stop", run):
            self.conductor.stop(run)

    def approve(self, person: Person, request: str) -> str:
        """Let a site in; its name."""
        with self._acting(person, "approve", self._named(request)):
            return self._registrar.approve(request).name

    def refuse(self, person: Person, request: str, *, reason: str) -> str:
        """Turn a site away; its name."""
        with self._acting(person, "refuse", self._named(request)):
            return self._registrar.refuse(request, reason=reason)

    def revoke(self, person: Person, site: str, *, reason: str) -> None:
        """Shut a site out for good."""
        with self._acting(person, "revoke", site):
            self._registrar.revoke(site, reason=reason)

    def download(self, person: Person, run: str, name: str) -> bytes:
        """A file of a run; who took it is written down."""
        with self._noted(person, "download", f"{run}/{name}"):
            return self.source.read(run, name)

    def refused(self, person: Person, path: str) -> None:
        """Note what a page's form asked for that the person's role does not allow."""
        _, _, target, action = (*path.split("/", 3), "", "", "")[:4]
        self._note(person, action[:40], target, NotPermitted.code)

    def signed_in(self, person: Person, *, how: str) -> None:
        """Note that somebody came in."""
        self._note(person, "sign_in", how, "done")

    def _named(self, request: str) -> str:
        """A request with the name of its site, if there is such a request."""
        found = (row["site"] for row in self._registrar.requests() if row["id"] == request)
        return " ".join([*found, request])

    @contextlib.contextmanager
    def _acting(self, person: Person, action: str, target: str) -> Iterator[None]:
        with self._noted(person, action, target):
            person.require_operator()
            yield

    @contextlib.contextmanager
    def _noted(self, person: Person, action: str, target: str) -> Iterator[None]:
        try:
            yield
        except SilotuneError as exc:
            self._note(person, action, target, exc.code)
            raise
        except Exception:
            self._note(person, action, target, SilotuneError.code)
            raise
        self._note(person, action, target, "done")

    def _note(self, person: Person, action: str, target: str, outcome: str) -> None:
        line: dict[str, Any] = {"who": person.name, "role": person.role, "action": action}
        self._audit.append("operator_action", **line, target=target[:200], outcome=outcome)
        self.actions.record(person, action, target, outcome=outcome)
