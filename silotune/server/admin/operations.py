"""What people ask of a running coordinator, whichever way they come: gRPC, pages, or the admin socket.

Everybody who is known may look. Whoever acts must be an operator, and every attempt, allowed or not, is
written to the audit log and to the store with the name of who made it, before the answer goes out.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Concatenate, ParamSpec, TypeVar

from cryptography import x509
from pydantic import ConfigDict, Field, ValidationError, validate_call

from silotune.dashboard.accounts import Accounts
from silotune.errors import SilotuneError
from silotune.events.source import RequestFacts, Row, SiteFacts
from silotune.flower.superlink import LinkState
from silotune.plan.plan import Plan
from silotune.plan.sections import Name, Positive
from silotune.server.books import Books
from silotune.server.config import CoordinatorConfig, CoordinatorKeys, Home
from silotune.server.enrolment import INVITE_SECONDS, Registrar
from silotune.server.errors import NotPossibleNow
from silotune.server.run_control import RunControl
from silotune.server.store.database import Store
from silotune.server.store.people import Actions, People
from silotune.server.store.runs import FederationLog, StoredRuns
from silotune.trust import identity
from silotune.trust.audit import AuditLog
from silotune.trust.errors import BodyInvalid
from silotune.trust.identity import Person, PersonRole
from silotune.trust.roster import Pem

ACCOUNTS_FILE = "accounts.json"
"""Name of the file with the passwords' hashes, in the coordinator's state folder."""

Reason = Annotated[str, Field(max_length=500)]
"""Why, for the other side and the audit log."""

_Given = ParamSpec("_Given")
_Found = TypeVar("_Found")
_Method = Callable[Concatenate["Operations", str, _Given], _Found]
_Action = Callable[Concatenate["Operations", Person, str, _Given], _Found]


@dataclass(frozen=True, kw_only=True)
class CoordinatorParts:
    """The parts of a coordinator that people's operations and the watchers beside it need.

    Attributes
    ----------
    url : str
        What sites connect to.
    """

    home: Home
    config: CoordinatorConfig
    keys: CoordinatorKeys
    store: Store
    link: LinkState
    audit: AuditLog
    log: FederationLog
    registrar: Registrar
    books: Books
    run_control: RunControl
    url: str


def _joined(operations: Operations, *target: str) -> str:
    return "/".join(map(str, target))


def _action(
    *, viewers: bool = False, named: Callable[..., str] = _joined
) -> Callable[[_Method[_Given, _Found]], _Action[_Given, _Found]]:
    """Make a method an action of a person: judged, checked, and written down under its own name.

    Positional arguments are what it is done to, keywords how. The person is not among the method's own:
    it acts in nobody's name but by this way.

    Parameters
    ----------
    viewers : bool
        Whether viewers may do it, too.
    named : callable
        What it is done to, as it is written down.
    """

    def decorate(method: _Method[_Given, _Found]) -> _Action[_Given, _Found]:
        checked = validate_call(config=ConfigDict(strict=True, allow_inf_nan=False))(method)
        fields = tuple(inspect.signature(method).parameters)

        @functools.wraps(method)
        def action(
            self: Operations,
            person: Person,
            target: str,
            /,
            *args: _Given.args,
            **given: _Given.kwargs,
        ) -> _Found:
            with self._recorded(person, method.__name__, named(self, str(target), *args)):
                if not viewers:
                    person.require_operator()
                try:
                    return checked(self, target, *args, **given)
                except ValidationError as exc:
                    places = (error["loc"][0] for error in exc.errors())
                    wrong = {fields[at] if isinstance(at, int) else at for at in places}
                    raise BodyInvalid(f"{method.__name__}: {', '.join(sorted(wrong))}") from exc

        return action

    return decorate


class Operations:
    """Questions, and actions in somebody's name: ``operations.pause(person, run)``.

    Parameters
    ----------
    parts : CoordinatorParts
        The coordinator's.

    Attributes
    ----------
    source : StoredRuns
        The runs.
    accounts : Accounts
        Who may sign in at the pages with a password.
    admin_address : str
        ``host:port`` of the gRPC API, once it is served.
    """

    def __init__(self, parts: CoordinatorParts) -> None:
        self._parts = parts
        self._people, self._actions = People(parts.store), Actions(parts.store)
        self._started_at = time.time()
        self.source, self.log = StoredRuns(parts.store), parts.log
        self.accounts = Accounts(parts.home.state / ACCOUNTS_FILE)
        self.admin_address = ""

    # --- questions ---

    def status(self) -> dict[str, Any]:
        """What an operator wants to see first."""
        keys, sites = self._parts.keys, [s for s in self.sites() if s.status == "active"]
        return {
            "federation": self._parts.config.federation.name,
            "url": self._parts.url,
            "authority_sha256": keys.fingerprint,
            "federation_key": identity.encode_signing_key(keys.signing.public_key()),
            "certificate_days_left": round(identity.days_left(keys.server_certificate), 1),
            "roster_version": self._parts.registrar.roster.version,
            "sites": len(sites),
            "online": sorted(site.site for site in sites if site.online),
            "up_seconds": round(time.time() - self._started_at, 1),
        }

    def sites(self) -> list[SiteFacts]:
        """Every site that is or was in the roster."""
        registrar, sightings = self._parts.registrar, self._parts.link.sightings()
        enrolled, found = registrar.enrolled, []
        for member in registrar.roster.members:
            active = enrolled.get(member.name)
            seen = sightings.get(active.node) if active else None
            found.append(
                SiteFacts(
                    site=member.name,
                    status=member.status,
                    online=bool(seen and seen.online),
                    last_seen=seen.until if seen and seen.until else None,
                    words=member.words,
                    certificate_sha256=member.certificate,
                    books=self._parts.books.of(member.name).halted,
                )
            )
        return found

    def requests(self) -> list[RequestFacts]:
        """Requests to be enrolled, newest first."""
        return [
            RequestFacts(
                request=row["id"],
                site=row["site"],
                state=row["state"],
                reason=row["reason"],
                requested_at=row["requested_at"],
                words=identity.six_words(
                    name=row["site"], signing_key=row["signing_key"], node_key=row["node_key"]
                ),
            )
            for row in self._parts.registrar.requests()
        ]

    def runs(self) -> list[Row]:
        """Every run's row in the store, newest first."""
        return [_shown(row) for row in self._parts.run_control.runs.newest()]

    def run(self, run: str) -> Row:
        """A run's row, and what each site said to its plan. Raises `NotPossibleNow`."""
        runs = self._parts.run_control.runs
        said = {
            site: {"site": site, "verdict": row["verdict"], "reason": row["reason"]}
            for site, row in runs.decisions(run).items()
        }
        silent = {
            site: {"site": site, "verdict": "waiting", "reason": ""}
            for site in self._parts.registrar.enrolled
        }
        decisions = [found for _, found in sorted({**silent, **said}.items())]
        return {**_shown(runs.get(run)), "decisions": decisions}

    def events(self, run: str, *, after: int = 0) -> Row:
        """A run's state, and its events behind an id. Raises `NotPossibleNow`."""
        runs = self._parts.run_control.runs
        state = runs.get(run)["state"]  # before the events: none comes behind the last state
        return {"state": state, "events": [e.as_dict() for e in runs.events(run, after=after)]}

    def people(self) -> list[Row]:
        """Everybody who has or had a certificate."""
        return [dict(row) for row in self._people.all()]

    def actions(self) -> list[Row]:
        """What people did or were not allowed to do, newest first."""
        return [dict(row) for row in self._actions.newest()]

    def alarms(self) -> list[Row]:
        """What only an attack or a mistake explains, newest first: events of kind ``alarm``."""
        return self.log.newest("alarm")

    def holder(self, certificate: x509.Certificate) -> Person:
        """Whom a certificate speaks for. Raises `SignInNeeded`."""
        return self._people.holder(certificate, self._parts.keys.authority.certificate)

    # --- runs ---

    @_action(named=lambda self, plan: hashlib.sha256(plan.encode()).hexdigest())
    def submit(self, plan: str, *, quorum: Annotated[int, Field(ge=1)] | None = None) -> Row:
        """Propose a plan, given as its canonical JSON, to the sites; the new run."""
        run_control = self._parts.run_control
        return self.run(run_control.propose(Plan.from_canonical(plan), quorum=quorum))

    @_action()
    def pause(self, run: str) -> Row:
        """Hold a run after its round; the run as it is then."""
        self._parts.run_control.pause(run)
        return self.run(run)

    @_action()
    def resume(self, run: str) -> Row:
        """Go on with a paused or failed run."""
        self._parts.run_control.resume(run)
        return self.run(run)

    @_action()
    def stop(self, run: str) -> Row:
        """End a run for good."""
        self._parts.run_control.stop(run)
        return self.run(run)

    @_action(viewers=True)
    def download(self, run: str, name: str) -> bytes:
        """A file of a run."""
        return self.source.read(run, name)

    # --- sites ---

    @_action()
    def invite(self, site: Name, *, lifetime: Positive = INVITE_SECONDS) -> Row:
        """A one-time code with which a new site can ask to be let in."""
        return self._code(site, lifetime, rotate=False)

    @_action()
    def rotate(self, site: Name, *, lifetime: Positive = INVITE_SECONDS) -> Row:
        """A one-time code with which an active site gets new keys."""
        return self._code(site, lifetime, rotate=True)

    @_action(named=lambda self, request: self._named(request))
    def approve(self, request: str) -> Row:
        """Let a site in, by its request's id or, if one request of it waits, by its name."""
        member = self._parts.registrar.approve(self._found(request))
        return {"site": member.name, "state": "approved", "words": member.words}

    @_action(named=lambda self, request: self._named(request))
    def refuse(self, request: str, *, reason: Reason = "") -> Row:
        """Turn a site away."""
        site = self._parts.registrar.refuse(self._found(request), reason=reason)
        return {"site": site, "state": "refused"}

    @_action()
    def revoke(self, site: str, *, reason: Reason = "") -> Row:
        """Shut a site out for good."""
        self._parts.registrar.revoke(site, reason=reason)
        return {"site": site, "status": "revoked"}

    # --- people ---

    @_action()
    def add_person(self, name: Name, *, role: PersonRole, request: Pem) -> Row:
        """Sign a person's certificate request; what they need besides their key."""
        authority = self._parts.keys.authority
        certificate = self._people.issue(authority, request, name=name, role=role)
        self._parts.audit.append("person_added", name=name, role=role)
        return {
            "certificate": identity.chain_pem([certificate]),
            "authority": identity.chain_pem([authority.certificate]),
            "address": self.admin_address,
            "server_name": self._parts.config.listen.hosts[0],
        }

    @_action()
    def revoke_person(self, name: str) -> Row:
        """Let a person's certificate and password count no more; which of them there were."""
        ended = ["certificate"] if self._people.revoke(name) else []
        ended += ["password"] if self.accounts.remove(name) else []
        if not ended:
            raise NotPossibleNow(f"nobody called {name[:63]!r} has a certificate or a password")
        self._parts.audit.append("person_revoked", name=name)
        return {"name": name, "status": "revoked", "ended": ended}

    @_action()
    def set_password(self, name: Name, *, role: PersonRole, password: str) -> Row:
        """Let a person sign in at the pages with a password."""
        self.accounts.add(name, role, password)
        self._parts.audit.append("password_set", name=name, role=role)
        return {"name": name, "role": role}

    # --- what is written down ---

    def signed_in(self, person: Person, *, how: str) -> None:
        """Note that somebody came in."""
        self._note(person, "sign_in", how, "done")

    def refused(self, person: Person, action: str, target: str, *, code: str) -> None:
        """Note what somebody asked for in a way that no operation understood or was asked for."""
        self._note(person, action[:40], target, code)

    @contextlib.contextmanager
    def _recorded(self, person: Person, action: str, target: str) -> Iterator[None]:
        try:
            yield
        except Exception as exc:
            code = exc.code if isinstance(exc, SilotuneError) else SilotuneError.code
            self._note(person, action, target, code)
            raise
        self._note(person, action, target, "done")

    def _note(self, person: Person, action: str, target: str, outcome: str) -> None:
        line: dict[str, Any] = {"who": person.name, "role": person.role, "action": action}
        self._parts.audit.append("operator_action", **line, target=target[:200], outcome=outcome)
        self._actions.record(person, action, target, outcome=outcome)

    # --- parts ---

    def _code(self, site: str, lifetime: float, *, rotate: bool) -> Row:
        code = self._parts.registrar.invite(
            site, url=self._parts.url, lifetime=lifetime, rotate=rotate
        )
        return {"site": site, "code": code, "expires": time.time() + lifetime}

    def _waiting(self, name: str) -> list[str]:
        """Requests of a site that wait."""
        rows = self._parts.registrar.requests()
        return [row["id"] for row in rows if row["site"] == name and row["state"] == "waiting"]

    def _found(self, request: str) -> str:
        """A request by its id, or by its site's name if one waits."""
        waiting = self._waiting(request)
        if len(waiting) > 1:
            raise NotPossibleNow(
                f"{len(waiting)} requests of {request!r} wait",
                remedy="Give the id of one: `silotune coordinator requests` lists them.",
            )
        return waiting[0] if waiting else request

    def _named(self, request: str) -> str:
        """What was asked for: a site's name and its request's id, as far as they are known."""
        waiting = self._waiting(request)
        if len(waiting) == 1:
            return f"{request} {waiting[0]}"
        rows = self._parts.registrar.requests()
        return " ".join([*(row["site"] for row in rows if row["id"] == request), request])


def _shown(row: Any) -> Row:
    return {key: value for key, value in row.items() if key not in {"plan", "link_run"}}
