"""Privacy certificates that sites hand in when a run is over, for people to download."""

from __future__ import annotations

import time

from sqlalchemy import delete, insert

from silotune.errors import CertificateInvalid
from silotune.federation import identity, wire
from silotune.federation.audit_log import AuditLog
from silotune.privacy.signing import fingerprint
from silotune.server.enrolment import Registrar
from silotune.server.run_store import Runs
from silotune.server.store import Store
from silotune.server.tables import CERTIFICATES


class Certificates:
    """Takes certificates in; `silotune.server.run_source.StoredRuns` offers them.

    Parameters
    ----------
    store, registrar, audit
        The coordinator's.
    """

    def __init__(self, store: Store, registrar: Registrar, audit: AuditLog) -> None:
        self._store, self._registrar, self._audit = store, registrar, audit

    def take(self, site: str, handed: wire.HandedIn) -> None:
        """Keep a site's certificate of a run; a later one replaces it.

        Raises
        ------
        CertificateInvalid
            It is not signed by that site's key, does not hold, or is of another site, run or plan.
        RunUnknown
            There is no such run.
        """
        from silotune.privacy.certificate import verify_content  # SciPy: 70 MB that few runs need

        row = Runs(self._store).get(handed.run)
        key = identity.decode_signing_key(self._registrar.enrolled[site].member.signing_key)
        found = verify_content(
            handed.certificate.encode(), called="the certificate", key_sha256=fingerprint(key)
        ).body
        if (found.site, found.run, found.plan_sha256) != (site, handed.run, row["plan_sha256"]):
            raise CertificateInvalid("the certificate is of another site, run or plan")
        kept = {"run": handed.run, "site": site, "time": time.time()}
        same = (CERTIFICATES.c.run == handed.run) & (CERTIFICATES.c.site == site)
        with self._store.transaction() as connection:
            connection.execute(delete(CERTIFICATES).where(same))
            connection.execute(insert(CERTIFICATES).values({**kept, "content": handed.certificate}))
        self._audit.append("certificate_taken", run=handed.run, site=site, epsilon=found.epsilon)
