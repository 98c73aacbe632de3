"""Proposed plans and the site's word on them.

A proposal is kept with the federation's signature over its plan; an approval is the site's own
signature over the plan's hash and the run's name. A run whose plan changes is a new proposal, and its
old approval counts for nothing.
"""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import ValidationError

from silotune.client.errors import ApprovalMissing, PlanRejectedHere, RunNotProposed
from silotune.errors import PlanSignatureInvalid
from silotune.plan.plan import Plan, dotted
from silotune.protocol.http import Decision, Proposal
from silotune.trust.errors import SealBroken
from silotune.trust.files import create_private_folder, replace_file, require_private

PLANS = "plans"
"""Folder of the proposals, in the site's state."""

_MOST_KEPT = 500
_OVER = {"finished", "stopped", "failed"}
_Word = Literal["approved", "rejected"]


@dataclass(frozen=True)
class ProposalRecord:
    """A proposed run, and what the site has said of it.

    Attributes
    ----------
    proposal : Proposal
        As the coordinator sent it.
    plan : Plan
        Its plan, whose signature was verified when it came.
    decision : Decision or None
        The site's signed word.
    settled_at : float or None
        When its books were closed, in seconds since the epoch, if the run is over.
    """

    proposal: Proposal
    plan: Plan
    decision: Decision | None = None
    settled_at: float | None = None

    @property
    def settled(self) -> bool:
        """Whether the run is over and its books are closed."""
        return self.settled_at is not None

    @property
    def run(self) -> str:
        """The run's name."""
        return self.proposal.run

    @property
    def over(self) -> bool:
        """Whether the coordinator says that the run has ended."""
        return self.proposal.state in _OVER

    @property
    def state(self) -> str:
        """In a word, for tables."""
        if self.over:
            return self.proposal.state
        return self.decision.verdict if self.decision else "proposed"


class Approvals:
    """A site's proposals and decisions, on its disk. Safe for threads; one process writes.

    Parameters
    ----------
    state : Path
        The site's state folder.
    own : Ed25519PublicKey or None
        The site's key: decisions that it did not sign don't count. None reads without checking,
        for a reader that can't open the keys.
    """

    def __init__(self, state: Path, *, own: Ed25519PublicKey | None = None) -> None:
        self._folder, self._own = state / PLANS, own
        self._lock = threading.RLock()

    def entries(self) -> list[ProposalRecord]:
        """Everything that is kept, newest proposal first."""
        with self._lock:
            found = [self._read(path) for path in self._folder.glob("*.json")]
        return sorted(found, key=lambda e: (e.proposal.proposed_at, e.run), reverse=True)

    def find(self, run: str) -> ProposalRecord:
        """One run's entry. Raises `RunNotProposed`."""
        with self._lock:
            path = self._path(run)
            if not path.exists():
                raise RunNotProposed(f"no run {run!r} was proposed to this site")
            return self._read(path)

    def take(self, proposal: Proposal, trusted: Ed25519PublicKey) -> ProposalRecord | None:
        """Keep a proposal that is new or has changed; returns its entry then, else None.

        Raises
        ------
        PlanSignatureInvalid
            The federation's key did not sign the plan, or its hash is another.
        """
        plan = proposal.plan.verify(trusted)
        if plan.sha256 != proposal.plan_sha256:
            raise PlanSignatureInvalid(f"the plan of run {proposal.run!r} has another hash")
        with self._lock:
            path = self._path(proposal.run)
            old = self._read(path) if path.exists() else None
            known = proposal.model_copy(update={"decided": None})
            if old is not None and old.proposal == known:
                return None
            entry = ProposalRecord(known, plan)
            if old is not None and old.plan == plan:
                entry = replace(old, proposal=known)
            if not entry.over:  # a failed run may be resumed: its books are closed again at its end
                entry = replace(entry, settled_at=None)
            self._write(entry)
            self._drop_oldest()
            return entry

    def decide(
        self,
        run: str,
        verdict: _Word,
        *,
        reason: str,
        federation: str,
        site: str,
        key: Ed25519PrivateKey,
    ) -> Decision:
        """Sign the site's word on a run and keep it; a later word replaces an earlier one."""
        with self._lock:
            entry = self.find(run)
            decision = Decision.make(
                key,
                federation=federation,
                site=site,
                run=run,
                plan_sha256=entry.plan.sha256,
                verdict=verdict,
                reason=reason,
                decided_at=int(time.time()),
            )
            self._write(replace(entry, decision=decision))
            return decision

    def settle(self, run: str) -> None:
        """Note that a run's books are closed."""
        with self._lock:
            self._write(replace(self.find(run), settled_at=time.time()))

    def require_approved(self, run: str, plan_sha256: str) -> ProposalRecord:
        """The entry of a run that may be worked on.

        Raises
        ------
        RunUnknown
            It was never proposed.
        ApprovalMissing
            Nobody approved exactly this plan for it.
        PlanRejected
            Somebody rejected it.
        """
        entry = self.find(run)
        decision = entry.decision
        if entry.plan.sha256 != plan_sha256:
            raise ApprovalMissing(f"the plan sent for run {run!r} is not the one proposed for it")
        if decision is None or (decision.run, decision.plan_sha256) != (run, plan_sha256):
            raise ApprovalMissing(f"run {run!r}, plan {plan_sha256[:12]}")
        if self._own is None or not decision.verified(self._own):
            raise ApprovalMissing(f"run {run!r}: the stored approval is not signed by this site")
        if decision.verdict == "rejected":
            raise PlanRejectedHere(f"run {run!r}: {decision.reason or 'no reason was given'}")
        return entry

    def last_approved(self, *, but: str) -> ProposalRecord | None:
        """The newest approved run other than `but`: what a new plan is compared with."""
        approved = [
            entry
            for entry in self.entries()
            if entry.run != but and entry.decision and entry.decision.verdict == "approved"
        ]
        return max(approved, key=lambda e: e.decision.decided_at if e.decision else 0, default=None)

    # --- files ---

    def _path(self, run: str) -> Path:
        # The wire admits only names of lower-case letters, digits, "-" and "_".
        if not run or not run.replace("-", "").replace("_", "").isalnum():
            raise RunNotProposed(f"{run[:100]!r} is no name of a run")
        return self._folder / f"{run}.json"

    def _read(self, path: Path) -> ProposalRecord:
        require_private(path)
        try:
            found = json.loads(path.read_bytes())
            proposal = Proposal.model_validate_json(json.dumps(found["proposal"]))
            decided = found["decision"]
            decision = decided and Decision.model_validate_json(json.dumps(decided))
        except (ValueError, KeyError, ValidationError) as exc:
            raise SealBroken(f"{path} is not a stored proposal") from exc
        plan = Plan.from_canonical(proposal.plan.plan)
        # Where the time is not written, the file is from when the books were closed.
        settled_at = found.get("settled_at", path.stat().st_mtime) if found.get("settled") else None
        return ProposalRecord(proposal, plan, decision, settled_at)

    def _write(self, entry: ProposalRecord) -> None:
        create_private_folder(self._folder)
        decision = entry.decision
        content = {
            "proposal": entry.proposal.model_dump(mode="json"),
            "decision": decision.model_dump(mode="json") if decision else None,
            "settled": entry.settled,
            "settled_at": entry.settled_at,
        }
        replace_file(self._path(entry.run), json.dumps(content, indent=1).encode())

    def _drop_oldest(self) -> None:
        """Bound what a coordinator can make this site keep; open work is never dropped."""
        kept = self.entries()
        for entry in reversed(kept):
            if len(kept) <= _MOST_KEPT:
                return
            if entry.over or entry.decision is None:
                self._path(entry.run).unlink(missing_ok=True)
                kept.remove(entry)


def difference(old: Plan, new: Plan) -> list[tuple[str, Any, Any]]:
    """Settings that differ: ``(key, old value, new value)``, by dotted key."""
    before, after = dotted(old.model_dump(mode="json")), dotted(new.model_dump(mode="json"))
    return [
        (key, before.get(key), after.get(key))
        for key in sorted(before | after)
        if before.get(key) != after.get(key)
    ]
