"""What a site has once it has joined a federation: names, keys, certificates, the newest roster.

Public things are plain files; the two private keys are sealed. Everything is written whole or not at
all, and read back with suspicion: a certificate must fit its key, and a roster its predecessor.

How it joins: keys are made here and stay here, and trust starts from the invitation. The authority's
certificate is fetched over a connection that proves nothing, and believed only if it has the fingerprint
of the invitation. From then on every connection is verified against it. What the coordinator answers is
checked against what this site made itself: name, both keys, the roster.
"""

from __future__ import annotations

import base64
import json
import ssl
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
)
from pydantic import ValidationError

from silotune.client.daemon.api import closing_api
from silotune.client.errors import EnrolmentRefused, SiteNotEnrolled
from silotune.data.site import SiteConfig
from silotune.errors import EnvironmentFault
from silotune.plan.sections import Name, Section
from silotune.protocol import http
from silotune.protocol.errors import CoordinatorUnavailable, PortUnreachable
from silotune.trust.audit import AUDIT_FILE, AuditLog
from silotune.trust.errors import IdentityInvalid, InviteInvalid, RosterInvalid
from silotune.trust.files import create_private_folder, replace_file
from silotune.trust.identity import (
    certificate_fingerprint,
    certificate_from_pem,
    decode_signing_key,
    encode_signing_key,
    issued_by,
    key_of,
    make_request,
    new_node_key,
    node_key_from_pem,
    private_pem,
    public_pem,
    six_words,
    subject_of,
)
from silotune.trust.invite import Invite
from silotune.trust.roster import Roster, SignedRoster, follow
from silotune.trust.signed import KeyText
from silotune.trust.vault import Vault

_FEDERATION, _AUTHORITY, _CERTIFICATE = "federation.json", "authority.pem", "certificate.pem"
_ROSTER, _NODE_KEY, _SIGNING_KEY = "roster.json", "node.key.sealed", "signing.key.sealed"
_POLL_SECONDS = 1.0
_PENDING = "enrolment.json"


class Federation(Section):
    """Which federation a site is in: public facts that never change while it is."""

    federation: Name
    site: Name
    url: str
    key: KeyText


class SiteKeys:
    """A site's two private keys, sealed in its state folder.

    Parameters
    ----------
    state : Path
        The site's state folder.
    vault : Vault
        Seals and opens them.

    Attributes
    ----------
    node : EllipticCurvePrivateKey
        Authenticates connections.
    signing : Ed25519PrivateKey
        Signs what the site says.

    Raises
    ------
    VaultLocked, SealBroken, FileExposed
        The keys can't be opened.
    """

    def __init__(self, state: Path, vault: Vault) -> None:
        self._state, self._vault = state, vault
        self.node: EllipticCurvePrivateKey = self._node_key()
        self.signing: Ed25519PrivateKey = self._signing_key()

    def _node_key(self) -> EllipticCurvePrivateKey:
        path = self._state / _NODE_KEY
        if not path.exists():
            self._vault.write(path, private_pem(new_node_key()))
        return node_key_from_pem(self._vault.read(path))

    def _signing_key(self) -> Ed25519PrivateKey:
        path = self._state / _SIGNING_KEY
        if not path.exists():
            self._vault.write(path, Ed25519PrivateKey.generate().private_bytes_raw())
        return Ed25519PrivateKey.from_private_bytes(self._vault.read(path))

    def forget(self) -> None:
        """Remove both keys, for a site that has left."""
        for name in (_NODE_KEY, _SIGNING_KEY):
            (self._state / name).unlink(missing_ok=True)


class Enrolment:
    """The membership of one site, in its state folder. Safe for many threads.

    Build it with `open`, or with `save` for a site that has just been let in.

    Attributes
    ----------
    facts : Federation
        Names, address and the federation's key.
    keys : SiteKeys
        The site's own.
    """

    def __init__(self, state: Path, facts: Federation, keys: SiteKeys) -> None:
        self.state, self.facts, self.keys = state, facts, keys
        self._lock = threading.Lock()
        self._roster = self._read_roster()

    @classmethod
    def open(cls, site: SiteConfig, vault: Vault) -> Enrolment:
        """Read what `save` wrote.

        Raises
        ------
        SiteNotEnrolled
            The site has not joined, or under another name.
        IdentityInvalid, RosterInvalid
            A file does not fit the others.
        """
        state = site.state_folder
        try:
            facts = Federation.model_validate_json((state / _FEDERATION).read_bytes())
        except OSError as exc:
            raise SiteNotEnrolled(f"{state} holds no enrolment") from exc
        except ValidationError as exc:
            raise IdentityInvalid(f"{state / _FEDERATION} is not readable") from exc
        if facts.site != site.name:
            raise SiteNotEnrolled(f"it joined as {facts.site!r}, and site.toml says {site.name!r}")
        enrolment = cls(state, facts, SiteKeys(state, vault))
        enrolment.check_certificate((state / _CERTIFICATE).read_text())
        return enrolment

    @classmethod
    def save(
        cls,
        state: Path,
        facts: Federation,
        keys: SiteKeys,
        *,
        authority: str,
        certificate: str,
        rosters: Sequence[SignedRoster],
    ) -> Enrolment:
        """Write a new membership; the facts come last, so that a crash leaves none or all.

        Raises
        ------
        IdentityInvalid
            The certificate is not the authority's, for this name or this key.
        RosterInvalid
            The roster is not the federation's, or does not list this site with its keys.
        """
        create_private_folder(state)
        (state / _ROSTER).unlink(missing_ok=True)
        replace_file(state / _AUTHORITY, authority.encode())
        enrolment = cls(state, facts, keys)
        enrolment.renew(certificate)
        enrolment.take_rosters(rosters)
        enrolment.require_listed()
        replace_file(state / _FEDERATION, facts.model_dump_json().encode())
        return enrolment

    @property
    def federation_key(self) -> Ed25519PublicKey:
        """The coordinator's signing key: it signs plans, rosters and messages."""
        return decode_signing_key(self.facts.key)

    @property
    def authority(self) -> str:
        """The authority's certificate, PEM."""
        return (self.state / _AUTHORITY).read_text()

    @property
    def certificate(self) -> str:
        """The site's own certificate, PEM."""
        return (self.state / _CERTIFICATE).read_text()

    @property
    def signers(self) -> dict[str, bytes]:
        """Raw Ed25519 public keys of the active members, by name, from the newest roster."""
        roster = self.roster
        members = roster.active if roster is not None else {}
        return {name: base64.b64decode(member.signing_key) for name, member in members.items()}

    @property
    def roster(self) -> Roster | None:
        """The newest roster that was accepted."""
        with self._lock:
            return self._roster

    def check_certificate(self, pem: str) -> None:
        """Refuse a certificate that is not this site's. Dates are for `doctor` and TLS to judge.

        Raises
        ------
        IdentityInvalid
            Of another key, name or role.
        """
        certificate = certificate_from_pem(pem)
        subject = subject_of(certificate)
        if (subject.name, subject.role) != (self.facts.site, "site"):
            raise IdentityInvalid("the certificate is for another name or role")
        if key_of(certificate) != public_pem(self.keys.node.public_key()):
            raise IdentityInvalid("the certificate is for another key")

    def renew(self, pem: str) -> None:
        """Take the next certificate. Raises `IdentityInvalid` for one that isn't fit."""
        self.check_certificate(pem)
        if not issued_by(certificate_from_pem(pem), certificate_from_pem(self.authority)):
            raise IdentityInvalid("the certificate is not valid now, or of another authority")
        replace_file(self.state / _CERTIFICATE, pem.encode())

    def take_rosters(self, versions: Sequence[SignedRoster]) -> tuple[str, ...]:
        """Follow the roster to a newer version.

        Returns
        -------
        tuple of str
            Names whose entry changed: came, left, or has other keys.

        Raises
        ------
        RosterInvalid
            A version is not signed, is missing, or changes history.
        """
        with self._lock:
            seen = self._roster
            newest = follow(seen, versions, trusted=self.federation_key)
            if newest is None or newest == seen:
                return ()
            if newest.federation != self.facts.federation:
                raise RosterInvalid("the roster is of another federation")
            replace_file(self.state / _ROSTER, versions[-1].model_dump_json().encode())
            self._roster = newest
        before = {member.name: member for member in seen.members} if seen else {}
        after = {member.name: member for member in newest.members}
        return tuple(n for n in sorted(before | after) if before.get(n) != after.get(n))

    def require_listed(self) -> None:
        """Refuse a roster that has not this site with these keys. Raises `RosterInvalid`."""
        member = self.roster.active.get(self.facts.site) if self.roster else None
        own = encode_signing_key(self.keys.signing.public_key())
        node = public_pem(self.keys.node.public_key())
        if member is None or (member.signing_key, member.node_key) != (own, node):
            raise RosterInvalid("the roster does not list this site with its own keys")

    def tls(self) -> ssl.SSLContext:
        """TLS 1.3 towards the coordinator alone, with the site's certificate.

        Raises
        ------
        IdentityInvalid
            Certificate and key don't make a pair that TLS takes.
        """
        context = trusting(self.authority)
        secret = Ed25519PrivateKey.generate().private_bytes_raw().hex()  # 256 random bits
        sealed = self.keys.node.private_bytes(
            Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(secret.encode())
        )
        # OpenSSL reads keys from files only: this one is encrypted under a password that is in
        # memory alone, and gone in a moment.
        with tempfile.NamedTemporaryFile(dir=self.state, prefix=".tls-") as file:
            file.write(sealed)
            file.flush()
            try:
                context.load_cert_chain(self.state / _CERTIFICATE, file.name, password=secret)
            except (ssl.SSLError, OSError) as exc:
                raise IdentityInvalid("certificate and key don't fit each other") from exc
        return context

    def renewal(self) -> http.RenewRequest:
        """Asks for the next certificate."""
        return http.RenewRequest.make(
            self.keys.signing,
            name=self.facts.site,
            request=make_request(self.facts.site, self.keys.node),
            sent_at=int(time.time()),
        )

    def goodbye(self) -> http.Leave:
        """Says that the site leaves."""
        return http.Leave.make(
            self.keys.signing,
            federation=self.facts.federation,
            name=self.facts.site,
            sent_at=int(time.time()),
        )

    def forget(self) -> None:
        """Remove certificate, keys and membership; ledger and audit log stay for ever."""
        for name in (_FEDERATION, _CERTIFICATE, _ROSTER):
            (self.state / name).unlink(missing_ok=True)
        self.keys.forget()

    def _read_roster(self) -> Roster | None:
        path = self.state / _ROSTER
        if not path.exists():
            return None
        try:
            return SignedRoster.model_validate_json(path.read_bytes()).verify(self.federation_key)
        except (ValidationError, json.JSONDecodeError) as exc:
            raise RosterInvalid(f"{path} is not a signed roster") from exc


def trusting(authority: str) -> ssl.SSLContext:
    """TLS 1.3 that trusts one authority and nothing else of this machine's certificate store."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(cadata=authority)
    return context


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
