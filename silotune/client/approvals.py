"""Proposed plans and the site's word on them.

A proposal is kept with the federation's signature over its plan; an approval is the site's own
signature over the plan's hash and the run's name. A run whose plan changes is a new proposal, and its
old approval counts for nothing.

A proposed plan as its readers need it: what leaves, what it costs, the verdict, what changed.
"""

from __future__ import annotations

import json
import os
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import ValidationError

from silotune.client.errors import ApprovalMissing, PlanRejectedHere, RunNotProposed
from silotune.client.policy import PlanVerdict, facts_for, judge
from silotune.client.site_run import local_time
from silotune.client.terms import delta_notes
from silotune.data.checks import survey
from silotune.data.records import require_declared
from silotune.data.site import SiteConfig
from silotune.errors import PlanSignatureInvalid, SilotuneError
from silotune.models.base import outline, require_taken
from silotune.models.layout import Layout
from silotune.models.tasks import get_task
from silotune.plan.plan import Plan, dotted, plan_in_words
from silotune.privacy.ledger import find_ledger
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


@dataclass(frozen=True, kw_only=True)
class PlanSpending:
    """Epsilon of the plan's dataset, at the plan's delta.

    Attributes
    ----------
    now : float
        Spent and reserved by other runs.
    after : float
        With the whole of this run.
    budget : float or None
        What the dataset may reach, by its budget and by the policy; None if site.toml gives none.
    """

    now: float
    after: float
    budget: float | None

    @property
    def left(self) -> float | None:
        """What would be left for later runs."""
        return None if self.budget is None else max(0.0, self.budget - self.after)


def judge_proposal(site: SiteConfig, entry: ProposalRecord) -> PlanVerdict:
    """The policy's verdict on a proposal that can be served here.

    Raises
    ------
    SilotuneError
        The plan can't be judged or served here: unknown dataset, a model that does not take it.
    """
    verdict = _verdict(site, entry)
    if verdict.allowed:
        require_servable(site, entry.plan)
    return verdict


def require_servable(site: SiteConfig, plan: Plan) -> None:
    """Check that the base model, if the policy knows it, can be trained as the plan says.

    Raises
    ------
    ModelError
        Of some kind, with the number, the nearest name or the layer.
    """
    if site.policy is not None and plan.model.sha256 in site.policy.base_models:
        require_taken(plan, base=site.model_place(plan))


def _verdict(site: SiteConfig, entry: ProposalRecord) -> PlanVerdict:
    """What the policy says; hours don't count before the training itself."""
    assert site.policy is not None  # the daemon has seen to it
    require_declared(site, entry.plan, roles=get_task(entry.plan.model.task).roles)
    ledger = find_ledger(site.state_folder)
    facts = facts_for(
        site,
        entry.plan,
        run=entry.run,
        ledger=ledger,
        layout=layout_at(site, entry.plan.model.sha256, entry),
        moment=local_time(),
    )
    verdict = judge(site.policy, entry.plan, facts)
    return PlanVerdict(tuple(clause for clause in verdict.clauses if clause.name != "hours"))


def layout_at(site: SiteConfig, sha256: str | None, entry: ProposalRecord) -> Layout | None:
    """The adapter's layout, if the policy knows the base model; else nothing is looked at."""
    if site.policy is None or sha256 not in site.policy.base_models:
        return None
    return outline(entry.plan, base=site.model_place(entry.plan))


def spending(site: SiteConfig, entry: ProposalRecord) -> PlanSpending | None:
    """What the run would do to the dataset's budget; None for a plan without privacy."""
    plan = entry.plan
    if not plan.private or plan.privacy.delta is None:
        return None
    from silotune.client.policy import total_epsilon
    from silotune.privacy.tally import epsilon_of, total

    ledger = find_ledger(site.state_folder)
    name = plan.data.dataset
    others = [] if ledger is None else [a for a in ledger.runs(name) if a.run != entry.run]
    budget, policy = site.dataset(name).budget, site.policy
    limits = [budget.epsilon] if budget else []
    limits += [policy.max_total_epsilon] if policy and policy.max_total_epsilon else []
    return PlanSpending(
        now=epsilon_of(total(a.committed for a in others), delta=plan.privacy.delta),
        after=total_epsilon(site, plan, run=entry.run, ledger=ledger),
        budget=min(limits, default=None),
    )


def describe(site: SiteConfig, entry: ProposalRecord, approvals: Approvals) -> dict[str, Any]:
    """Everything about a proposal, as JSON values.

    What can't be worked out here is None or empty, with the reason under ``problem``.
    """
    plan, proposal = entry.plan, entry.proposal
    found: dict[str, Any] = {
        "run": entry.run,
        "state": entry.state,
        "name": plan.plan.name,
        "plan_sha256": plan.sha256,
        "proposed_at": proposal.proposed_at,
        "signed_by": proposal.plan.key,
        "reason": entry.decision.reason if entry.decision else "",
        "words": plan_in_words(plan),
        "leaves": None,
        "spending": None,
        "verdict": [],
        "allowed": False,
        "problem": "",
    }
    try:
        verdict = _verdict(site, entry) if site.policy else PlanVerdict(())
        found["verdict"] = [
            {"clause": c.name, "allowed": c.allowed, "reason": c.reason, "code": c.error.code}
            for c in verdict.clauses
        ]
        require_servable(site, plan)
        found["allowed"] = bool(verdict.clauses) and verdict.allowed
        found["leaves"] = _leaves(layout_at(site, plan.model.sha256, entry))
        spent = spending(site, entry)
        found["spending"] = spent and {**vars(spent), "left": spent.left}
    except SilotuneError as exc:
        found["problem"] = str(exc)
    before = approvals.last_approved(but=entry.run)
    found["compared_with"] = before.run if before else None
    found["changes"] = [
        {"key": key, "old": old, "new": new}
        for key, old, new in (difference(before.plan, plan) if before else [])
    ]
    return found


def records_in_words(site: SiteConfig, plan: Plan) -> list[str]:
    """What the plan makes of this site's records, in sentences for its own team alone.

    They are read here and now. Look-alikes are counted on a split of the same shares.
    """
    roles, secrets = get_task(plan.model.task).roles, {site.name: os.urandom(32)}
    (found,) = survey([site], plan, roles=roles, secrets=secrets)
    own = [] if plan.data.dataset not in site.datasets else delta_notes(plan, site)
    return [*found.notes(split_by=plan.data.split_by), *own]


def _leaves(layout: Layout | None) -> dict[str, Any] | None:
    if layout is None:
        return None
    return {
        "bytes": layout.nbytes,
        "tensors": [{"name": e.name, "shape": list(e.shape)} for e in layout.entries],
    }
