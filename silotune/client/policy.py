"""A site's policy: the judgement of a plan, clause by clause.

The site's word is final (promise 3): a plan passes only if every clause of site.toml's ``[policy]``
lets it pass, and a clause that is not written lets nothing pass. The same judgement is made of a plan
that is proposed, before every answer in a run, and in a simulation.

`Facts` are what a site knows when it judges: what would leave, and where the ledger would be.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from silotune.client import errors
from silotune.client.terms import run_events, sigma_for
from silotune.data.site import PolicyConfig, SiteConfig
from silotune.errors import PolicyError
from silotune.models.layout import Layout
from silotune.plan.plan import Plan
from silotune.plan.voted import VOTES
from silotune.privacy.events import ComposedDpEvent
from silotune.privacy.ledger import Ledger
from silotune.privacy.tally import epsilon_of, tally_of, total

_MB = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a judgement needs to know besides plan and policy.

    Attributes
    ----------
    moment : datetime
        Now, in the machine's local time.
    upload_bytes : int or None
        Bytes that a round sends; None when they can't be told, which refuses.
    total_epsilon : float or None
        What the dataset would reach with this run, at the plan's delta; None without privacy.
    declared_units : int or None
        What the site declares of the plan's dataset; None, which refuses a private plan, if unknown.
    """

    moment: datetime
    upload_bytes: int | None
    total_epsilon: float | None
    declared_units: int | None = None


@dataclass(frozen=True, kw_only=True)
class Clause:
    """The word of one clause.

    Attributes
    ----------
    name : str
        Its key in ``[policy]``.
    allowed : bool
        Whether the plan passes it.
    reason : str
        What was compared, in words.
    error : type of PolicyError
        What a refusal raises; its code is all that leaves the site.
    """

    name: str
    allowed: bool
    reason: str
    error: type[PolicyError]


@dataclass(frozen=True)
class PlanVerdict:
    """Every clause's word on a plan."""

    clauses: tuple[Clause, ...]

    @property
    def allowed(self) -> bool:
        """Whether all clauses pass."""
        return all(clause.allowed for clause in self.clauses)

    @property
    def refusals(self) -> tuple[Clause, ...]:
        """The clauses that refuse."""
        return tuple(clause for clause in self.clauses if not clause.allowed)

    def require(self) -> None:
        """Raise the error of the first clause that refuses; it names all of them.

        Raises
        ------
        PolicyError
            Of the clause's own class, with its own code.
        """
        refusals = self.refusals
        if refusals:
            listed = "; ".join(f"policy.{clause.name}: {clause.reason}" for clause in refusals)
            raise refusals[0].error(listed)


def judge(policy: PolicyConfig, plan: Plan, facts: Facts) -> PlanVerdict:
    """The verdict of every clause on a plan.

    Parameters
    ----------
    policy : PolicyConfig
        The site's ``[policy]``.
    plan : Plan
        What is asked.
    facts : Facts
        What else has to be known.
    """
    return PlanVerdict(tuple(clause(policy, plan, facts) for clause in _CLAUSES))


def judge_moment(policy: PolicyConfig, moment: datetime) -> Clause:
    """The word of the one clause that changes with time."""
    windows = policy.windows
    if not windows:
        return _clause("hours", errors.OutsideHours, False, _unstated("hours"))
    listed = ", ".join(policy.hours)
    if any(window.holds(moment) for window in windows):
        return _clause("hours", errors.OutsideHours, True, f"it is within {listed}")
    opens = min(window.next_start(moment) for window in windows)
    return _clause(
        "hours",
        errors.OutsideHours,
        False,
        f"allowed is {listed}; the next begins on {opens:%a %d %b at %H:%M}",
    )


# --- clauses ------------------------------------------------------------------------------------


def _clause(name: str, error: type[PolicyError], allowed: bool, reason: str) -> Clause:
    return Clause(name=name, allowed=allowed, reason=reason, error=error)


def _unstated(name: str) -> str:
    return f"site.toml does not state {name}, so nothing is allowed"


def _at_most(
    name: str, error: type[PolicyError], asked: float | None, limit: float | None, what: str
) -> Clause:
    if limit is None:
        return _clause(name, error, False, _unstated(name))
    if asked is None:
        return _clause(name, error, False, f"{what} can't be told, and {limit:g} is allowed")
    # Written so that NaN refuses.
    return _clause(name, error, asked <= limit, f"{what} {asked:.6g}, allowed {limit:g}")


def _among(
    name: str, error: type[PolicyError], asked: tuple[str, ...], allowed: tuple[str, ...], what: str
) -> Clause:
    if not allowed:
        return _clause(name, error, False, _unstated(name))
    missing = sorted(set(asked) - set(allowed))
    listed = ", ".join(allowed)
    if missing:
        return _clause(name, error, False, f"{what} {', '.join(missing)}, allowed {listed}")
    return _clause(name, error, True, f"{what} {', '.join(asked)}")


def _privacy(policy: PolicyConfig, plan: Plan, facts: Facts) -> Clause:
    required, name = policy.require_privacy, "require_privacy"
    reason = f"the plan is {'' if plan.private else 'not '}private"
    if not required:
        reason += ", and need not be"
    return _clause(name, errors.PrivacyRequired, plan.private or not required, reason)


def _seeded(policy: PolicyConfig, plan: Plan, facts: Facts) -> Clause:
    guessable = plan.private and plan.plan.seed is not None
    reason = "the noise is seeded" if guessable else "the noise can't be repeated"
    if not plan.private:
        reason = "there is no noise to be seeded"
    elif guessable and policy.allow_seeded_noise:
        reason += ", and may be"
    allowed = policy.allow_seeded_noise or not guessable
    return _clause("allow_seeded_noise", errors.SeededNoiseRefused, allowed, reason)


def _epsilon(policy: PolicyConfig, plan: Plan, facts: Facts) -> Clause:
    name, error = "max_epsilon", errors.EpsilonOfRunRefused
    if not plan.private:
        return _clause(name, error, True, "a plan without privacy has no epsilon")
    return _at_most(name, error, plan.privacy.epsilon, policy.max_epsilon, "epsilon of the run")


def _total(policy: PolicyConfig, plan: Plan, facts: Facts) -> Clause:
    name, error = "max_total_epsilon", errors.EpsilonInTotalRefused
    if not plan.private:
        return _clause(name, error, True, "a plan without privacy has no epsilon")
    what = "epsilon of all runs with this one"
    return _at_most(name, error, facts.total_epsilon, policy.max_total_epsilon, what)


def _delta(policy: PolicyConfig, plan: Plan, facts: Facts) -> Clause:
    name, error = "max_delta", errors.DeltaRefused
    if not plan.private:
        return _clause(name, error, True, "a plan without privacy has no delta")
    return _at_most(name, error, plan.privacy.delta, policy.max_delta, "delta")


def _large_delta(policy: PolicyConfig, plan: Plan, facts: Facts) -> Clause:
    name, error, units = "allow_large_delta", errors.DeltaTooLarge, facts.declared_units
    if not plan.private or plan.privacy.delta is None:
        return _clause(name, error, True, "a plan without privacy has no delta")
    if units is None:
        return _clause(name, error, False, "the declared units can't be told")
    large = plan.privacy.delta * units >= 1.0
    reason = f"delta {plan.privacy.delta:g} is {'not ' * (not large)}at or above 1/{units}"
    if large and policy.allow_large_delta:
        reason += ", and may be"
    return _clause(name, error, policy.allow_large_delta or not large, reason)


def _secure(policy: PolicyConfig, plan: Plan, facts: Facts) -> Clause:
    secure = plan.aggregation.secure
    reason = "the coordinator sees " + ("only sums" if secure else "this site's update alone")
    if not secure and not policy.require_secure_aggregation:
        reason += ", and may"
    allowed = secure or not policy.require_secure_aggregation
    return _clause("require_secure_aggregation", errors.SecureAggregationRequired, allowed, reason)


def _cohort(policy: PolicyConfig, plan: Plan, facts: Facts) -> Clause:
    name, error = "min_cohort", errors.CohortBelowPolicy
    if policy.min_cohort is None:
        return _clause(name, error, False, _unstated(name))
    # What the plan promises; the cohort that a secure round shows is held to it in `client.secure`.
    asked = plan.rounds.min_sites
    reason = f"sites in a round {asked}, wanted {policy.min_cohort}"
    return _clause(name, error, asked >= policy.min_cohort, reason)


def _base_model(policy: PolicyConfig, plan: Plan, facts: Facts) -> Clause:
    name, error, pinned = "base_models", errors.BaseModelRefused, plan.model.sha256
    if not plan.model.base:
        return _clause(name, error, True, "no model takes part")
    if not policy.base_models:
        return _clause(name, error, False, _unstated(name))
    if pinned is None:
        return _clause(name, error, False, "the plan does not pin the weights by model.sha256")
    if pinned not in policy.base_models:
        return _clause(name, error, False, f"the weights {pinned[:12]}… are not listed")
    return _clause(
        name, error, True, f"the weights {pinned[:12]}… are {policy.base_models[pinned]}"
    )


def _task(policy: PolicyConfig, plan: Plan, facts: Facts) -> Clause:
    asked = (plan.model.task,) if plan.vote is None else (plan.model.task, VOTES)
    return _among("tasks", errors.TaskRefused, asked, policy.tasks, "task")


def _modules(policy: PolicyConfig, plan: Plan, facts: Facts) -> Clause:
    asked = plan.lora.target_modules
    names = (asked,) if isinstance(asked, str) else asked
    name, error = "target_modules", errors.TargetModulesRefused
    if plan.only_sums:
        return _clause(name, error, True, "no model is adapted")
    return _among(name, error, names, policy.target_modules, "modules")


def _strategy(policy: PolicyConfig, plan: Plan, facts: Facts) -> Clause:
    asked, error = (plan.aggregation.strategy,), errors.StrategyRefused
    if plan.only_sums:
        return _clause("strategies", error, True, "counts and votes are sums, and need no strategy")
    return _among("strategies", error, asked, policy.strategies, "strategy")


def _rounds(policy: PolicyConfig, plan: Plan, facts: Facts) -> Clause:
    asked = plan.rounds.number
    return _at_most("max_rounds", errors.TooManyRounds, asked, policy.max_rounds, "rounds")


def _upload(policy: PolicyConfig, plan: Plan, facts: Facts) -> Clause:
    asked = None if facts.upload_bytes is None else facts.upload_bytes / _MB
    name, error, limit = "max_upload_mb", errors.UploadTooLarge, policy.max_upload_mb
    return _at_most(name, error, asked, limit, "megabytes a round")


def _hours(policy: PolicyConfig, plan: Plan, facts: Facts) -> Clause:
    return judge_moment(policy, facts.moment)


_CLAUSES: tuple[Callable[[PolicyConfig, Plan, Facts], Clause], ...] = (
    _privacy,
    _seeded,
    _epsilon,
    _total,
    _delta,
    _large_delta,
    _secure,
    _cohort,
    _base_model,
    _task,
    _modules,
    _strategy,
    _rounds,
    _upload,
    _hours,
)


def facts_for(
    site: SiteConfig,
    plan: Plan,
    *,
    run: str,
    ledger: Ledger | None,
    layout: Layout | None,
    moment: datetime,
) -> Facts:
    """Facts about a plan at a site, before or during its run.

    Parameters
    ----------
    site : SiteConfig
        Whose policy will judge.
    plan : Plan
        What is asked.
    run : str
        The run's name; what it has reserved itself is not counted twice.
    ledger : Ledger or None
        The site's; None if it is empty, or if the plan has no privacy.
    layout : Layout or None
        Of the adapter; None if it can't be told.
    moment : datetime
        Now, local time.

    Raises
    ------
    DatasetUnknown
        The site doesn't offer the plan's dataset.
    CalibrationImpossible
        No noise reaches the plan's epsilon.
    """
    upload = None if layout is None else layout.nbytes
    reached = total_epsilon(site, plan, run=run, ledger=ledger) if plan.private else None
    return Facts(
        moment=moment,
        upload_bytes=upload,
        total_epsilon=reached,
        declared_units=site.dataset(plan.data.dataset).declared_units,
    )


def total_epsilon(site: SiteConfig, plan: Plan, *, run: str, ledger: Ledger | None) -> float:
    """Epsilon of all the dataset's runs, reservations included, with the whole of this one."""
    name = plan.data.dataset
    declared = site.dataset(name).declared_units
    assert plan.privacy.delta is not None  # a validated private plan has it
    events = run_events(plan, declared, sigma=sigma_for(plan, declared))
    accounts = [] if ledger is None else ledger.runs(name)
    others = total(account.committed for account in accounts if account.run != run)
    return epsilon_of(others + tally_of(ComposedDpEvent(events)), delta=plan.privacy.delta)
