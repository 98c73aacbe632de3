"""People of the coordinator's side: who may look, who may act, and what they did."""

from __future__ import annotations

import time
from typing import Any

from cryptography import x509
from sqlalchemy import RowMapping, delete, insert, select, update

from silotune.server.store.database import ACTIONS, ADMINS, RUNS, Store
from silotune.server.store.events import add_events, event_row
from silotune.trust import identity
from silotune.trust.authority import Authority
from silotune.trust.errors import IdentityInvalid, SignInNeeded
from silotune.trust.identity import Person, PersonRole, Subject

ADMIN_DAYS = 90
"""Validity of a person's certificate."""


class People:
    """Certificates of people, in the store: one counts for each name, the newest.

    Parameters
    ----------
    store : Store
        Where they are listed.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    def issue(
        self, authority: Authority, request: str, *, name: str, role: PersonRole
    ) -> x509.Certificate:
        """A certificate for a person's own key; it replaces the one that the person had.

        Raises
        ------
        IdentityInvalid
            The request is damaged, or in another name.
        """
        subject = Subject(name=name, role=role)
        certificate = authority.issue_client(request, subject=subject, days=ADMIN_DAYS)
        row = {
            "name": name,
            "role": role,
            "certificate": identity.certificate_fingerprint(certificate),
            "status": "active",
            "since": time.time(),
        }
        with self._store.transaction() as connection:
            connection.execute(delete(ADMINS).where(ADMINS.c.name == name))
            connection.execute(insert(ADMINS).values(row))
        return certificate

    def revoke(self, name: str) -> bool:
        """Let a certificate count no more, from the next request on; whether there was one."""
        active = (ADMINS.c.name == name) & (ADMINS.c.status == "active")
        with self._store.transaction() as connection:
            found = connection.execute(update(ADMINS).where(active).values(status="revoked"))
        return bool(found.rowcount)

    def all(self) -> list[RowMapping]:
        """Everybody who has or had a certificate, by name."""
        with self._store.transaction() as connection:
            return list(connection.execute(select(ADMINS).order_by(ADMINS.c.name)).mappings())

    def holder(self, certificate: x509.Certificate, authority: x509.Certificate) -> Person:
        """Whom a certificate speaks for.

        Raises
        ------
        SignInNeeded
            Not of this federation's authority, expired, revoked, replaced, or not a person's.
        """
        try:
            subject = identity.subject_of(certificate)
        except IdentityInvalid as exc:
            raise SignInNeeded("the certificate names no person") from exc
        if subject.role == "site" or not identity.issued_by(certificate, authority):
            raise SignInNeeded("the certificate is not a valid one of a person of this federation")
        fingerprint = identity.certificate_fingerprint(certificate)
        known = select(ADMINS.c.name).where(
            ADMINS.c.name == subject.name,
            ADMINS.c.role == subject.role,
            ADMINS.c.certificate == fingerprint,
            ADMINS.c.status == "active",
        )
        with self._store.transaction() as connection:
            if connection.execute(known).first() is None:
                raise SignInNeeded("the certificate was revoked or replaced")
        return Person(name=subject.name, role=subject.role)


class Actions:
    """What people did, and were not allowed to do."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def record(self, person: Person, action: str, target: str, *, outcome: str) -> None:
        """Add one, and tell it: in the run that it is about, else in the federation's own log."""
        row: dict[str, Any] = {
            "time": time.time(),
            "who": person.name[:63],
            "role": person.role,
            "action": action,
            "target": target[:96],
            "outcome": outcome,
        }
        told = {key: value for key, value in row.items() if key != "time"}
        with self._store.transaction() as connection:
            connection.execute(insert(ACTIONS).values(row))
            known = select(RUNS.c.run).where(RUNS.c.run == row["target"])
            run = connection.execute(known).scalar()
            add_events(connection, [event_row(run, "operator_action", told, row["time"])])

    def newest(self, limit: int = 200) -> list[RowMapping]:
        """The newest, newest first."""
        query = select(ACTIONS).order_by(ACTIONS.c.id.desc()).limit(limit)
        with self._store.transaction() as connection:
            return list(connection.execute(query).mappings())
