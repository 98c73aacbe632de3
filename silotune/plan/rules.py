"""Combinations of settings that a plan can't have, each with its reason."""

from __future__ import annotations

import math
from itertools import pairwise

from silotune.plan.bands import bands_conflicts
from silotune.plan.counted import statistics_conflicts
from silotune.plan.sections import Sections
from silotune.plan.strategies import STRATEGIES
from silotune.plan.tasks import SEVERAL
from silotune.plan.voted import vote_conflicts

_PUBLIC_TEXTS, _LEAST_LABELS = 3, 2
_SHORTEST_WINDOW, _MOST_WINDOWS = 16, 8
_WEIGHED = frozenset({"confusion", "cells"})  # kinds of counts of what has classes


def sends_all_it_trains(plan: Sections) -> bool:
    """Whether sites send the sum of all that they train, as it is: other sites' noise then counts.

    A part that is kept, or an update that is changed after its noise, has the site's own noise only,
    and later rounds depend on it.
    """
    return plan.strategy.sends_all and plan.aggregation.head == "shared"


def secure_conflicts(plan: Sections) -> list[str]:
    """Settings of secure aggregation and shared noise that contradict each other or the rest."""
    shared = plan.privacy.noise == "shared"
    if not plan.aggregation.secure:
        found = [
            f"aggregation.{key}: has no meaning without aggregation.secure = true; remove it"
            for key in ("cohort", "threshold", "update_bound")
            if getattr(plan.aggregation, key) is not None
        ]
        if plan.aggregation.encoding != "uint32":
            found.append("aggregation.encoding: has no meaning without aggregation.secure = true")
        if shared:
            found.append(
                "privacy.noise: 'shared' needs aggregation.secure = true: alone, a site's share of "
                "the noise does not protect what it sends"
            )
        return found
    return [*_cohort_conflicts(plan), *(_shared_conflicts(plan) if shared else [])]


def _cohort_conflicts(plan: Sections) -> list[str]:
    aggregation, rounds = plan.aggregation, plan.rounds
    cohort, threshold = aggregation.cohort, aggregation.threshold
    found = []
    if reason := plan.strategy.needs_each:
        found.append(
            f"aggregation.strategy: '{aggregation.strategy}' can't work with secure = true, which "
            f"gives the coordinator sums only: {reason}"
        )
    if cohort is None:
        found.append(
            "aggregation.cohort: needed with secure = true; the most sites that a round may have, "
            "for which the sum must have room"
        )
    elif threshold is not None and not cohort < 2 * threshold <= 2 * cohort:
        found.append(
            f"aggregation.threshold: must be more than half of aggregation.cohort = {cohort}, and at "
            "most all; with less, two disjoint halves of a round could be opened"
        )
    if cohort is not None and cohort < rounds.min_sites:
        found.append("aggregation.cohort: less than rounds.min_sites")
    if threshold is not None and threshold < rounds.min_sites:
        found.append("aggregation.threshold: less than rounds.min_sites")
    several = rounds.local_steps > 1
    bounded = plan.private or (several and plan.optimizer.site.local == "adam")
    if aggregation.update_bound is None and not bounded:
        found.append(
            "aggregation.update_bound: needed here: neither clipping nor Adam's step bounds the "
            "updates, and a sum in whole numbers must not overflow"
        )
    return found


def _shared_conflicts(plan: Sections) -> list[str]:
    found = []
    if not plan.private:
        found.append("privacy.noise: there is no noise to share when privacy.mode is 'none'")
    if plan.rounds.local_steps > 1:
        found.append(
            "privacy.noise: 'shared' needs rounds.local_steps = 1: after a step of its own a site's "
            "next gradient depends on a model with less noise than the guarantee counts on"
        )
    if plan.privacy.rate is None:
        found.append(
            "privacy.noise: 'shared' needs privacy.rate instead of privacy.batch: only with one "
            "rate for all sites is the round one mechanism on one sample of all units"
        )
    if plan.aggregation.weights != "declared":
        found.append(
            "privacy.noise: 'shared' needs aggregation.weights = 'declared', which adds the sums as "
            "they are: other weights would give sites different sensitivities"
        )
    if not sends_all_it_trains(plan):
        names = sorted(name for name, facts in STRATEGIES.items() if facts.sends_all)
        found.append(
            "privacy.noise: 'shared' needs a strategy that sends all that it trains, as it is: "
            f"{', '.join(names)}, with aggregation.head = 'shared'; what a site "
            "keeps or changes would be without enough noise"
        )
    if plan.aggregation.threshold is None:
        found.append(
            "aggregation.threshold: needed when privacy.noise is 'shared': each site's share of the "
            "noise is sized for so many honest sites"
        )
    return found


def conflicts(plan: Sections) -> list[str]:
    """Every impossible combination of a plan: the key's path and the reason."""
    return [
        *statistics_conflicts(plan),
        *vote_conflicts(plan, conflicts),
        *_model_conflicts(plan),
        *_start_conflicts(plan),
        *_site_privacy_conflicts(plan),
        *_privacy_conflicts(plan),
        *_step_conflicts(plan),
        *_options(plan),
        *_votes(plan),
        *_local_steps(plan),
        *_local_head(plan),
        *_drawn_sites(plan),
        *secure_conflicts(plan),
        *bands_conflicts(plan),
    ]


def _model_conflicts(plan: Sections) -> list[str]:
    labels, name, task = plan.model.labels, plan.model.task, plan.task
    found = []
    least = 1 if task.each_token or plan.model.multi_label else _LEAST_LABELS
    if task.has_labels and len(labels) < least:
        found.append(
            f"model.labels: {name} needs at least {('one label', 'two labels')[least - 1]}"
        )
    found += _token_conflicts(plan)
    if len(set(labels)) != len(labels):
        found.append("model.labels: a label is listed twice")
    if task.trains and not task.has_labels and labels:
        found.append(f"model.labels: {name} has no labels; remove them")
    found += _target_conflicts(plan)
    if task.trains and not task.pools and plan.optimizer.site.head_rounds:
        found.append(f"optimizer.site.head_rounds: {name} has no head to train alone; set 0")
    if task.trains and not task.pools and plan.model.head_features:
        found.append(f"model.head_features: {name} has no head on one vector a text; remove it")
    elif (
        plan.model.head_features and not task.sees and len(plan.model.centre_texts) < _PUBLIC_TEXTS
    ):
        found.append(
            f"model.centre_texts: at least {_PUBLIC_TEXTS} with model.head_features, whose scale is "
            "measured by the median of their distances"
        )
    if task.sees:
        found += _image_conflicts(plan)
    if plan.lora.target_modules == "none" and task.trains and not task.pools:
        found.append(f"lora.target_modules: {name} has no head to train alone, so not 'none'")
    if plan.model.chat is not None and not task.generates:
        found.append(f"model.chat: {name} reads no chats; remove it")
    if plan.data.test_share + plan.data.validation_share >= 1.0:
        found.append("data.test_share: with data.validation_share it leaves nothing to train on")
    return found


def _token_conflicts(plan: Sections) -> list[str]:
    """What a head on every token excludes, and what only such a head has."""
    name, found = plan.model.task, []
    if plan.task.each_token and plan.model.pooling != "mean":
        found.append(f"model.pooling: {name} has a head on every token; remove it")
    if plan.task.each_token and plan.data.max_length < _SHORTEST_WINDOW:
        found.append(f"data.max_length: {name} needs windows of at least {_SHORTEST_WINDOW} tokens")
    if not plan.task.each_token and plan.data.max_windows != _MOST_WINDOWS:
        found.append(f"data.max_windows: {name} reads no text in windows; remove it")
    return found


def _image_conflicts(plan: Sections) -> list[str]:
    found = []
    if plan.model.centre_texts:
        found.append("model.centre_texts: texts can't centre images; remove it")
    if plan.model.pooling == "last":
        found.append(
            "model.pooling: an image has no last token; 'mean', or 'first' for a class token"
        )
    return found


def _start_conflicts(plan: Sections) -> list[str]:
    """What an adapter as the start can't go with: parts that sites have and nobody sends them."""
    if plan.lora.start is None:
        return []
    if plan.statistics is not None:
        return ["lora.start: statistics train nothing; remove it"]
    if plan.freezes_a or not sends_all_it_trains(plan):
        return [
            f"lora.start: not with strategy '{plan.aggregation.strategy}' and aggregation.head = "
            f"'{plan.aggregation.head}': sites keep or freeze a part of the adapter that the "
            "coordinator never sends, and would have it at another start"
        ]
    return []


def _target_conflicts(plan: Sections) -> list[str]:
    """What does not fit what the task learns: several labels, their weights, a number."""
    model, found = plan.model, []
    if model.multi_label and model.task not in SEVERAL:
        found.append(f"model.multi_label: not with {model.task}, but with {' and '.join(SEVERAL)}")
    if model.class_weights and plan.task.counts not in _WEIGHED:
        found.append(f"model.class_weights: {model.task} has no classes to weigh; remove them")
    elif unknown := [label for label in model.class_weights if label not in model.labels]:
        found.append(f"model.class_weights: not in model.labels: {', '.join(unknown)}")
    if (target := model.target) is None:
        if plan.task.target == "value":
            found.append(f"model.target: needed for {model.task}: the range of what is learned")
        return found
    if plan.task.target != "value":
        found.append(f"model.target: {model.task} learns no number; remove it")
    if not target.lower < target.upper:
        found.append("model.target.upper: must be above lower")
    elif math.isinf(target.upper - target.lower):
        found.append("model.target: lower and upper are too far apart")
    elif any(not target.lower < edge < target.upper for edge in target.edges):
        found.append("model.target.edges: must lie between lower and upper")
    if any(a >= b for a, b in pairwise(target.edges)):
        found.append("model.target.edges: must rise")
    return found


def _privacy_conflicts(plan: Sections) -> list[str]:
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
    if privacy.clipping.grouped and plan.task.trains and not plan.task.has_head:
        found.append(f"privacy.clip: {plan.model.task} has no head; give one number")
    return found


def _step_conflicts(plan: Sections) -> list[str]:
    found = []
    server = plan.optimizer.server
    if server.average != "none" and plan.strategy.turns_matrices:
        found.append(
            f"optimizer.server.average: must be 'none' with strategy '{plan.aggregation.strategy}', "
            f"{plan.strategy.turns_matrices}"
        )
    if plan.rounds.local_steps == 1 and plan.optimizer.server.name == "none":
        found.append(
            "optimizer.server.name: with rounds.local_steps = 1 sites send gradients, "
            "which need 'sgd' or 'adam' at the server"
        )
    if plan.optimizer.site.head_rounds > plan.rounds.number:
        found.append("optimizer.site.head_rounds: more than rounds.number")
    return found


def _options(plan: Sections) -> list[str]:
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


def _votes(plan: Sections) -> list[str]:
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


def _local_steps(plan: Sections) -> list[str]:
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


def _drawn_sites(plan: Sections) -> list[str]:
    """What rounds of some of the run's sites only can't go with."""
    rounds, aggregation, found = plan.rounds, plan.aggregation, []
    if rounds.sites is None:
        return []
    if plan.only_sums:
        return ["rounds.sites: every site counts what it has, once; remove it"]
    if rounds.sites < rounds.min_sites:
        found.append("rounds.sites: less than rounds.min_sites")
    if plan.privacy.bands > 1:
        found.append(
            "rounds.sites: not with privacy.bands above 1: noise is taken back by its own site in the "
            "next rounds, and it would seldom be asked; remove one of them"
        )
    if aggregation.secure:
        if aggregation.cohort is not None and rounds.sites > aggregation.cohort:
            found.append(
                f"aggregation.cohort: less than the {rounds.sites} sites of a round (rounds.sites)"
            )
        least = max(3, aggregation.threshold or 0)
        if rounds.sites < least:
            found.append(f"rounds.sites: a secure round needs {least} sites here")
    if reason := plan.strategy.needs_all:
        found.append(
            f"rounds.sites: not with strategy '{aggregation.strategy}': {reason}; remove it"
        )
    return found


def _local_head(plan: Sections) -> list[str]:
    if plan.aggregation.head == "shared":
        return []
    found = []
    if plan.task.trains and not plan.task.has_head:
        found.append(f"aggregation.head: {plan.model.task} has no head to keep; remove it")
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


def _site_privacy_conflicts(plan: Sections) -> list[str]:
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
    if privacy.clipping.grouped:
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
