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
from silotune.plan import Plan
from silotune.privacy.accounting import epsilon_curve, step_event
from silotune.privacy.certificate import CertificateBody
from silotune.privacy.tally import epsilon_at_two_sites
from silotune.simulation.baselines import Counts, Outcome, jobs_for, run_jobs
from silotune.simulation.run_directory import RunDirectory
from silotune.simulation.spectator import LoggedStore, metrics_of, pooled_metrics, size_of

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
    final: Mapping[str, Counts],
    finished: Mapping[str, Mapping[str, Any]],
    workers: int,
    shared: Path,
    store: LoggedStore,
) -> None:
    """Write ``results.json``: the federation's test scores, and the baselines' if `workers`.

    `sites` are those in the run. The baselines train in this many processes; none with 0. Without
    test data there are methods and no scores.
    """
    seconds = sum(
        float(event["seconds"]) for event in directory.events if event["event"] == "round_finished"
    )
    examples = sum(int(found["records"]) for found in finished.values())
    methods = [
        _method(plan, "federated", "Federated LoRA", final, seconds=seconds, examples=examples)
    ]
    if workers:
        methods += _baselines(
            plan, sites, choices=choices, workers=workers, shared=shared, store=store
        )
    directory.write_json("results.json", {"methods": methods, "view": "simulator"})


def _baselines(
    plan: Plan,
    sites: Sequence[SiteConfig],
    *,
    choices: Mapping[str, Any],
    workers: int,
    shared: Path,
    store: LoggedStore,
) -> list[dict[str, Any]]:
    jobs = jobs_for(plan, sites, choices, shared=shared)
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
    methods = []
    for key in dict.fromkeys(job.key for job in jobs):  # in this order, whatever came first
        found = sorted(outcomes[key], key=lambda one: jobs.index(one.job))
        if key == "own":
            methods.append(_own(plan, found))
        else:
            (one,) = found
            methods.append(
                _method(
                    plan,
                    key,
                    one.job.title,
                    one.counts,
                    seconds=one.seconds,
                    examples=one.examples,
                )
            )
    return methods


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
        "test": pooled_metrics(plan, counts),
        "by_site": {
            site: {**metrics_of(plan, each), "n": size_of(plan, each)}
            for site, each in counts.items()
        },
        "seconds": seconds,
        "examples_seen": examples,
    }


def _own(plan: Plan, found: Sequence[Outcome]) -> dict[str, Any]:
    """Each site's own model: on its own data by site, on everybody's data in the mean."""
    everywhere = [pooled_metrics(plan, one.counts) for one in found]
    sites = {str(one.job.site): one for one in found}
    own = {site: one.counts[site] for site, one in sites.items() if site in one.counts}
    return {
        **_method(
            plan,
            "own",
            "Own records only",
            own,
            seconds=sum(one.seconds for one in found),
            examples=sum(one.examples for one in found),
        ),
        "test": {key: float(np.mean([m[key] for m in everywhere])) for key in everywhere[0]},
    }
