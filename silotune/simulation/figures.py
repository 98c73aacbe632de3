"""A run in figures: what the report, the summary and the verdict are made of.

Every gain is a difference to something that was measured in the same run on the same held-out
data, counted so that positive is better.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from silotune.events.view import Trouble
from silotune.privacy.live_epsilon import LiveEpsilon
from silotune.simulation.run_record import Method, RunRecord, Scores

Curves = Mapping[str, Sequence[tuple[int, float]]]
"""Epsilon by site: pairs of a round's number and what is spent after it."""

# Two epsilons this close (relative) are the same budget, calibrated by two searches.
_SAME_EPSILON = 0.02


@dataclass(frozen=True)
class Metric:
    """The score that decides, and its direction."""

    key: str
    title: str
    higher_is_better: bool

    def gain(self, new: Scores | None, old: Scores | None) -> float | None:
        """How much better `new` is than `old`; None where either is unknown."""
        if not new or not old or self.key not in new or self.key not in old:
            return None
        difference = new[self.key] - old[self.key]
        return difference if self.higher_is_better else -difference


MACRO_F1 = Metric("macro_f1", "macro-F1", higher_is_better=True)
LOSS = Metric("loss", "loss", higher_is_better=False)


@dataclass(frozen=True)
class MethodRow:
    """A method and what it gains over own-data training and over the head-only probe."""

    key: str
    title: str
    private: bool
    epsilon: float | None
    test: Scores
    gain_over_own: float | None
    gain_over_probe: float | None
    seconds: float | None
    examples_seen: float | None


@dataclass(frozen=True)
class SiteRow:
    """One site's own held-out data, scored by three models."""

    site: str
    n: int | None
    own: Scores
    federated: Scores
    pooled: Scores
    gain: float | None


@dataclass(frozen=True)
class PrivacyFacts:
    """What privacy.json states, and the plan's budget.

    `epsilon` is the largest over the sites: each unit is at one site, so it bounds them all.
    """

    private: bool
    statement: str
    unit: str
    adjacency: str
    delta: float | None
    budget: float | None
    epsilon: float | None
    epsilon_by_site: Mapping[str, float]


@dataclass(frozen=True)
class TimeSplit:
    """Where the wall time of the rounds went, in seconds; the last four add up to `rounds`.

    `train_all_sites` sums over sites that train at the same time on `workers` workers, so
    ``train_all_sites / workers`` is the least wall time it can take; `train` is that (at most the
    time the coordinator waited), `wait` the rest of the coordinator's waiting.
    """

    workers: int
    train_all_sites: float | None
    rounds: float
    train: float
    wait: float
    aggregate: float
    other: float


@dataclass(frozen=True)
class Summary:
    """A run in a few numbers.

    Attributes
    ----------
    left_out : mapping of str to str
        Sites that are in none of the test scores, and the code with which they refused to join; no
        code for those that are in the run and have no test data.
    test_held_out : bool
        Whether the plan holds out test data at all.
    """

    run: str
    name: str
    purpose: str
    finished: bool
    rounds_planned: int
    rounds_finished: int
    sites: tuple[str, ...]
    sites_trained: tuple[str, ...]
    metric: Metric
    methods: tuple[MethodRow, ...]
    by_site: tuple[SiteRow, ...]
    sites_worse: tuple[str, ...]
    probe_at_same_epsilon: bool
    privacy: PrivacyFacts
    epsilon_curves: Curves
    time: TimeSplit
    bytes_up: int
    bytes_down: int
    faults: tuple[Trouble, ...]
    left_out: Mapping[str, str]
    test_held_out: bool
    last_score: Mapping[str, Any] | None

    def method(self, key: str) -> MethodRow | None:
        """The row of this method, if it was run."""
        return next((row for row in self.methods if row.key == key), None)

    def margin(self, held_out: int | None = None) -> float | None:
        """Two binomial standard errors of the federated accuracy; None if there is none.

        Parameters
        ----------
        held_out : int, optional
            Records scored; those of all sites by default.
        """
        federated = self.method("federated")
        n = held_out or sum(row.n or 0 for row in self.by_site)
        if federated is None or not n or not 0 < federated.test.get("accuracy", 0) < 1:
            return None
        accuracy = federated.test["accuracy"]
        return 2 * math.sqrt(accuracy * (1 - accuracy) / n)


def summarise(record: RunRecord) -> Summary:
    """Summarise a run that was read."""
    metric = metric_of(record)
    rows = _site_rows(record, metric)
    about = record.plan.get("plan") or {}
    rounds = record.history.finished_rounds
    curves = epsilon_curves(record)
    return Summary(
        run=str(record.resolved.get("run") or record.directory.name),
        name=str(about.get("name") or record.directory.name),
        purpose=str(about.get("purpose") or ""),
        finished=record.history.finished,
        rounds_planned=_planned_rounds(record),
        rounds_finished=len(rounds),
        sites=record.sites,
        sites_trained=tuple(
            site for site in record.sites if any(site in found.replied for found in rounds)
        ),
        metric=metric,
        methods=tuple(_method_row(method, record, metric) for method in record.methods),
        by_site=rows,
        sites_worse=tuple(row.site for row in rows if row.gain is not None and row.gain < 0),
        probe_at_same_epsilon=_same_budget(
            record.method("federated"), record.method("probe_federated")
        ),
        privacy=privacy_facts(record, curves),
        epsilon_curves=curves,
        time=_time_split(record),
        bytes_up=sum(found.bytes_up for found in rounds),
        bytes_down=sum(found.bytes_down for found in rounds),
        faults=tuple(record.history.troubles),
        left_out=_left_out(record),
        test_held_out=(record.plan.get("data") or {}).get("test_share") != 0,
        last_score=_last_score(record),
    )


def metric_of(record: RunRecord) -> Metric:
    """Macro-F1, or the loss where the run is of a language model."""
    if (record.plan.get("model") or {}).get("task") == "causal_lm":
        return LOSS
    seen = [method.test for method in record.methods]
    seen += [evaluation.pooled for evaluation in record.history.evaluations]
    if any(MACRO_F1.key in scores for scores in seen):
        return MACRO_F1
    return LOSS if any(LOSS.key in scores for scores in seen) else MACRO_F1


def epsilon_curves(record: RunRecord) -> dict[str, list[tuple[int, float]]]:
    """Epsilon spent by each site after rounds: as certified, else counted from the events."""
    sites = (record.privacy or {}).get("sites") or {}
    certified = {
        str(site): [(int(n), float(e)) for n, e in facts.get("epsilon_by_round") or ()]
        for site, facts in sites.items()
    }
    found = {site: curve for site, curve in certified.items() if curve}
    return found or _counted(record)


def _counted(record: RunRecord) -> dict[str, list[tuple[int, float]]]:
    """What the finished rounds of a run without certificates cost, as its sites' noise says."""
    section, rounds = record.plan.get("privacy") or {}, record.plan.get("rounds") or {}
    delta, planned = section.get("delta"), _planned_rounds(record)
    mechanisms = {
        site.name: site.mechanism for site in record.history.sites.values() if site.mechanism
    }
    if delta is None or not planned or not mechanisms:
        return {}
    live = LiveEpsilon(
        delta=float(delta), rounds=planned, local_steps=int(rounds.get("local_steps") or 1)
    )
    for site, (rate, sigma) in mechanisms.items():
        live.joined(site, rate=rate, sigma=sigma)
    curves: dict[str, list[tuple[int, float]]] = {}
    for found in record.history.finished_rounds:
        for site in found.replied:
            live.replied(site)
        for site, value in live.spent().items():
            curves.setdefault(site, []).append((found.number, value))
    return curves


def privacy_facts(record: RunRecord, curves: Curves) -> PrivacyFacts:
    """The guarantee as stated, or as far as an unfinished run can state it."""
    stated, section = record.privacy or {}, record.plan.get("privacy") or {}
    by_site = {str(s): f.get("epsilon") for s, f in (stated.get("sites") or {}).items()}
    if not by_site:
        by_site = {site: curve[-1][1] for site, curve in curves.items()}
    spent = {site: float(value) for site, value in by_site.items() if value is not None}
    protected = section.get("mode", "none") != "none"
    seeded = (record.plan.get("plan") or {}).get("seed") is not None
    return PrivacyFacts(
        private=bool(stated.get("private", protected and not seeded)),
        statement=str(stated.get("statement") or _statement(protected, seeded)),
        unit=str(stated.get("unit") or section.get("unit") or "record"),
        adjacency=str(stated.get("adjacency") or "add or remove one unit at one site"),
        delta=stated.get("delta", section.get("delta")),
        budget=section.get("epsilon"),
        epsilon=max(spent.values(), default=None),
        epsilon_by_site=spent,
    )


def _statement(protected: bool, seeded: bool) -> str:
    if not protected:
        return "trained without differential privacy"
    return "seeded: not private" if seeded else "no statement yet: the run has not come to its end"


def _planned_rounds(record: RunRecord) -> int:
    planned = (record.plan.get("rounds") or {}).get("number")
    return int(planned or record.history.planned)


def _same_budget(one: Method | None, other: Method | None) -> bool:
    if one is None or other is None or one.private != other.private:
        return False
    if one.epsilon is None or other.epsilon is None:
        return one.epsilon == other.epsilon
    return abs(one.epsilon - other.epsilon) <= _SAME_EPSILON * max(one.epsilon, other.epsilon)


def _method_row(method: Method, record: RunRecord, metric: Metric) -> MethodRow:
    own, probe = record.method("own"), record.method("probe_federated")
    over_own = metric.gain(method.test, own.test) if own and method is not own else None
    over_probe = metric.gain(method.test, probe.test) if probe and method is not probe else None
    return MethodRow(
        key=method.key,
        title=method.title,
        private=method.private,
        epsilon=method.epsilon,
        test=method.test,
        gain_over_own=over_own,
        gain_over_probe=over_probe,
        seconds=method.seconds,
        examples_seen=method.examples_seen,
    )


def _site_rows(record: RunRecord, metric: Metric) -> tuple[SiteRow, ...]:
    by_key = {
        key: found.by_site if (found := record.method(key)) else {}
        for key in ("own", "federated", "pooled")
    }
    named = dict.fromkeys([*record.sites, *(site for found in by_key.values() for site in found)])
    return tuple(
        _site_row(site, *(found.get(site, {}) for found in by_key.values()), metric=metric)
        for site in named
        if any(site in found for found in by_key.values())
    )


def _site_row(
    site: str, own: Scores, federated: Scores, pooled: Scores, *, metric: Metric
) -> SiteRow:
    sizes: Iterable[float] = (found["n"] for found in (federated, own, pooled) if "n" in found)
    n = next(iter(sizes), None)
    gain = metric.gain(federated, own)
    return SiteRow(site, None if n is None else int(n), own, federated, pooled, gain)


def _time_split(record: RunRecord) -> TimeSplit:
    rounds = record.history.finished_rounds
    workers = max(1, int(record.resolved.get("workers") or 1))
    known = [found.train_seconds for found in rounds if found.train_seconds is not None]
    waited = sum(found.wait_seconds or 0.0 for found in rounds)
    train = min(sum(known) / workers, waited)
    aggregate = sum(found.aggregate_seconds or 0.0 for found in rounds)
    total = sum(found.seconds or 0.0 for found in rounds)
    return TimeSplit(
        workers=workers,
        train_all_sites=sum(known) if known else None,
        rounds=total,
        train=train,
        wait=waited - train,
        aggregate=aggregate,
        other=max(0.0, total - waited - aggregate),
    )


def _left_out(record: RunRecord) -> dict[str, str]:
    federated = record.method("federated")
    scored = federated.by_site if federated else {}
    found = {name: site.code for name, site in record.history.sites.items() if not site.joined}
    silent = [site for site in record.sites if scored and site not in scored]
    return {**dict.fromkeys(silent, ""), **{name: code for name, code in found.items() if code}}


def _last_score(record: RunRecord) -> dict[str, Any] | None:
    seen = [found for found in record.history.evaluations if found.view == "simulator"]
    if not seen:
        return None
    return {"round": seen[-1].number, "split": seen[-1].split, **seen[-1].pooled}
