"""What a finished run leaves behind: privacy.json and results.json."""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from silotune.data.site import SiteConfig
from silotune.events.view import RunView
from silotune.models.scores import constant, recall_of
from silotune.plan.plan import Plan
from silotune.privacy.accounting import epsilon_curve
from silotune.privacy.certificate import CertificateBody
from silotune.privacy.events import step_event
from silotune.privacy.tally import epsilon_at_two_sites
from silotune.report.verdict import quoted
from silotune.rounds.run_directory import RunDirectory
from silotune.simulation.baselines import Counts, Job, Outcome, jobs_for, run_jobs, trains_head_only
from silotune.simulation.spectator import LoggedStore, metrics_of, pooled_metrics, size_of
from silotune.strategies.base import Vector

_CURVE_POINTS = 12


def write_privacy(
    directory: RunDirectory, plan: Plan, finished: Mapping[str, Mapping[str, Any]]
) -> None:
    """Write ``privacy.json`` from the sites' certificates."""
    certificates = {
        site: CertificateBody.model_validate_json(json.dumps(found["certificate"]))
        for site, found in finished.items()
        if found["certificate"] is not None
    }
    view = RunView(directory.name)
    view.extend(directory.events)
    sites = {
        site: _site_privacy(
            plan, body, [r.number for r in view.finished_rounds if site in r.replied]
        )
        for site, body in certificates.items()
    }
    example = next(iter(certificates.values()), None)
    both = _at_two_sites(plan, list(certificates.values()))
    directory.write_json(
        "privacy.json",
        {
            "private": plan.private and plan.plan.seed is None,
            "statement": _statement(plan, both),
            "unit": plan.privacy.unit,
            "adjacency": example.adjacency_in_words if example else "none",
            "delta": plan.privacy.delta,
            "budget": plan.privacy.epsilon,
            "two_sites": both,
            "sites": sites,
        },
    )


def _at_two_sites(plan: Plan, bodies: Sequence[CertificateBody]) -> dict[str, float] | None:
    """Epsilon and delta of a person with records at two sites; None if no unit is protected.

    The one noise of all sites hides the sum, which such a person moves by up to two clips: that is
    accounted for. Where each site has noise of its own, the two sites' guarantees add up.
    """
    if not (bodies and plan.per_unit):
        return None
    delta = bodies[0].delta
    if plan.privacy.noise == "shared":
        tallies = [{m.event: m.times for m in body.mechanisms} for body in bodies]
        return {
            "epsilon": max(epsilon_at_two_sites(tally, delta=delta) for tally in tallies),
            "delta": delta,
        }
    largest = sorted((body.epsilon for body in bodies), reverse=True)[:2]
    return {"epsilon": sum(largest), "delta": 2.0 * delta}


def _statement(plan: Plan, both: Mapping[str, float] | None) -> str:
    if plan.trusts_coordinator and plan.plan.seed is None:
        return (
            f"client-level differential privacy, epsilon = {plan.privacy.epsilon:g} for the records of "
            "each site together, against everybody but the coordinator: it sees the sites' updates "
            "and adds the noise"
        )
    if not plan.private and not plan.trusts_coordinator:
        return "no differential privacy: updates reveal records"
    if plan.plan.seed is not None:
        return "seeded: not private"
    if not plan.per_unit:
        return "client-level differential privacy: the records of each site together are protected"
    protected = f"each {plan.privacy.unit} is protected at its own site"
    if both is None:
        return protected
    shown = math.ceil(both["epsilon"] * 1e2) / 1e2  # never below what is true
    return (
        f"{protected}; a person with records at two sites by both together, "
        f"epsilon = {shown:.2f} at delta = {both['delta']:g}"
    )


def _site_privacy(plan: Plan, body: CertificateBody, replied: Sequence[int]) -> dict[str, Any]:
    """What a site spent, also one that missed rounds: `replied` are those that it did not miss."""
    # Metrics are released at rate 1, so the steps are what is sampled, or what is there most often.
    steps = max(body.mechanisms, key=lambda m: (m.rate < 1.0, m.times))
    rate, sigma = steps.rate, steps.sigma
    per_round = step_event(rate=rate, sigma=sigma, steps=plan.releases_a_round)
    charged = steps.times // plan.releases_a_round
    curve = epsilon_curve(per_round, rounds=charged, points=_CURVE_POINTS, delta=body.delta)
    # A reply that was charged and never arrived counts from the last round on.
    numbers = [*replied, *[plan.rounds.number] * charged]
    return {
        "epsilon": body.epsilon,
        "sigma": sigma,
        "rate": rate,
        "steps": steps.times,
        "exposures": [
            {"to": to, "colluding": row.colluding, "epsilon": row.epsilon}
            for (to, _), row in zip(body.exposed_to, body.exposures, strict=True)
        ],
        "epsilon_by_round": [[numbers[count - 1], value] for count, value in curve],
    }


def write_timings(
    directory: RunDirectory,
    finished: Mapping[str, Mapping[str, Any]],
    *,
    workers: Sequence[Sequence[str]],
) -> None:
    """Write ``timings.json``: training by site and round, and what everything else cost.

    A round can't be shorter than its busiest worker trains. What it takes beyond that, messages,
    serialisation, ledgers, aggregation and checkpoints, is ``overhead_seconds``.
    """
    train = {
        site: {int(number): float(value) for number, value in found["train_seconds"].items()}
        for site, found in finished.items()
    }
    rounds = {
        int(event["round"]): float(event["seconds"])
        for event in directory.events
        if event["event"] == "round_finished"
    }
    measured = [n for n in rounds if all(n in by_round for by_round in train.values())]
    total = sum(rounds[n] for n in measured)
    busiest = sum(
        max(sum(train[s][n] for s in part if s in train) for part in workers if part)
        for n in measured
    )
    directory.write_json(
        "timings.json",
        {
            "train_seconds": train,
            "rounds_seconds": total,
            "busiest_worker_seconds": busiest,
            "overhead_seconds": total - busiest,
            "overhead_share": (total - busiest) / total if total else None,
        },
    )


def write_results(
    directory: RunDirectory,
    plan: Plan,
    sites: Sequence[SiteConfig],
    *,
    choices: Mapping[str, Any],
    adapter: Vector,
    final: Mapping[str, Counts],
    base: Mapping[str, Counts],
    finished: Mapping[str, Mapping[str, Any]],
    workers: int,
    shared: Path,
    store: LoggedStore,
) -> None:
    """Write ``results.json``: the federation's test scores, and the baselines' if `workers`.

    `sites` are those in the run, `adapter` is the federation's, `final` its counts on test data, and
    `base` those of the model as it came. The baselines train in this many processes; none with 0.
    Without test data there are methods and no scores.
    """
    seconds = sum(
        float(event["seconds"]) for event in directory.events if event["event"] == "round_finished"
    )
    examples = sum(int(found["records"]) for found in finished.values())
    title = "Federated head on frozen features" if trains_head_only(plan) else "Federated LoRA"
    methods = [_method(plan, "federated", title, final, seconds=seconds, examples=examples)]
    methods += _trivial(plan, final, base)
    if workers:
        states = [directory.site(site.name) for site in sites]
        jobs = jobs_for(plan, sites, choices, shared=shared, adapter=adapter, states=states)
        methods += _baselines(plan, jobs, workers=workers, store=store)
    directory.write_json(
        "results.json",
        {"methods": methods, "view": "simulator", "labels": label_shares(plan, final)},
    )


def _trivial(
    plan: Plan, final: Mapping[str, Counts], base: Mapping[str, Counts]
) -> list[dict[str, Any]]:
    """What any model must beat: the most frequent label, or the base model as it came.

    A site's own row is of the label that is most frequent there, which needs no model either.
    """
    if plan.model.task != "text_classification":
        title = "The base model as it came"
        return [_untrained("base", title, plan, base)] if base else []
    if not final:
        return []
    label = _most_frequent(np.sum([*final.values()], axis=0))
    everywhere = {site: constant(each, label) for site, each in final.items()}
    by_site = {site: constant(each, _most_frequent(each)) for site, each in final.items()}
    title = f"Always {quoted(plan.model.labels[label])}"
    return [{**_untrained("majority", title, plan, by_site), **_scored(plan, everywhere)}]


def _most_frequent(counts: Counts) -> int:
    return int(np.argmax(np.asarray(counts).sum(1)))


def _untrained(key: str, title: str, plan: Plan, counts: Mapping[str, Counts]) -> dict[str, Any]:
    """A method that nothing was trained for, and that tells nothing of anybody's records."""
    found = _method(plan, key, title, counts, seconds=0.0, examples=0)
    return {**found, "private": False, "epsilon": None, "seconds": None}


def _baselines(
    plan: Plan, jobs: Sequence[Job], *, workers: int, store: LoggedStore
) -> list[dict[str, Any]]:
    outcomes: dict[str, list[Outcome]] = defaultdict(list)
    started = time.monotonic()
    for number, outcome in enumerate(run_jobs(jobs, workers=workers), start=1):
        outcomes[outcome.job.key].append(outcome)
        store.append_event(
            "baseline_finished",
            title=outcome.job.title,
            number=number,
            of=len(jobs),
            seconds=time.monotonic() - started,
        )
    return [
        _compared(plan, sorted(outcomes[key], key=lambda one: jobs.index(one.job)))
        for key in dict.fromkeys(job.key for job in jobs)  # in this order, whatever came first
    ]


def _compared(plan: Plan, found: Sequence[Outcome]) -> dict[str, Any]:
    """One method's row, of one model or of a model a site."""
    first = found[0]
    title, counts, everywhere = first.job.title, first.counts, dict(first.everywhere)
    if first.job.key == "own":
        title, by_site = "Own records only", {str(one.job.site): one.counts for one in found}
        everywhere = {s: np.sum([*of.values()], axis=0) for s, of in by_site.items() if of}
        counts = {site: of[site] for site, of in by_site.items() if site in of}
    seconds, examples = sum(one.seconds for one in found), sum(one.examples for one in found)
    row = _method(plan, first.job.key, title, counts, seconds=seconds, examples=examples)
    return {**row, **_of_many(plan, everywhere)} if everywhere else row


def _of_many(plan: Plan, everywhere: Mapping[str, Counts]) -> dict[str, Any]:
    """A model a site, scored on everybody's data: the mean over the models, and each of them."""
    scores = {site: metrics_of(plan, counts) for site, counts in everywhere.items()}
    known = [*scores.values()]
    mean = {key: float(np.mean([one[key] for one in known])) for key in known[0]}
    return {"test": mean, "recall": {}, "everywhere": scores}


def _method(
    plan: Plan,
    key: str,
    title: str,
    counts: Mapping[str, Counts],
    *,
    seconds: float,
    examples: int,
) -> dict[str, Any]:
    return {
        "key": key,
        "title": title,
        "private": plan.private,
        "epsilon": plan.privacy.epsilon,
        **_scored(plan, counts),
        "by_site": {
            site: {**metrics_of(plan, each), "n": size_of(plan, each)}
            for site, each in counts.items()
        },
        "seconds": seconds,
        "examples_seen": examples,
    }


def _scored(plan: Plan, counts: Mapping[str, Counts]) -> dict[str, Any]:
    """Scores on everybody's data; of a classifier also the share of each label that it finds."""
    scores = {"test": pooled_metrics(plan, counts)}
    if plan.model.task != "text_classification" or not counts:
        return scores
    recall = recall_of(np.sum([*counts.values()], axis=0))
    return {**scores, "recall": dict(zip(plan.model.labels, recall, strict=True))}


def label_shares(plan: Plan, counts: Mapping[str, Counts]) -> dict[str, dict[str, float]]:
    """Share of each label among each site's records behind the counts."""
    if plan.model.task != "text_classification":
        return {}
    found = {}
    for site, each in counts.items():
        true = np.asarray(each).sum(1)
        found[site] = dict(zip(plan.model.labels, (true / true.sum()).tolist(), strict=True))
    return found
