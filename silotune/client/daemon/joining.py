"""Joining a federation: keys are made here and stay here; trust starts from the invitation.

The authority's certificate is fetched over a connection that proves nothing, and believed only if it
has the fingerprint of the invitation. From then on every connection is verified against it. What the
coordinator answers is checked against what this site made itself: name, both keys, the roster.
"""

from __future__ import annotations

import json
import ssl
import time
from collections.abc import Callable

from silotune.client.daemon.api import closing_api
from silotune.client.daemon.enrolled import Enrolment, Federation, SiteKeys, trusting
from silotune.client.errors import EnrolmentRefused, SiteNotEnrolled
from silotune.data.site import SiteConfig
from silotune.errors import EnvironmentFault
from silotune.protocol import http
from silotune.protocol.errors import CoordinatorUnavailable, PortUnreachable
from silotune.trust.audit import AUDIT_FILE, AuditLog
from silotune.trust.errors import IdentityInvalid, InviteInvalid
from silotune.trust.files import create_private_folder, replace_file
from silotune.trust.identity import (
    certificate_fingerprint,
    certificate_from_pem,
    encode_signing_key,
    make_request,
    public_pem,
    six_words,
)
from silotune.trust.invite import Invite
from silotune.trust.vault import Vault

_POLL_SECONDS = 1.0
_PENDING = "enrolment.json"


class Joining:
    """One site's way into a federation, in two steps: `ask`, then `wait`.

    Interrupted between the two, it is taken up again with the same invitation.

    Parameters
    ----------
    site : SiteConfig
        Who wants to join.
    code : str
        The invitation.

    Attributes
    ----------
    words : str
        The six words that the site's people read to the operator.

    Raises
    ------
    InviteInvalid
        The code is damaged.
    EnvironmentFault
        The site is in a federation already.
    """

    def __init__(self, site: SiteConfig, code: str) -> None:
        self._site, self._invite = site, Invite.decode(code)
        self._state = site.state_folder
        create_private_folder(self._state)
        self._vault = Vault(self._state, site.at_rest, base=site.folder)
        self._require_outside()
        self.keys = SiteKeys(self._state, self._vault)
        self.words = six_words(
            name=site.name,
            signing_key=encode_signing_key(self.keys.signing.public_key()),
            node_key=public_pem(self.keys.node.public_key()),
        )

    def ask(self) -> None:
        """Find the right authority, and ask to be let in.

        Raises
        ------
        InviteInvalid
            Another authority than the one that invited answers, or the code is used or expired.
        IdentityInvalid
            The coordinator answers with other words than this site's keys have.
        PortUnreachable, ServerUntrusted, …
            There is no way to the coordinator.
        """
        authority = self._find_authority()
        request = http.EnrolRequest.make(
            self.keys.signing,
            secret=self._invite.secret,
            federation=authority.federation,
            name=self._site.name,
            request=make_request(self._site.name, self.keys.node),
            signing_key=encode_signing_key(self.keys.signing.public_key()),
            sent_at=int(time.time()),
        )
        with closing_api(self._invite.url, trusting(authority.certificate)) as api:
            reply = api.enrol(request)
        if reply.words != self.words:
            raise IdentityInvalid("the coordinator has seen other keys than this site sent")
        pending = {
            "enrolment": reply.enrolment,
            "federation": authority.federation,
            "authority": authority.certificate,
        }
        replace_file(self._state / _PENDING, json.dumps(pending).encode())

    def wait(
        self, *, seconds: float, waiting: Callable[[], None] = lambda: None
    ) -> Enrolment | None:
        """Wait for the operator's answer.

        Parameters
        ----------
        seconds : float
            How long at most.
        waiting : callable
            Called before each look.

        Returns
        -------
        Enrolment or None
            The membership; None if the time was over first.

        Raises
        ------
        EnrolmentRefused
            The operator said no.
        IdentityInvalid, RosterInvalid
            What came does not fit what this site made.
        PortUnreachable, CoordinatorUnavailable
            There was no way to the coordinator when the time was over; before, it is tried again.
        """
        pending = json.loads((self._state / _PENDING).read_bytes())
        ends = time.monotonic() + seconds
        with closing_api(self._invite.url, trusting(pending["authority"])) as api:
            while True:
                waiting()
                over = time.monotonic() > ends
                try:
                    reply = api.enrolment(
                        http.EnrolmentQuery.make(
                            self.keys.signing,
                            enrolment=pending["enrolment"],
                            sent_at=int(time.time()),
                        )
                    )
                except (PortUnreachable, CoordinatorUnavailable):
                    # A coordinator keeps connections without a certificate for 20 s; people take longer.
                    if over:
                        raise
                else:
                    if reply.state != "waiting":
                        return self._answered(reply, pending["federation"], pending["authority"])
                    if over:
                        return None
                time.sleep(_POLL_SECONDS)

    def _answered(self, reply: http.EnrolmentReply, federation: str, authority: str) -> Enrolment:
        if reply.state == "refused":
            (self._state / _PENDING).unlink()
            raise EnrolmentRefused(reply.reason or "no reason was given")
        if reply.certificate is None or reply.federation_key is None:
            raise IdentityInvalid("the coordinator approved without a certificate")
        facts = Federation(
            federation=federation,
            site=self._site.name,
            url=self._invite.url,
            key=reply.federation_key,
        )
        enrolment = Enrolment.save(
            self._state,
            facts,
            self.keys,
            authority=authority,
            certificate=reply.certificate,
            rosters=reply.rosters,
        )
        (self._state / _PENDING).unlink(missing_ok=True)
        audit = AuditLog(self._state / AUDIT_FILE, owner=self._site.name)
        audit.append("joined", federation=federation, coordinator=facts.url, words=self.words)
        return enrolment

    def _find_authority(self) -> http.AuthorityReply:
        anybody = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        anybody.check_hostname = False
        anybody.verify_mode = ssl.CERT_NONE
        anybody.minimum_version = ssl.TLSVersion.TLSv1_3
        with closing_api(self._invite.url, anybody) as api:
            reply = api.authority()
        found = certificate_fingerprint(certificate_from_pem(reply.certificate))
        if not self._invite.expects(found):
            raise InviteInvalid(
                f"what answers at {self._invite.url} is not the authority that invited: {found[:16]}…",
                remedy="Somebody may be in between. Compare the fingerprint with the operator.",
            )
        return reply

    def _require_outside(self) -> None:
        try:
            facts = Enrolment.open(self._site, self._vault).facts
        except SiteNotEnrolled:
            return
        raise EnvironmentFault(
            f"{self._site.name} is in federation {facts.federation!r} already",
            remedy="Leave it first (`silotune site leave`), or use another state_dir.",
        )
