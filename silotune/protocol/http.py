"""Bodies of our own HTTP routes between a site and the coordinator: small, strict, bounded JSON.

Three routes need no certificate, because a site has none yet: the authority's certificate, the
request to be enrolled, and the question how it stands. Everything else is refused without a
certificate of an active site. What a site decides is signed with its own key, whatever the
connection says.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import Field, ValidationError

from silotune.plan.document import Document, Sha256, canonical_json
from silotune.plan.sections import Name
from silotune.trust.audit import AuditHead
from silotune.trust.chain import Head
from silotune.trust.errors import BodyInvalid
from silotune.trust.roster import Pem, SignedRoster
from silotune.trust.signed import (
    KeyText,
    SignatureText,
    SignedPlan,
    Signing,
    encoded,
    fits,
)

PREFIX = "/silotune/v1"

AUTHORITY = f"{PREFIX}/authority"
"""GET, no certificate: `AuthorityReply`."""

ENROL = f"{PREFIX}/enrol"
"""POST `EnrolRequest`, no certificate: `EnrolReply`."""

ENROLMENT = f"{PREFIX}/enrolment"
"""POST `EnrolmentQuery`, no certificate: `EnrolmentReply`."""

RENEW = f"{PREFIX}/renew"
"""POST `RenewRequest`: `RenewReply`."""

ROSTER = f"{PREFIX}/roster"
"""GET ``?after=VERSION``: `RosterReply`, versions behind that one, oldest first."""

NEWS = f"{PREFIX}/news"
"""GET ``?roster=VERSION&plans=VERSION``: `NewsReply`, held until one of them changes (25 s)."""

PLANS = f"{PREFIX}/plans"
"""GET: `PlansReply`."""

DECISION = f"{PREFIX}/decision"
"""POST `Decision`: `Done`."""

AUDIT = f"{PREFIX}/audit"
"""POST `HeadExchange`: `HeadExchange`."""

HEADS = f"{PREFIX}/heads"
"""GET: `SignedHeads`, the newest heads of the asking site that the coordinator signed."""

RESTORED = f"{PREFIX}/restored"
"""POST `Restored`: `Done`."""

CERTIFICATE = f"{PREFIX}/certificate"
"""POST `HandedIn`: `Done`."""

LEAVE = f"{PREFIX}/leave"
"""POST `Leave`: `Done`."""

ACTIVATE = f"{PREFIX}/link/activate"
"""POST `Activation`: `Activated`. A session begins."""

HEARTBEAT = f"{PREFIX}/link/heartbeat"
"""POST `Activation`: `Done`. A sign of life."""

GOODBYE = f"{PREFIX}/link/goodbye"
"""POST: `Done`. The session ends."""

PULL = f"{PREFIX}/link/pull"
"""POST: the first frame (`silotune.flower.message_frames`) of what comes next, or nothing."""

PIECE = f"{PREFIX}/link/piece"
"""POST `PieceQuery`: a further piece of an instruction, as it is."""

PUSH = f"{PREFIX}/link/push"
"""POST a frame of a reply: `Pushed`."""

SESSION_HEADER = "silotune-session"
"""Header of every request on the link: 32 hex digits, new at each start of a site's daemon.

The session that activated the node last is the only one that is served, so that two processes with
one key are found out, and neither steals the other's messages.
"""

OPEN_PATHS = frozenset({AUTHORITY, ENROL, ENROLMENT})
"""What may be asked without a certificate."""

SITE_PATHS = frozenset(
    {RENEW, ROSTER, NEWS, PLANS, DECISION, AUDIT, HEADS, RESTORED, CERTIFICATE, LEAVE}
)
"""What an active site may ask, with its certificate."""

LINK_PATHS = frozenset({ACTIVATE, HEARTBEAT, GOODBYE, PULL, PIECE, PUSH})
"""What an active site may ask, in the session that it activated last: messages."""

EARLIER_PATHS = "/v1/fleet/"
"""How paths begin that sites ask whose silotune is older than these routes."""

MOST_SKEW_SECONDS = 60.0
"""How far the clocks of a site and the coordinator may be apart: what they sign is dated."""

MOST_BYTES = 64 * 1024
"""Size limit of a request's body."""

MOST_BOOKS_BYTES = 1 << 20
"""Size limit of the two requests that say what was spent."""

MOST_REPLY_BYTES = 8 << 20
"""Size limit of a reply's body."""

Nonce = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Seconds = Annotated[int, Field(ge=0, lt=2**40)]
RunName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,95}$")]


class Body(Document):
    """Base of every body."""


class Activation(Body):
    """A site is there, and says so again within `seconds`; with the time by its own clock."""

    seconds: Annotated[float, Field(gt=0.0, le=3600.0)]
    sent_at: float


class Activated(Body):
    """The number by which the coordinator addresses messages to the site."""

    node: Annotated[int, Field(ge=0, lt=2**64)]


class PieceQuery(Body):
    """Which piece of which instruction."""

    message: Sha256
    number: Annotated[int, Field(ge=0, lt=256)]


class Pushed(Body):
    """What became of a frame of a reply; one that nobody waits for any more is dropped."""

    taken: bool


_B = TypeVar("_B", bound=Body)


def parse(model: type[_B], content: bytes, *, limit: int = MOST_BYTES) -> _B:
    """Read a body. Raises `BodyInvalid`, naming fields but never quoting values."""
    if len(content) > limit:
        raise BodyInvalid(f"{model.__name__} has {len(content)} bytes, more than {limit}")
    try:
        return model.model_validate_json(content)
    except ValidationError as exc:
        wrong = sorted({".".join(map(str, e["loc"])) or "the whole" for e in exc.errors()})
        raise BodyInvalid(f"{model.__name__}: {', '.join(wrong)[:500]}") from exc


class Signed(Body):
    """A body that carries its author's Ed25519 signature over all its other fields."""

    signature: SignatureText

    @classmethod
    def make(cls, key: Ed25519PrivateKey, **fields: object) -> Self:
        """Build and sign."""
        unsigned = cls.model_validate({**fields, "signature": "A" * 86 + "=="})
        signature = encoded(key.sign(unsigned._covered()))
        return unsigned.model_copy(update={"signature": signature})

    def verified(self, key: Ed25519PublicKey) -> bool:
        """Whether `key` signed it."""
        return fits(self.signature, self._covered(), key)

    def _covered(self) -> bytes:
        name, fields = type(self).__name__, self.written()
        del fields["signature"]
        return Signing(f"silotune {name} v1", name, BodyInvalid).covered(canonical_json(fields))


class Done(Body):
    """It was done."""

    status: Literal["done"]


class Failure(Body):
    """Body of every refusal (status 4xx or 5xx): a stable code and one sentence."""

    code: Annotated[str, Field(pattern=r"^ST-\d{3}$")]
    detail: Annotated[str, Field(max_length=2000)]


# --- enrolment ---


class AuthorityReply(Body):
    """The federation's name and its authority's certificate.

    A site fetches it before it can verify the connection, and believes it only if the certificate's
    fingerprint is the one in its invitation; then it connects again, verifying.
    """

    federation: Name
    certificate: Pem


class EnrolRequest(Signed):
    """A site asks to be let in: signed with the signing key it offers."""

    secret: Nonce
    federation: Name
    name: Name
    request: Pem
    signing_key: KeyText
    sent_at: Seconds


class EnrolReply(Body):
    """The request waits for the operator, who will compare the six words."""

    enrolment: Nonce
    words: Annotated[str, Field(max_length=64)]


class EnrolmentQuery(Signed):
    """How does it stand? Signed with the signing key of the request."""

    enrolment: Nonce
    sent_at: Seconds


class EnrolmentReply(Body):
    """The operator's answer; everything after `state` is there once it is ``approved``."""

    state: Literal["waiting", "approved", "refused"]
    reason: Annotated[str, Field(max_length=500)] = ""
    certificate: Pem | None = None
    federation_key: KeyText | None = None
    rosters: tuple[SignedRoster, ...] = ()


class RenewRequest(Signed):
    """A request for the next certificate, perhaps over a new node key."""

    name: Name
    request: Pem
    sent_at: Seconds


class RenewReply(Body):
    """The next certificate."""

    certificate: Pem


class Leave(Signed):
    """A site leaves the federation for good: its certificate is revoked."""

    federation: Name
    name: Name
    sent_at: Seconds


# --- news, roster, plans ---


class NewsReply(Body):
    """Counters that grow with every change; a change means: fetch again."""

    roster: Annotated[int, Field(ge=0)]
    plans: Annotated[int, Field(ge=0)]


class RosterReply(Body):
    """Versions, oldest first."""

    rosters: tuple[SignedRoster, ...]


RunState = Literal["proposed", "running", "paused", "finished", "stopped", "failed"]


class Proposal(Body):
    """A run that the coordinator proposes to a site, with its signed plan."""

    run: RunName
    plan: SignedPlan
    plan_sha256: Sha256
    state: RunState
    proposed_at: Seconds
    decided: Literal["approved", "rejected"] | None = None


class PlansReply(Body):
    """Runs that are proposed, under way or finished lately, newest first."""

    plans: Annotated[int, Field(ge=0)]
    proposals: Annotated[tuple[Proposal, ...], Field(max_length=200)]


class Decision(Signed):
    """A site's word on a proposed run: a signature over the plan's hash and the run."""

    federation: Name
    site: Name
    run: RunName
    plan_sha256: Sha256
    verdict: Literal["approved", "rejected"]
    reason: Annotated[str, Field(max_length=500)] = ""
    decided_at: Seconds


# --- audit heads ---


class HandedIn(Body):
    """A site's privacy certificate of a run that is over, where the site hands them in."""

    run: RunName
    certificate: Annotated[str, Field(max_length=MOST_BYTES // 2)]


class LogHead(Body):
    """How far the sender's audit log goes (`silotune.trust.audit.AuditHead`)."""

    owner: Annotated[str, Field(min_length=1, max_length=63)]
    seq: Annotated[int, Field(ge=0)]
    hash: Sha256

    @classmethod
    def of(cls, head: AuditHead, **more: Any) -> Self:
        """A head, to be sent."""
        return cls(**vars(head), **more)

    @property
    def head(self) -> AuditHead:
        """What was sent, as the log itself knows it."""
        return AuditHead(self.owner, self.seq, self.hash)


class CounterSignature(LogHead):
    """The other side's head, and the sender's signature over it (`AuditHead.sign`), base64."""

    signature: SignatureText


class LedgerHead(Body):
    """How far the site's privacy ledger goes (`silotune.trust.chain.Head`)."""

    seq: Annotated[int, Field(ge=0)]
    hash: Sha256

    @classmethod
    def of(cls, head: Head, **more: Any) -> Self:
        """A head, to be sent."""
        return cls(**vars(head), **more)

    @property
    def head(self) -> Head:
        """What was sent, as the ledger itself knows it."""
        return Head(self.seq, self.hash)


class LedgerSignature(LedgerHead):
    """A site's ledger head, and the coordinator's signature over it (`Head.sign`), base64."""

    signature: SignatureText


class Spent(Body):
    """How often a mechanism ran on a dataset of the site.

    ``charged`` is what was released; ``held`` adds what running trainings may still release.
    """

    dataset: Annotated[str, Field(min_length=1, max_length=128)]
    mechanism: Annotated[str, Field(min_length=2, max_length=4000)]
    charged: Annotated[int, Field(ge=0, lt=2**40)]
    held: Annotated[int, Field(ge=0, lt=2**40)]


Account = Annotated[tuple[Spent, ...], Field(max_length=5000)]


class Known(Body):
    """The newest heads of a site's two books that somebody knows of; None where there is none."""

    log: LogHead | None = None
    ledger: LedgerHead | None = None


class HeadExchange(Body):
    """The sender's newest head, and its counter-signature of the head it was sent last, if any.

    A site posts one before it trains and after each round; the coordinator answers with one that
    counter-signs the head just posted, and whose own head the site counter-signs in its next post. The
    site adds the head of its ledger as `ledger` with what it says was spent, and the answer signs it in
    `ledger_signed`. `after` is what the site's books hold at the places that the coordinator signed
    last: if it is not what the coordinator signed, these are other books, and nothing is signed.
    """

    mine: LogHead
    yours: CounterSignature | None = None
    ledger: LedgerHead | None = None
    spent: Account = ()
    after: Known = Known()
    ledger_signed: LedgerSignature | None = None


class SignedHeads(Signed):
    """The newest heads of a site that the coordinator signed, and what was spent by then."""

    federation: Name
    site: Name
    known: Known
    spent: Account


class Restored(Signed):
    """A site puts older books in the place of those that are lost, with all that was spent charged."""

    federation: Name
    site: Name
    replaces: Known
    log: LogHead
    ledger: LedgerHead
    spent: Account
    reason: Annotated[str, Field(min_length=1, max_length=500)]
    sent_at: Seconds
