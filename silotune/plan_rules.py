"""Combinations of settings that a plan can't have, each with its reason."""

from __future__ import annotations

from typing import TYPE_CHECKING

from silotune.plan_sections import Clip
from silotune.plan_secure import secure_conflicts
from silotune.plan_strategies import STRATEGIES

if TYPE_CHECKING:
    from silotune.plan import Plan


def conflicts(plan: Plan) -> list[str]:
    """Every impossible combination of a plan: the key's path and the reason."""
    return [
        *_model_conflicts(plan),
        *_site_privacy_conflicts(plan),
        *_privacy_conflicts(plan),
        *_step_conflicts(plan),
        *_strategy_conflicts(plan),
        *secure_conflicts(plan),
    ]


def _model_conflicts(plan: Plan) -> list[str]:
    labels, task = plan.model.labels, plan.model.task
    found = []
    if task == "text_classification" and len(labels) < 2:
        found.append("model.labels: text_classification needs at least two labels")
    if len(set(labels)) != len(labels):
        found.append("model.labels: a label is listed twice")
    if task == "causal_lm" and labels:
        found.append("model.labels: causal_lm has no labels; remove them")
    if task == "causal_lm" and plan.optimizer.site.head_rounds:
        found.append("optimizer.site.head_rounds: causal_lm has no head to train; set 0")
    if plan.data.test_share + plan.data.validation_share >= 1.0:
        found.append("data.test_share: with data.validation_share it leaves nothing to train on")
    return found


def _privacy_conflicts(plan: Plan) -> list[str]:
    privacy, found = plan.privacy, []
    protected = {"epsilon": privacy.epsilon, "delta": privacy.delta, "clip": privacy.clip}
    for key, value in protected.items():
        if privacy.mode != "none" and value is None:
            found.append(f"privacy.{key}: needed when privacy.mode is '{privacy.mode}'")
        if privacy.mode == "none" and value is not None:
            found.append(f"privacy.{key}: has no meaning when privacy.mode is 'none'; remove it")
    if (privacy.rate is None) == (privacy.batch is None):
        found.append("privacy.rate: give exactly one of privacy.rate and privacy.batch")
    if privacy.unit == "record" and privacy.max_records_per_unit != 1:
        found.append("privacy.max_records_per_unit: must be 1 when privacy.unit is 'record'")
    if privacy.max_records_per_unit > privacy.max_physical_batch:
        found.append("privacy.max_physical_batch: must hold the records of one unit")
    if not plan.private and privacy.metrics_share:
        found.append("privacy.metrics_share: has no meaning when privacy.mode is 'none'")
    if isinstance(privacy.clip, Clip) and plan.model.task == "causal_lm":
        found.append("privacy.clip: causal_lm has no head; give one number")
    return found


def _step_conflicts(plan: Plan) -> list[str]:
    found = []
    if plan.rounds.local_steps == 1 and plan.optimizer.server.name == "none":
        found.append(
            "optimizer.server.name: with rounds.local_steps = 1 sites send gradients, "
            "which need 'sgd' or 'adam' at the server"
        )
    if plan.optimizer.site.head_rounds > plan.rounds.number:
        found.append("optimizer.site.head_rounds: more than rounds.number")
    return found


def _strategy_conflicts(plan: Plan) -> list[str]:
    """Impossible combinations of ``[aggregation]`` with itself and with other sections."""
    return [*_options(plan), *_votes(plan), *_local_steps(plan), *_local_head(plan)]


def _options(plan: Plan) -> list[str]:
    name, found = plan.aggregation.strategy, []
    for option in sorted({option for facts in STRATEGIES.values() for option in facts.options}):
        given = getattr(plan.aggregation, option) is not None
        needed = option in plan.strategy.options
        if given and not needed:
            users = [user for user, facts in STRATEGIES.items() if option in facts.options]
            listed = " or ".join(f"'{user}'" for user in sorted(users))
            found.append(f"aggregation.{option}: only for strategy {listed}; remove it")
        if needed and not given:
            found.append(f"aggregation.{option}: needed by strategy '{name}'")
    return found


def _votes(plan: Plan) -> list[str]:
    aggregation, found = plan.aggregation, []
    name, liars, sites = aggregation.strategy, aggregation.byzantine, plan.rounds.min_sites
    if plan.strategy.one_vote and aggregation.weights != "equal":
        found.append(
            f"aggregation.weights: must be 'equal' with strategy '{name}', which gives every site one "
            "vote: a site that lies would declare the most units"
        )
    if liars is None:
        return found
    least = 2 * liars + 3
    if sites < least:
        found.append(
            f"rounds.min_sites: strategy '{name}' needs {least} sites to withstand {liars}, not {sites}"
        )
    if aggregation.selected is not None and aggregation.selected > sites - liars:
        found.append(
            f"aggregation.selected: at most {sites - liars}, which is rounds.min_sites without the "
            f"{liars} that may lie"
        )
    return found


def _local_steps(plan: Plan) -> list[str]:
    name, facts, found = plan.aggregation.strategy, plan.strategy, []
    if plan.sends_sums:
        if facts.idle_in_one_step:
            found.append(
                f"aggregation.strategy: with rounds.local_steps = 1 {facts.idle_in_one_step}. "
                "Use 'fedavg', or more local steps"
            )
        if plan.optimizer.site.prox:
            found.append(
                "optimizer.site.prox: with rounds.local_steps = 1 the one step starts at the global "
                "adapter, where the proximal term is zero; remove it"
            )
    elif facts.no_server_optimizer and plan.optimizer.server.name != "none":
        found.append(
            f"optimizer.server.name: must be 'none' with strategy '{name}', "
            f"{facts.no_server_optimizer}"
        )
    if facts.needs_sgd and plan.optimizer.site.local != "sgd":
        found.append(
            f"optimizer.site.local: must be 'sgd' with strategy '{name}': {facts.needs_sgd}"
        )
    return found


def _local_head(plan: Plan) -> list[str]:
    if plan.aggregation.head == "shared":
        return []
    found = []
    if plan.model.task == "causal_lm":
        found.append("aggregation.head: causal_lm has no head to keep; remove it")
    if plan.optimizer.site.head_rounds:
        found.append(
            "optimizer.site.head_rounds: must be 0 when aggregation.head is 'local': in such a round "
            "sites would have nothing to send"
        )
    if not plan.strategy.keeps_parts:
        found.append(
            f"aggregation.head: '{plan.aggregation.strategy}' has no form that keeps a part at the "
            "site; use 'shared'"
        )
    return found


def _site_privacy_conflicts(plan: Plan) -> list[str]:
    """What client-level privacy needs, and what it can't go with."""
    privacy, aggregation = plan.privacy, plan.aggregation
    if privacy.mode != "site":
        return (
            []
            if privacy.site is None
            else ["privacy.site: only when privacy.mode is 'site'; remove it"]
        )
    found = []
    if privacy.site is None:
        found.append("privacy.site: needed when privacy.mode is 'site': say who adds the noise")
    elif privacy.site.quantile is not None and privacy.site.noise == "site":
        found.append(
            "privacy.site.quantile: needs noise = 'coordinator'; each site's own count would need as "
            "much noise as its update, and say nothing"
        )
    if not isinstance(privacy.clip, float | None):
        found.append("privacy.clip: give one number when privacy.mode is 'site'")
    if plan.sends_sums:
        found.append(
            "rounds.local_steps: at least 2 when privacy.mode is 'site', where whole changes of a site "
            "are clipped"
        )
    if aggregation.weights != "equal":
        found.append(
            "aggregation.weights: must be 'equal' when privacy.mode is 'site': a weight would scale "
            "what one site can do"
        )
    if aggregation.secure:
        found.append(
            "aggregation.secure: not with privacy.mode 'site': the noise on a sum of whole numbers is "
            "that of clipped gradients, not of clipped changes"
        )
    if reason := plan.strategy.refused_by_site or plan.strategy.needs_each:
        found.append(
            f"aggregation.strategy: '{aggregation.strategy}' does not go with privacy.mode 'site', "
            f"which hides one site in a plain mean: {reason}"
        )
    return found
