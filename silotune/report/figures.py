"""A run in figures: what the report, the summary and the verdict are made of.

Every gain is a difference to something that was measured in the same run on the same held-out
data, counted so that positive is better.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any, Literal

from silotune.events.view import Trouble
from silotune.plan.plan import stored_bands
from silotune.plan.tasks import TASKS, Metric, TaskFacts, facts_of
from silotune.privacy.tally import LiveEpsilon
from silotune.rounds.run_directory import Method, RunRecord, Scores

Curves = Mapping[str, Sequence[tuple[int, float]]]
"""Epsilon by site: pairs of a round's number and what is spent after it."""

# A chart of more sites than this is no longer read; the report's table has them all.
MOST_SITES = 24
# Two epsilons this close (relative) are the same target, calibrated by two searches.
_SAME_EPSILON = 0.02


TRIVIAL = ("majority", "base")
"""Keys of what needs no training: always the most frequent label, or the base model as it came."""

Guarantee = Literal["none", "seeded", "coordinator", "secret"]


@dataclass(frozen=True)
class Spread:
    """A method's score over several runs of one plan."""

    runs: int
    mean: float
    deviation: float


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
    recall: Scores
    spread: Spread | None


@dataclass(frozen=True)
class SiteScores:
    """One site: scores on its own held-out data, and of its own models on everybody's.

    Attributes
    ----------
    trivial, own, federated, personal, pooled : Scores
        On its own held-out data: always its most frequent label (or the base model as it came), its own
        model, the federated one, that with a head of the site's own, one of pooled records.
    own_everywhere, personal_everywhere : Scores
        Of its own models, on everybody's held-out data.
    gain, gain_everywhere : float or None
        Of the federated model over its own, on its own data and on everybody's.
    gain_accuracy : float or None
        As `gain`, in accuracy (micro-F1 where records have several labels); None where neither is a
        score of the task.
    """

    site: str
    n: int | None
    trivial: Scores
    own: Scores
    federated: Scores
    personal: Scores
    pooled: Scores
    own_everywhere: Scores
    personal_everywhere: Scores
    gain: float | None
    gain_accuracy: float | None
    gain_everywhere: float | None

    def score(self, kind: str, metric: Metric) -> float | None:
        """One of its scores, e.g. of kind ``own_everywhere``; None where it is not known."""
        scores: Scores = getattr(self, kind)
        return scores.get(metric.key)


@dataclass(frozen=True)
class PrivacyFacts:
    """What privacy.json states, and the plan's own epsilon as `budget`, its key in the summary.

    Attributes
    ----------
    guarantee : str
        ``secret`` noise hides; ``coordinator``: it does, from all but the coordinator, who adds it;
        ``seeded`` noise does not; ``none`` is added.
    protects : str
        What one guarantee is about: ``each record``, or all records of a site together.
    epsilon : float or None
        The largest over the sites: each unit is at one site, so it bounds them all.
    exposures : sequence of (str, float)
        Against whom which epsilon holds, the largest over the sites, where it depends on that.
    two_sites : mapping or None
        ``epsilon`` and ``delta`` of a person with records at two sites.
    """

    guarantee: Guarantee
    private: bool
    statement: str
    unit: str
    protects: str
    adjacency: str
    delta: float | None
    budget: float | None
    epsilon: float | None
    epsilon_by_site: Mapping[str, float]
    exposures: Sequence[tuple[str, float]]
    two_sites: Mapping[str, float] | None


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
    metrics : tuple of Metric
        Of the run's task; `metric` decides, and the model is judged by the one `beside` it, too.
    needs_no_training : tuple of str
        What any model must beat: at the head of a column, and in a sentence.
    left_out : mapping of str to str
        Sites that are in none of the test scores, and the code with which they refused to join; no
        code for those that are in the run and have no test data.
    test_held_out : bool
        Whether the plan holds out test data at all.
    """

    run: str
    name: str
    purpose: str
    trained: str
    finished: bool
    rounds_planned: int
    rounds_finished: int
    sites: tuple[str, ...]
    sites_trained: tuple[str, ...]
    metric: Metric
    metrics: tuple[Metric, ...]
    beside: Metric | None
    needs_no_training: tuple[str, str]
    methods: tuple[MethodRow, ...]
    by_site: tuple[SiteScores, ...]
    sites_worse: tuple[str, ...]
    sites_worse_by_accuracy: tuple[str, ...]
    labels: Mapping[str, Scores]
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

    @property
    def head_only(self) -> bool:
        """Whether the adapter was never trained."""
        return self.trained == "head"

    @property
    def trivial(self) -> MethodRow | None:
        """What needs no training, scored on the same data."""
        return next((row for row in self.methods if row.key in TRIVIAL), None)

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


def summarise(record: RunRecord, *, beside: Sequence[RunRecord] = ()) -> Summary:
    """Summarise a run that was read, with the spread over it and other runs of its plan."""
    task = task_of(record)
    metric = task.metrics[0]
    rows = _site_rows(record, task)
    about = record.plan.get("plan") or {}
    rounds = record.history.finished_rounds
    curves = epsilon_curves(record)
    return Summary(
        run=str(record.resolved.get("run") or record.directory.name),
        name=str(about.get("name") or record.directory.name),
        purpose=str(about.get("purpose") or ""),
        trained="head" if _head_only(record) else "adapter",
        finished=record.history.finished,
        rounds_planned=_planned_rounds(record),
        rounds_finished=len(rounds),
        sites=record.sites,
        sites_trained=tuple(
            site for site in record.sites if any(site in found.replied for found in rounds)
        ),
        metric=metric,
        metrics=task.metrics,
        beside=task.metrics[1] if task.judged > 1 else None,
        needs_no_training=task.trivial,
        methods=tuple(_method_row(m, record, metric, beside) for m in record.methods),
        by_site=rows,
        sites_worse=tuple(row.site for row in rows if (row.gain or 0) < 0),
        sites_worse_by_accuracy=tuple(row.site for row in rows if (row.gain_accuracy or 0) < 0),
        labels=record.labels,
        probe_at_same_epsilon=_same_epsilon(
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


def task_of(record: RunRecord) -> TaskFacts:
    """The run's task; of a plan that can't be read any more, one that has such scores."""
    model = record.plan.get("model") or {}
    found = facts_of(str(model.get("task", "")), several=bool(model.get("multi_label")))
    if found is not None:
        return found
    seen = [method.test for method in record.methods]
    seen += [evaluation.pooled for evaluation in record.history.evaluations]
    known = (t for t in TASKS.values() if any(t.metrics[0].key in scores for scores in seen))
    return next(known, next(iter(TASKS.values())))


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
        delta=float(delta),
        rounds=planned,
        local_steps=int(rounds.get("local_steps") or 1),
        bands=stored_bands(record.plan),
    )
    for site, (rate, sigma) in mechanisms.items():
        live.joined(site, rate=rate, sigma=sigma)
    curves: dict[str, list[tuple[int, float]]] = {}
    for found in record.history.finished_rounds:
        for site in found.replied:
            live.replied(site, found.number)
        for site, value in live.spent().items():
            curves.setdefault(site, []).append((found.number, value))
    return curves


def privacy_facts(record: RunRecord, curves: Curves) -> PrivacyFacts:
    """The guarantee as stated, or as far as an unfinished run can state it."""
    stated, section = record.privacy or {}, record.plan.get("privacy") or {}
    sites = stated.get("sites") or {}
    by_site = {str(s): f.get("epsilon") for s, f in sites.items()}
    if not by_site:
        by_site = {site: curve[-1][1] for site, curve in curves.items()}
    spent = {site: float(value) for site, value in by_site.items() if value is not None}
    guarantee = _guarantee(record)
    whole = section.get("mode") == "site"
    unit = "site" if whole else str(stated.get("unit") or section.get("unit") or "record")
    return PrivacyFacts(
        guarantee=guarantee,
        private=bool(stated.get("private", guarantee == "secret")),
        statement=str(stated.get("statement") or _STATEMENTS[guarantee]),
        unit=unit,
        protects="all records of a site together" if whole else f"each {unit}",
        adjacency=str(stated.get("adjacency") or "add or remove one unit at one site"),
        delta=stated.get("delta", section.get("delta")),
        budget=section.get("epsilon"),
        epsilon=max(spent.values(), default=None),
        epsilon_by_site=spent,
        exposures=_exposures(sites.values()),
        two_sites=stated.get("two_sites"),
    )


_STATEMENTS: Mapping[Guarantee, str] = {
    "none": "trained without differential privacy",
    "seeded": "seeded: not private",
    "coordinator": "no statement yet: the run has not come to its end",
    "secret": "no statement yet: the run has not come to its end",
}


def _guarantee(record: RunRecord) -> Guarantee:
    section = record.plan.get("privacy") or {}
    if section.get("mode", "none") == "none":
        return "none"
    if (record.plan.get("plan") or {}).get("seed") is not None:
        return "seeded"
    trusted = (section.get("site") or {}).get("noise") == "coordinator"
    return "coordinator" if trusted else "secret"


def _exposures(sites: Iterable[Mapping[str, Any]]) -> tuple[tuple[str, float], ...]:
    """The largest epsilon against each adversary; nothing where all are one."""
    largest: dict[str, float] = {}
    for facts in sites:
        for row in facts.get("exposures") or ():
            to = str(row["to"])
            largest[to] = max(largest.get(to, 0.0), float(row["epsilon"]))
    return tuple(largest.items()) if len(largest) > 1 else ()


def _head_only(record: RunRecord) -> bool:
    site = (record.plan.get("optimizer") or {}).get("site") or {}
    if (record.plan.get("lora") or {}).get("target_modules") == "none":
        return True
    return int(site.get("head_rounds") or 0) >= _planned_rounds(record) > 0


def _planned_rounds(record: RunRecord) -> int:
    planned = (record.plan.get("rounds") or {}).get("number")
    return int(planned or record.history.planned)


def _same_epsilon(one: Method | None, other: Method | None) -> bool:
    if one is None or other is None or one.private != other.private:
        return False
    if one.epsilon is None or other.epsilon is None:
        return one.epsilon == other.epsilon
    return abs(one.epsilon - other.epsilon) <= _SAME_EPSILON * max(one.epsilon, other.epsilon)


def _spread(key: str, records: Sequence[RunRecord], metric: Metric) -> Spread | None:
    """Mean and standard deviation of a method's score over runs; None with fewer than two."""
    found = [method.test.get(metric.key) for r in records if (method := r.method(key))]
    known = [value for value in found if value is not None]
    return Spread(len(known), fmean(known), stdev(known)) if len(known) > 1 else None


def _method_row(
    method: Method, record: RunRecord, metric: Metric, beside: Sequence[RunRecord]
) -> MethodRow:
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
        recall=method.recall,
        spread=_spread(method.key, [record, *beside], metric),
    )


_COLUMNS = ("own", "federated", "personal", "pooled")


def _site_rows(record: RunRecord, task: TaskFacts) -> tuple[SiteScores, ...]:
    by_key = {
        key: found.by_site if (found := record.method(key)) else {} for key in (*_COLUMNS, *TRIVIAL)
    }
    named = dict.fromkeys([*record.sites, *(site for found in by_key.values() for site in found)])
    scored = [site for site in named if any(site in found for found in by_key.values())]
    return tuple(_site_row(site, by_key, record, task=task) for site in scored)


def _site_row(
    site: str, by_key: Mapping[str, Mapping[str, Scores]], record: RunRecord, *, task: TaskFacts
) -> SiteScores:
    metric = task.metrics[0]
    scores = {key: found.get(site, {}) for key, found in by_key.items()}
    n = next((found["n"] for found in scores.values() if "n" in found), None)
    own, federated, shared = scores["own"], scores["federated"], record.method("federated")
    everywhere = {
        key: method.everywhere.get(site, {}) if (method := record.method(key)) else {}
        for key in ("own", "personal")
    }
    return SiteScores(
        site=site,
        n=None if n is None else int(n),
        trivial=scores["majority"] or scores["base"],
        **{key: scores[key] for key in _COLUMNS},
        own_everywhere=everywhere["own"],
        personal_everywhere=everywhere["personal"],
        gain=metric.gain(federated, own),
        gain_accuracy=task.metrics[1].gain(federated, own) if task.judged > 1 else None,
        gain_everywhere=metric.gain(shared.test, everywhere["own"]) if shared else None,
    )


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
