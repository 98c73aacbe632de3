"""Who belongs to the federation: invitations, requests, certificates, and the roster of it all."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from cryptography import x509
from sqlalchemy import Connection, RowMapping, delete, insert, select, update

from silotune.flower.superlink import LinkState
from silotune.protocol.envelope import COORDINATOR
from silotune.protocol.http import (
    EnrolmentQuery,
    EnrolmentReply,
    EnrolReply,
    EnrolRequest,
    Leave,
    RenewReply,
    RenewRequest,
)
from silotune.server.config import CoordinatorKeys
from silotune.server.errors import NotPossibleNow
from silotune.server.guard import Caller
from silotune.server.store.database import ENROLMENTS, INVITES, MEMBERS, ROSTERS, Store
from silotune.server.store.events import add_events, event_row
from silotune.trust import identity
from silotune.trust.audit import AuditLog
from silotune.trust.errors import IdentityInvalid, InviteInvalid
from silotune.trust.identity import Subject
from silotune.trust.invite import Invite, secret_digest
from silotune.trust.roster import Roster, RosterEntry, SignedRoster

INVITE_SECONDS = 7 * 24 * 3600.0
"""How long an invitation is valid unless said otherwise."""


@dataclass(frozen=True, kw_only=True)
class Enrolled:
    """An active site: who it is, and its node in the link state."""

    member: RosterEntry
    node: int


class Registrar:
    """The list of sites, and everything that changes it.

    Parameters
    ----------
    federation : str
        Its name.
    store, keys, link, audit
        The coordinator's.
    changed : callable
        Called after each new version of the roster.
    """

    def __init__(
        self,
        *,
        federation: str,
        store: Store,
        keys: CoordinatorKeys,
        link: LinkState,
        audit: AuditLog,
        changed: Callable[[], None],
    ) -> None:
        self.federation = federation
        self._store, self._keys, self._link = store, keys, link
        self._audit, self._changed = audit, changed
        self._lock = threading.RLock()
        self._enrolled: dict[str, Enrolled] = {}
        self._callers: dict[str, Caller] = {}
        self.roster = self._load()

    # --- looking up ---

    @property
    def enrolled(self) -> dict[str, Enrolled]:
        """Active sites by name."""
        return dict(self._enrolled)

    def is_active(self, site: str) -> bool:
        """Whether a site belongs to the federation now."""
        return site in self._enrolled

    def caller(self, certificate: bytes) -> Caller | None:
        """The active site that a certificate (DER) speaks for; None for anybody else.

        TLS has checked issuer and validity when the connection began; a connection may outlive both.
        """
        try:
            parsed, subject, node_key = _parsed(certificate)
        except (ValueError, IdentityInvalid):
            return None
        if subject.role != "site" or identity.days_left(parsed) <= 0:
            return None
        caller = self._callers.get(subject.name)
        return caller if caller and node_key == caller.node_key else None

    def rosters(self, *, after: int) -> tuple[SignedRoster, ...]:
        """Signed versions behind one, oldest first."""
        query = select(ROSTERS).where(ROSTERS.c.version > after).order_by(ROSTERS.c.version)
        with self._store.transaction() as connection:
            rows = connection.execute(query).mappings().all()
        return tuple(SignedRoster(roster=r["roster"], signature=r["signature"]) for r in rows)

    def requests(self) -> list[RowMapping]:
        """Enrolment requests, newest first."""
        query = select(ENROLMENTS).order_by(ENROLMENTS.c.requested_at.desc()).limit(200)
        with self._store.transaction() as connection:
            return list(connection.execute(query).mappings())

    # --- enrolment ---

    def invite(
        self, site: str, *, url: str, lifetime: float = INVITE_SECONDS, rotate: bool = False
    ) -> str:
        """A one-time code for a new site or, with `rotate`, for new keys of an active one.

        Raises
        ------
        RunUnknown
            The site is active already, or to rotate, is not.
        InviteInvalid
            The name is reserved.
        """
        if site == COORDINATOR:
            raise InviteInvalid(f"no site can be called {COORDINATOR!r}")
        if self.is_active(site) != rotate:
            raise NotPossibleNow(
                f"{site!r} is {'not ' if rotate else ''}an active site",
                remedy="`invite SITE` is for new sites, `sites rotate SITE` for active ones.",
            )
        fingerprint = self._keys.fingerprint
        made = Invite.new(url=url, authority_fingerprint=fingerprint, lifetime=lifetime)
        row = {
            "digest": made.secret_digest,
            "site": site,
            "expires": made.expires,
            "rotates": int(rotate),
        }
        with self._store.transaction() as connection:
            connection.execute(delete(INVITES).where(INVITES.c.expires < time.time() - 86400))
            connection.execute(insert(INVITES).values(row))
        self._audit.append("site_invited", site=site, expires=made.expires)
        return made.encode()

    def enrol(self, asked: EnrolRequest) -> EnrolReply:
        """Take a site's request, if its invitation is good; the same request again is harmless.

        Raises
        ------
        InviteInvalid
            Unknown, expired, of another site, or used by another request.
        IdentityInvalid
            A key or the certificate request is not what it should be, or is in use.
        """
        digest = secret_digest(asked.secret)
        node_key = identity.public_pem(identity.read_request(asked.request, name=asked.name))
        if not asked.verified(identity.decode_signing_key(asked.signing_key)):
            raise IdentityInvalid("the request is not signed with the signing key it offers")
        named = {"name": asked.name, "signing_key": asked.signing_key, "node_key": node_key}
        words = identity.six_words(**named)
        text = f"{digest}\0{asked.signing_key}\0{node_key}"
        number = hashlib.sha256(text.encode()).hexdigest()[:32]
        with self._lock, self._store.transaction() as connection:
            # A site that was interrupted asks again, perhaps after it was approved.
            mine = (ENROLMENTS.c.id == number, ENROLMENTS.c.site == asked.name)
            known = connection.execute(select(ENROLMENTS.c.id).where(*mine)).first()
            if known is None or asked.federation != self.federation:
                invite = connection.execute(select(INVITES).where(INVITES.c.digest == digest))
                self._require_invite(invite.mappings().first(), asked)
                self._require_fresh_keys(connection, node_key, asked.signing_key)
                used = update(INVITES).where(
                    INVITES.c.digest == digest, INVITES.c.used_at.is_(None)
                )
                if connection.execute(used.values(used_at=time.time())).rowcount != 1:
                    raise InviteInvalid("the code was used before")
                row = {
                    "id": number,
                    "site": asked.name,
                    "request": asked.request,
                    "signing_key": asked.signing_key,
                    "node_key": node_key,
                    "state": "waiting",
                    "reason": "",
                    "requested_at": time.time(),
                }
                connection.execute(insert(ENROLMENTS).values(row))
                told = {"site": asked.name, "words": words}
                add_events(connection, [event_row(None, "enrolment_requested", told, time.time())])
                self._audit.append("enrolment_requested", site=asked.name, enrolment=number)
        return EnrolReply(enrolment=number, words=words)

    def enrolment(self, asked: EnrolmentQuery) -> EnrolmentReply:
        """How a request stands, for who holds its signing key.

        Raises
        ------
        InviteInvalid
            There is no such request, or the query is not signed with its key.
        """
        with self._store.transaction() as connection:
            row = self._row(connection, asked.enrolment)
            member = connection.execute(select(MEMBERS).where(MEMBERS.c.site == row["site"]))
            found = member.mappings().first()
        if not asked.verified(identity.decode_signing_key(row["signing_key"])):
            raise InviteInvalid("there is no such request")
        if row["state"] != "approved" or found is None or found["node_key"] != row["node_key"]:
            waits = row["state"] == "waiting"
            return EnrolmentReply(state="waiting" if waits else "refused", reason=row["reason"])
        return EnrolmentReply(
            state="approved",
            certificate=found["certificate"],
            federation_key=identity.encode_signing_key(self._keys.signing.public_key()),
            rosters=self.rosters(after=0)[-1:],
        )

    def approve(self, number: str) -> RosterEntry:
        """Let a waiting site in: certificate, node, roster.

        Raises
        ------
        RunUnknown
            There is no such request, or it was decided.
        """
        with self._lock:
            with self._store.transaction() as connection:
                row = self._waiting(connection, number)
                subject = Subject(name=row["site"], role="site")
                certificate = self._keys.authority.issue_client(row["request"], subject=subject)
                self._decide(connection, number, "approved", "")
                self._replace_member(connection, row, certificate)
                self._new_roster(connection)
            self._audit.append("site_approved", site=row["site"], enrolment=number)
            self._reload()
        return self._enrolled[row["site"]].member

    def refuse(self, number: str, *, reason: str) -> str:
        """Turn a waiting site away; its name. Raises `NotPossibleNow`."""
        with self._lock, self._store.transaction() as connection:
            row = self._waiting(connection, number)
            self._decide(connection, number, "refused", reason)
            self._audit.append("site_refused", site=row["site"], enrolment=number, reason=reason)
        return str(row["site"])

    def renew(self, caller: Caller, asked: RenewRequest) -> RenewReply:
        """The next certificate over the same node key.

        Raises
        ------
        IdentityInvalid
            The request is not the caller's own, or is for another key.
        """
        with self._lock:
            member = self._enrolled[caller.site].member
            key = identity.read_request(asked.request, name=caller.site)
            signed = asked.verified(identity.decode_signing_key(member.signing_key))
            if asked.name != caller.site or not signed:
                raise IdentityInvalid("the request is not signed by the site it is for")
            if identity.public_pem(key) != member.node_key:
                raise IdentityInvalid("a new node key needs a new invitation")
            subject = Subject(name=caller.site, role="site")
            certificate = self._keys.authority.issue_client(asked.request, subject=subject)
            pem = identity.chain_pem([certificate])
            with self._store.transaction() as connection:
                mine = update(MEMBERS).where(MEMBERS.c.site == caller.site)
                connection.execute(mine.values(certificate=pem))
                self._new_roster(connection)
            self._audit.append("certificate_renewed", site=caller.site)
            self._reload()
        return RenewReply(certificate=pem)

    def revoke(self, site: str, *, reason: str) -> None:
        """Shut a site out, now and for good. Raises `NotPossibleNow`."""
        with self._lock:
            enrolled = self._enrolled.get(site)
            if enrolled is None:
                raise NotPossibleNow(f"there is no active site {site!r}")
            with self._store.transaction() as connection:
                mine = update(MEMBERS).where(MEMBERS.c.site == site)
                connection.execute(mine.values(status="revoked"))
                self._new_roster(connection)
            self._audit.append("site_revoked", site=site, reason=reason)
            self._reload()
            self._link.unregister(enrolled.node)

    def leave(self, caller: Caller, asked: Leave) -> None:
        """A site revokes itself. Raises `IdentityInvalid` if it did not sign that."""
        member = self._enrolled[caller.site].member
        good = (asked.federation, asked.name) == (self.federation, caller.site)
        if not good or not asked.verified(identity.decode_signing_key(member.signing_key)):
            raise IdentityInvalid("the request to leave is not signed by the site")
        self.revoke(caller.site, reason="the site left")

    # --- parts ---

    def _require_invite(self, invite: RowMapping | None, asked: EnrolRequest) -> None:
        if invite is None or asked.federation != self.federation:
            raise InviteInvalid("the coordinator does not know this code")
        if invite["site"] != asked.name:
            raise InviteInvalid(
                f"the code is for the site {invite['site']!r}, and the name that asks is "
                f"{asked.name!r}: set name in site.toml, or have a code made for that name"
            )
        if self.is_active(asked.name) and not invite["rotates"]:
            raise InviteInvalid(f"{asked.name!r} is enrolled already")
        if invite["expires"] < time.time():
            raise InviteInvalid("the code has expired")

    def _require_fresh_keys(self, connection: Connection, node_key: str, signing_key: str) -> None:
        for row in connection.execute(select(MEMBERS)).mappings():
            if row["node_key"] == node_key or row["signing_key"] == signing_key:
                raise IdentityInvalid("the federation has seen this key before; make new ones")

    def _row(self, connection: Connection, number: str) -> RowMapping:
        query = select(ENROLMENTS).where(ENROLMENTS.c.id == number)
        row = connection.execute(query).mappings().first()
        if row is None:
            raise InviteInvalid("there is no such request")
        return row

    def _waiting(self, connection: Connection, number: str) -> RowMapping:
        query = select(ENROLMENTS).where(ENROLMENTS.c.id == number)
        row = connection.execute(query).mappings().first()
        if row is None or row["state"] != "waiting":
            raise NotPossibleNow(f"there is no waiting request {number!r}")
        return row

    def _decide(self, connection: Connection, number: str, state: str, reason: str) -> None:
        mine = update(ENROLMENTS).where(ENROLMENTS.c.id == number)
        connection.execute(mine.values(state=state, reason=reason, decided_at=time.time()))

    def _replace_member(
        self, connection: Connection, row: RowMapping, certificate: x509.Certificate
    ) -> None:
        connection.execute(delete(MEMBERS).where(MEMBERS.c.site == row["site"]))
        member = {
            "site": row["site"],
            "signing_key": row["signing_key"],
            "node_key": row["node_key"],
            "certificate": identity.chain_pem([certificate]),
            "status": "active",
            "since": time.time(),
        }
        connection.execute(insert(MEMBERS).values(member))

    def _new_roster(self, connection: Connection) -> None:
        members = [_member(row) for row in connection.execute(select(MEMBERS)).mappings()]
        roster = self.roster.successor(members=members, issued_at=int(time.time()))
        self._write_roster(connection, roster)

    def _write_roster(self, connection: Connection, roster: Roster) -> None:
        signed = SignedRoster.sign(roster, self._keys.signing)
        row = {"version": roster.version, **signed.model_dump()}
        connection.execute(insert(ROSTERS).values(row))

    def _load(self) -> Roster:
        """The newest roster, a first one if there is none; nodes are registered if need be."""
        query = select(ROSTERS).order_by(ROSTERS.c.version.desc()).limit(1)
        with self._store.transaction() as connection:
            row = connection.execute(query).mappings().first()
            if row is None:
                first = Roster(
                    federation=self.federation, version=1, previous="", issued_at=int(time.time())
                )
                self._write_roster(connection, first)
                return first
        signed = SignedRoster(roster=row["roster"], signature=row["signature"])
        roster = signed.verify(self._keys.signing.public_key())
        before = {name: enrolled.node for name, enrolled in self._enrolled.items()}
        self._enrolled = {
            name: Enrolled(member=member, node=self._link.register(member.node_key, name))
            for name, member in roster.active.items()
        }
        self._callers = {
            name: Caller(site=name, node=e.node, node_key=e.member.node_key)
            for name, e in self._enrolled.items()
        }
        for name, node in before.items():
            if name in self._enrolled and self._enrolled[name].node != node:
                self._link.unregister(node)  # its keys were rotated
        return roster

    def _reload(self) -> None:
        self.roster = self._load()
        self._changed()


@lru_cache(maxsize=1024)
def _parsed(certificate: bytes) -> tuple[x509.Certificate, Subject, str]:
    """What a certificate says for as long as it is valid, and its node key: asked at each request."""
    parsed = x509.load_der_x509_certificate(certificate)
    return parsed, identity.subject_of(parsed), identity.key_of(parsed)


def _member(row: RowMapping) -> RosterEntry:
    certificate = identity.certificate_from_pem(row["certificate"])
    return RosterEntry(
        name=row["site"],
        signing_key=row["signing_key"],
        node_key=row["node_key"],
        certificate=identity.certificate_fingerprint(certificate),
        status=row["status"],
    )
