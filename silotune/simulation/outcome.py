"""The simulator looking on: events with what only it can know, its own scores, and what a run leaves.

What a finished run leaves are privacy.json, timings.json and results.json.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from silotune.data.site import SiteConfig
from silotune.events.view import RunView
from silotune.models.layout import Vector
from silotune.models.scores import (
    constant,
    every_label,
    found_shares,
    mean_logit,
    metrics_of,
    records_in,
)
from silotune.models.scores import label_shares as shares_of_labels
from silotune.plan.plan import Plan
from silotune.privacy.accounting import epsilon_curve
from silotune.privacy.certificate import CertificateBody
from silotune.privacy.events import step_event
from silotune.privacy.tally import LiveEpsilon, epsilon_at_two_sites, epsilon_of_two_units
from silotune.report.verdict import epsilon, power, quoted
from silotune.rounds.run_directory import RunDirectory, spare
from silotune.simulation.baselines import Counts, Job, Outcome, jobs_for, run_jobs, trains_head_only
from silotune.simulation.grid import Receipt

_CURVE_POINTS = 12
Inspect = Callable[..., dict[str, tuple[dict[str, Any], dict[str, NDArray[Any]]]]]


class LoggedStore:
    """A run directory as the server's store; every event also goes to a listener.

    Parameters
    ----------
    directory : RunDirectory
        Where everything is kept.
    plan : Plan
        The run's plan.
    names : sequence of str
        The sites in node order, for events of a site that never told its name.
    listener : callable
        Given each event as it was written.

    Attributes
    ----------
    names : tuple of str
        Every site of the run.
    """

    def __init__(
        self,
        directory: RunDirectory,
        *,
        plan: Plan,
        names: Sequence[str],
        listener: Callable[[Mapping[str, Any]], None],
    ) -> None:
        self.directory, self._listener, self.names = directory, listener, tuple(names)
        self._told, self._rounds = RunView(directory.name), plan.rounds.number
        self._counts = plan.only_sums
        self._told.extend(directory.events)  # of a run that goes on, also what happened before
        self._names = {str(node): name for node, name in enumerate(names, start=1)}
        self._live = LiveEpsilon(
            delta=plan.privacy.delta or 0.0,
            rounds=plan.rounds.number,
            local_steps=plan.releases_a_round,
            bands=plan.privacy.bands,
        )
        for found in self._told.every_round:
            for site in found.replied:
                self._live.replied(site, found.number)
        self._seconds: dict[str, dict[str, float]] = defaultdict(dict)
        self.save_checkpoint = directory.save_checkpoint
        self.load_checkpoint = directory.load_checkpoint
        self.save_secure_round = directory.save_secure_round
        self.load_secure_round = directory.load_secure_round
        self.was_evaluated = directory.was_evaluated

    @property
    def joined(self) -> list[str]:
        """Sites that are in the run, since this process asked them."""
        joined = set(self._told.joined)
        return [name for name in self.names if name in joined]

    def save_adapter(self, number: int, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Keep the adapter after a round; of those before only what `kept_adapters` says."""
        if self._counts:
            return  # bare sums would tell what lies below the floor
        self.directory.save_adapter(number, arrays)
        have = self.directory.adapter_rounds()
        for old in spare(self._told, have, newest=number, rounds=self._rounds):
            self.directory.adapter_of_round(old).unlink(missing_ok=True)

    @property
    def found(self) -> dict[str, Any] | None:
        """What a run of statistics or votes found."""
        return self._told.found

    @property
    def done(self) -> int:
        """The last finished round."""
        return self._told.done

    def on_receipt(self, receipt: Receipt) -> None:
        """Note how long a site's app took, which the server never learns."""
        if receipt.message_type in {"train", "train.masked"}:
            self._seconds[receipt.group_id][receipt.site] = receipt.seconds

    def append_event(self, kind: Any, **fields: Any) -> Mapping[str, Any]:
        """Write an event, with the seconds that only the simulator knows."""
        known = self._seconds.get(str(fields.get("round")), {})
        site = fields.get("site")
        if kind == "site_refused":
            fields["site"] = self._names.get(str(site), site)
        elif kind == "site_joined" and "sigma" in fields:
            self._live.joined(str(site), rate=fields["rate"], sigma=fields["sigma"])
        elif kind == "site_replied":
            self._live.replied(str(site), int(fields["round"]))
            if site in known:
                fields["train_seconds"] = known[site]
        elif kind == "round_finished":
            if known:
                fields["train_seconds"] = sum(known.values())
            found = self._told.rounds.get(int(fields["round"]))
            if spent := self._live.spent(found.cohort if found else None):
                fields["epsilon"] = spent
        event = self.directory.append_event(kind, **fields)
        self._told.extend([event])
        self._listener(event)
        return event


class View:
    """Typed requests to the simulated sites."""

    def __init__(self, inspect: Inspect) -> None:
        self._inspect = inspect

    def score(
        self, adapter: Vector, *, split: str, frozen: bool, server_round: int, sites: Sequence[str]
    ) -> dict[str, dict[str, Counts]]:
        """Counts on each of these sites' own records of a split, by site, of one or two models.

        ``counts`` are those of the adapter itself; where the strategy keeps parts at the sites,
        ``personal`` are those of the adapter with the site's own parts as of a round. A site
        without a record in the split is left out.
        """
        request = {"op": "score", "split": split, "frozen": frozen, "round": server_round}
        found = self._inspect(request, {"flat": adapter}, sites=sites)
        return {site: arrays for site, (_, arrays) in found.items() if arrays}

    def finish(self, sites: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Settle these sites' ledgers and collect certificates and timings."""
        found = self._inspect({"op": "finish"}, {}, sites=sites)
        return {site: answer for site, (answer, _) in found.items()}

    def save(self, adapter: Vector, folder: Path, *, site: str) -> dict[str, Any]:
        """Have one site write the adapter in PEFT's format; what model it is for."""
        request = {"op": "save", "folder": str(folder)}
        answer, _ = self._inspect(request, {"flat": adapter}, sites=[site])[site]
        return answer


class AdapterScorer:
    """Scores the global adapter between rounds, on held-out data that no site released.

    Parameters
    ----------
    plan : Plan
        Says how often: every ``rounds.evaluate_every`` rounds, and after the last.
    store : LoggedStore
        Gets the events and the lines of ``metrics.jsonl``.
    view : View
        The simulator's way to the sites.

    Attributes
    ----------
    final_counts : mapping of site to counts
        Test counts of the last round's adapter.
    seconds : float
        Time spent looking, which is not part of any round.
    """

    def __init__(self, plan: Plan, *, store: LoggedStore, view: View) -> None:
        self._plan, self._store, self._view = plan, store, view
        self.final_counts: dict[str, Counts] = {}
        self.seconds = 0.0

    def after_round(self, server_round: int, adapter: Vector, *, seconds: float) -> None:
        """Score a finished round's adapter when it is due."""
        if self._plan.only_sums:
            return
        started = time.monotonic()
        last = server_round == self._plan.rounds.number
        every = self._plan.rounds.evaluate_every
        line: dict[str, Any] = {"round": server_round, "seconds": seconds}
        if self._plan.data.validation_share and (last or (every and server_round % every == 0)):
            line["validation"] = self._look(server_round, adapter, split="validation")
        if last and self._plan.data.test_share:
            line["test"] = self._look(server_round, adapter, split="test")
        self._store.directory.metrics.append(line)
        self.seconds += time.monotonic() - started

    def look_at_final(self, adapter: Vector) -> None:
        """Score the final adapter on test data, unless that was done after the last round."""
        if self._plan.data.test_share and not self.final_counts:
            self._look(self._plan.rounds.number, adapter, split="test")

    def base_counts(self, size: int) -> dict[str, Counts]:
        """Test counts of what needs no training: an adapter of zeros adds nothing to the base model.

        Of a number, the mean of what was tested: the head's bias, which is last, says it always. None
        of a task whose trivial answer is known from the counts alone.
        """
        kind = self._plan.task.counts
        if kind in {"confusion", "cells"} or not self._plan.data.test_share:
            return {}
        nothing = np.zeros(size, dtype=np.float32)
        if kind == "errors" and self.final_counts:
            nothing[-1] = mean_logit(np.sum([*self.final_counts.values()], axis=0))
        found = self._view.score(
            nothing, split="test", frozen=False, server_round=0, sites=self._store.joined
        )
        return {site: arrays["counts"] for site, arrays in found.items()}

    def _look(self, server_round: int, adapter: Vector, *, split: str) -> dict[str, float]:
        frozen = server_round <= self._plan.head_rounds
        found = self._view.score(
            adapter, split=split, frozen=frozen, server_round=server_round, sites=self._store.joined
        )
        counts = {site: arrays["counts"] for site, arrays in found.items()}
        if split == "test":
            self.final_counts = counts
        shown = self._shown(counts)
        own = {site: arrays["personal"] for site, arrays in found.items() if "personal" in arrays}
        if own:
            shown["personal"] = self._shown(own)
        self._store.append_event(
            "evaluated", round=server_round, view="simulator", split=split, **shown
        )
        return dict(shown["pooled"])

    def _shown(self, counts: Mapping[str, Counts]) -> dict[str, Any]:
        """Metrics over all sites' records, and of each site."""
        shown: dict[str, Any] = {
            "pooled": pooled_metrics(self._plan, counts),
            "sites": by_site(self._plan, counts),
        }
        left_out = [site for site in self._store.names if site not in counts]
        return {**shown, "left_out": left_out} if left_out else shown


def pooled_metrics(plan: Plan, counts: Mapping[str, Counts]) -> dict[str, float]:
    """The task's metrics over all these sites' records; none without any site."""
    return metrics_of(plan, np.sum([*counts.values()], axis=0)) if counts else {}


def by_site(plan: Plan, counts: Mapping[str, Counts]) -> dict[str, dict[str, float]]:
    """The task's metrics at each site, and the number ``n`` of examples behind them."""
    return {
        site: {**metrics_of(plan, each), "n": records_in(plan, each)}
        for site, each in counts.items()
    }


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
            plan,
            body,
            [r.number for r in view.finished_rounds if site in r.replied],
            told=view.sites[site].mechanism if site in view.sites else None,
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
    accounted for. Under correlated noise the two clips may come in rounds of one block, and any two
    units are counted. Where each site has noise of its own, the two sites' guarantees add up.
    """
    if not (bodies and plan.per_unit):
        return None
    delta = bodies[0].delta
    if plan.privacy.noise == "shared":
        of_both = epsilon_at_two_sites if plan.privacy.bands == 1 else epsilon_of_two_units
        tallies = [{m.event: m.times for m in body.mechanisms} for body in bodies]
        worst = max(of_both(tally, delta=delta) for tally in tallies)
        return {"epsilon": worst, "delta": delta}
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
    return (
        f"{protected}; a person with records at two sites by both together, "
        f"epsilon = {epsilon(both['epsilon'])} at delta = {power(both['delta'])}"
    )


def _site_privacy(
    plan: Plan,
    body: CertificateBody,
    replied: Sequence[int],
    *,
    told: tuple[float, float] | None,
) -> dict[str, Any]:
    """What a site spent, also one that missed rounds.

    `replied` are those that it did not miss, `told` the rate and noise that it gave when it joined.
    """
    # Its steps are what it told of. Where they are not there: what is sampled, as metrics are not.
    steps = max(body.mechanisms, key=lambda m: ((m.rate, m.sigma) == told, m.rate < 1.0, m.times))
    rate, sigma = steps.rate, steps.sigma
    per_round = step_event(rate=rate, sigma=sigma, steps=plan.releases_a_round)
    charged = steps.times // plan.releases_a_round
    curve = epsilon_curve(per_round, rounds=charged, points=_CURVE_POINTS, delta=body.delta)
    blocks = {plan.block_of(number): number for number in reversed(replied)}
    # A reply that was charged and never arrived counts from the last round on.
    numbers = [*reversed(blocks.values()), *[plan.rounds.number] * charged]
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
    asked = {
        int(event["round"]): [name for name in event["cohort"] if name in train]
        for event in directory.events
        if event["event"] == "round_started"
    }
    measured = [n for n in rounds if all(n in train[name] for name in asked.get(n, train))]
    total = sum(rounds[n] for n in measured)
    busiest = sum(
        max(sum(train[s].get(n, 0.0) for s in part if s in train) for part in workers if part)
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
    if plan.task.counts not in {"confusion", "cells"}:
        mean = plan.task.counts == "errors"
        title = "Always the mean of the test records" if mean else "The base model as it came"
        return [_untrained("majority" if mean else "base", title, plan, base)] if base else []
    if not final:
        return []
    if plan.task.counts == "cells":
        always = {site: every_label(each) for site, each in final.items()}
        return [_untrained("majority", "Always every label", plan, always)]
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
    plan: Plan, key: str, title: str, counts: Mapping[str, Counts], *, seconds: float, examples: int
) -> dict[str, Any]:
    return {
        "key": key,
        "title": title,
        "private": plan.private,
        "epsilon": plan.privacy.epsilon,
        **_scored(plan, counts),
        "by_site": by_site(plan, counts),
        "seconds": seconds,
        "examples_seen": examples,
    }


def _scored(plan: Plan, counts: Mapping[str, Counts]) -> dict[str, Any]:
    """Scores on everybody's data; of a classifier also the share of each label that it finds."""
    scores = {"test": pooled_metrics(plan, counts)}
    recall = found_shares(plan, np.sum([*counts.values()], axis=0)) if counts else None
    if recall is None:
        return scores
    return {**scores, "recall": dict(zip(plan.model.labels, recall, strict=True))}


def label_shares(plan: Plan, counts: Mapping[str, Counts]) -> dict[str, dict[str, float]]:
    """Share of each label among each site's records behind the counts."""
    found = {}
    for site, each in counts.items():
        if (shares := shares_of_labels(plan, each)) is not None:
            found[site] = dict(zip(plan.model.labels, shares, strict=True))
    return found
