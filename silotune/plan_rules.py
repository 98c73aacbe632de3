"""Combinations of settings that a plan can't have, each with its reason."""

from __future__ import annotations

from typing import TYPE_CHECKING

from silotune.plan_sections import Clip
from silotune.plan_secure import secure_conflicts
from silotune.plan_strategies import site_privacy_conflicts, strategy_conflicts

if TYPE_CHECKING:
    from silotune.plan import Plan


def conflicts(plan: Plan) -> list[str]:
    """Every impossible combination of a plan: the key's path and the reason."""
    return [
        *_model_conflicts(plan),
        *site_privacy_conflicts(plan),
        *_privacy_conflicts(plan),
        *_step_conflicts(plan),
        *strategy_conflicts(plan),
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
            "which need 'sgd', 'adam', 'yogi' or 'adagrad' at the server"
        )
    if plan.optimizer.site.head_rounds > plan.rounds.number:
        found.append("optimizer.site.head_rounds: more than rounds.number")
    return found
