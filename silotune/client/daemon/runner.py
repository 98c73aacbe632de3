"""What a site does with a message: believe it, allow it, do it once, sign the answer.

Every message goes through the same steps, and stops at the first that fails with a stable code:

1. its envelope is the federation's, for this site, and its form is one that the protocol has;
2. its run was proposed and its very plan approved here (`silotune.client.approvals`);
3. the site's policy lets the plan pass, now (`silotune.client.site_run`, as in a simulation);
4. the site's own, installed ClientApp answers, through the gate, which recalls what was released
   before instead of working twice;
5. the answer is signed, for exactly this request.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import Context, Message, RecordDict

from silotune.client.approvals import Approvals, ProposalRecord
from silotune.client.daemon.enrolment import Enrolment
from silotune.client.errors import SitePaused
from silotune.errors import CertificateInvalid, PlanInvalid, SilotuneError
from silotune.plan.plan import Plan
from silotune.protocol.envelope import (
    COORDINATOR,
    MessagePlace,
    address_of,
    refusal,
    seal,
    seal_id,
    unseal,
)
from silotune.protocol.errors import MessageRefused
from silotune.protocol.requests import REQUESTS, Request, plan_of
from silotune.trust.audit import AuditLog
from silotune.trust.chain import Value
from silotune.trust.vault import Vault

if TYPE_CHECKING:
    from flwr.clientapp import ClientApp

    from silotune.client.site_run import SiteRun
    from silotune.client.training.base import RecordsRead, Trainers
    from silotune.data.site import SiteConfig

logger = logging.getLogger(__name__)

_MOST_PLAN = 1 << 20
_READING = frozenset({"train", "evaluate"})  # kinds of messages that records are read for


@dataclass(frozen=True)
class Opened:
    """A message that the federation signed for this site, without its envelope."""

    address: MessagePlace
    content: RecordDict
    seal: str


class Runner:
    """Answers the messages of one site, one at a time.

    Parameters
    ----------
    site : SiteConfig
        The site's own word.
    enrolment : Enrolment
        Keys and the federation's.
    approvals : Approvals
        What may be worked on.
    vault : Vault
        Seals what is stored.
    audit : AuditLog
        The site's.
    trainers : Trainers
        Gives each run what reads the records and trains.
    paused : callable
        Whether the site's people have paused it.
    agree : callable
        Called before records are touched; raises if the coordinator has signed other books than these.
    """

    def __init__(
        self,
        site: SiteConfig,
        *,
        enrolment: Enrolment,
        approvals: Approvals,
        vault: Vault,
        audit: AuditLog,
        trainers: Trainers,
        paused: Callable[[], bool] = lambda: False,
        agree: Callable[[ProposalRecord], None] = lambda entry: None,
    ) -> None:
        self._site, self._enrolment, self._approvals = site, enrolment, approvals
        self._vault, self._audit, self._paused = vault, audit, paused
        self._agree, self._trainers = agree, trainers
        self._app: ClientApp | None = None
        self._part: SiteRun | None = None
        self._contexts: dict[str, Context] = {}

    def answer(self, message: Message) -> tuple[RecordDict | None, str]:
        """The signed content of the reply, and the code of the refusal, if it is one.

        Returns
        -------
        RecordDict or None
            None if the message itself can't be trusted: then nothing is signed in answer to it.
        str
            ``"ST-…"``, or empty.
        """
        code, opened = "", None
        try:
            opened = self._open(message)
            plan = _require_form(opened)
            entry = self._approvals.require_approved(opened.address.run, plan.sha256)
            if self._paused():
                raise SitePaused
            if opened.address.kind.partition(".")[0] in _READING:
                self._agree(entry)
            content = self._work(message, opened, entry)
        except Exception as exc:
            code = self._refused(exc, message, opened)
            content = refusal(code)
        if opened is None:
            return None, code
        address = opened.address.reply(to=opened.seal)
        if not code:
            told: dict[str, Value] = {
                "run": address.run,
                "round": address.round,
                "type": address.kind,
            }
            self._audit.append("answered", **told, **self._ledger_place())
        return seal(content, address=address, key=self._enrolment.keys.signing), code

    def _ledger_place(self) -> dict[str, Value]:
        """How far the ledger goes, for the audit log to vouch for."""
        ledger = self._part.ledger if self._part is not None else None
        if ledger is None:
            return {}
        return {"ledger_seq": ledger.head.seq, "ledger_hash": ledger.head.hash}

    def finish(self, entry: ProposalRecord, certificate: Path) -> None:
        """Close the books of a run that is over: free what it reserved, certify what it cost."""
        part = self._site_run(entry)
        try:
            body = part.finish(certificate)
        except CertificateInvalid:
            body = None  # nothing was charged to it
        part.close()
        if self._part is part:
            self._part = None
        self._contexts.pop(entry.run, None)
        give_back_memory()
        epsilon = body.epsilon if body else 0.0
        self._audit.append("run_settled", run=entry.run, epsilon=round(epsilon, 6))

    # --- steps ---

    def _open(self, message: Message) -> Opened:
        claimed = address_of(message.content)
        kind = message.metadata.message_type
        if kind not in REQUESTS:
            raise MessageRefused("the message is of a type that this site does not know")
        expected = MessagePlace(
            federation=self._enrolment.facts.federation,
            run=claimed.run,
            round=claimed.round,
            kind=kind,
            sender=COORDINATOR,
            receiver=self._site.name,
        )
        content = unseal(message.content, address=expected, key=self._enrolment.federation_key)
        return Opened(expected, content, seal_id(message.content))

    def _work(self, message: Message, opened: Opened, entry: ProposalRecord) -> RecordDict:
        from silotune.client.app import build_client_app

        if self._app is None:
            self._app = build_client_app(lambda context, plan, run: self._find(plan, run))
        bare = Message(opened.content, reply_to=message)  # a copy with the message's own ids
        bare.metadata.__dict__.update(message.metadata.__dict__)
        context = self._contexts.setdefault(entry.run, self._context(message))
        return self._app(message=bare, context=context).content

    def _find(self, plan: Plan, run: str) -> SiteRun:
        return self._site_run(self._approvals.require_approved(run, plan.sha256))

    def _site_run(self, entry: ProposalRecord) -> SiteRun:
        """The site's part in a run; one at a time is kept with its records."""
        from silotune.client.site_run import SealingKeys, SiteRun

        held = self._part
        if held is not None and (held.run, held.plan) == (entry.run, entry.plan):
            return held
        if held is not None:
            held.close()
        self._part = SiteRun(
            self._site,
            state=self._site.state_folder,
            plan=entry.plan,
            run=entry.run,
            models=self._trainers,
            keys=SealingKeys(self._vault, self._enrolment.keys.signing),
            roster=self._enrolment.signers,
            on_records=partial(self._read_records, entry),
        )
        return self._part

    def _read_records(self, entry: ProposalRecord, found: RecordsRead) -> None:
        """Log what a run trains on: one line each time, whatever was found.

        The coordinator sees the log's length and its newest hash. The fingerprint, which only this
        site can compute, is in the line also for that: without it the counts could be guessed from
        the hash.
        """
        for part in found.left_out:
            logger.warning(
                "run %s, dataset %s: left out: %s", entry.run, entry.plan.data.dataset, part
            )
        self._audit.append(
            "records_read",
            run=entry.run,
            dataset=entry.plan.data.dataset,
            content=found.fingerprint,
            records=found.records,
            left_out=found.rows_left_out,
        )

    def _context(self, message: Message) -> Context:
        return Context(
            run_id=message.metadata.run_id,
            node_id=message.metadata.dst_node_id,
            node_config={},
            state=RecordDict(),
            run_config={},
        )

    def _refused(self, exc: Exception, message: Message, opened: Opened | None) -> str:
        """Log and audit an error; only its code goes on."""
        from silotune.client.gate import refusal as code_of

        code = code_of(exc)
        detail = exc.detail if isinstance(exc, SilotuneError) else type(exc).__name__
        place = opened.address if opened else None
        try:
            self._audit.append(
                "refused",
                run=place.run if place else "",
                round=place.round if place else 0,
                type=str(message.metadata.message_type)[:64],
                code=code,
                detail=detail[:500],
            )
        except SilotuneError:
            logger.exception("the refusal could not be written to the audit log")
        return code


def give_back_memory() -> None:
    """Give what a run has left in the allocator back to the system, where that can be asked for."""
    with suppress(OSError, AttributeError):  # not with every C library
        ctypes.CDLL(None).malloc_trim(0)


def _require_form(opened: Opened) -> Plan:
    """The plan of a message whose records are those of the protocol.

    Raises
    ------
    MessageRefused
        A record or field is missing, of another type, or contradicts the envelope.
    """
    try:
        asked = Request.read(opened.content)
        if len(asked.plan) > _MOST_PLAN:
            raise MessageRefused("the message's plan is too long")
        if (asked.run, asked.round) != (opened.address.run, opened.address.round):
            raise MessageRefused("the message contradicts its own envelope")
        return plan_of(asked.plan)
    except PlanInvalid as exc:
        raise MessageRefused(f"the message's form is wrong: {exc.detail}") from exc
