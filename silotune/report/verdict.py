"""The outcome of a run in plain words, with the numbers that carry it.

The words follow the numbers: where federating or the adapter does not pay, the text says so, and what
any model must beat comes first. A sentence that no number carries is not written. What attacks on a run
found is told in sentences, too. Numbers and names have one rounding, one sign and one dash, in report
and terminal.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from silotune.percents import percent, said_percent
from silotune.plan.tasks import LOSS, Metric
from silotune.report.figures import MethodRow, SiteScores, Summary
from silotune.rounds.run_directory import Scores
from silotune.terminal import inert

DASH = "\N{EN DASH}"


def score(value: float | None) -> str:
    """A score with three decimals, or a dash."""
    return DASH if value is None else f"{value:.3f}"


def signed(value: float | None) -> str:
    """A difference with its sign (a true minus), or a dash."""
    return DASH if value is None else f"{value:+.3f}".replace("-", "\N{MINUS SIGN}")


def epsilon(value: float | None) -> str:
    """An epsilon, rounded up so that print never understates it; a dash for None."""
    if value is None:
        return DASH
    return f"{math.ceil(value * 100 - 1e-6) / 100:.2f}"


def power(value: float | None) -> str:
    """A small probability such as delta: ``1e-5``."""
    return DASH if value is None else f"{value:g}".replace("e-0", "e-")


def plural(number: int, noun: str) -> str:
    """``1 site``, ``7 sites``."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def listed(names: Sequence[str], *, most: int = 8) -> str:
    """Names joined for a sentence; beyond `most` only counted."""
    shown = [printable(name) for name in names[:most]]
    if len(names) > most:
        shown.append(f"{len(names) - most} more")
    return shown[0] if len(shown) == 1 else f"{'; '.join(shown[:-1])} and {shown[-1]}"


def quoted(text: str) -> str:
    """A name from outside in quotation marks, safe to show."""
    return f"\N{LEFT DOUBLE QUOTATION MARK}{printable(text)}\N{RIGHT DOUBLE QUOTATION MARK}"


def printable(text: str, *, most: int = 60) -> str:
    """A name from outside, safe to show: no control or direction marks, not endless."""
    shown = inert(text, keep="")
    return shown if len(shown) <= most else shown[: most - 1] + "\N{HORIZONTAL ELLIPSIS}"


def clock_time(seconds: float) -> str:
    """``0:07``, ``12:30`` or ``1:05:00``."""
    whole = max(0, round(seconds))
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


# Of a loss or an error no spread is known. One that falls by less than a hundredth is no result.
_LEAST = 0.01
# Shares of a label that differ less between two sites don't explain much.
_SIDED = 0.2


def verdict(found: Summary) -> list[str]:
    """Sentences for the head of the report and the end of a run, most important first."""
    return [
        *trivial_verdict(found),
        *worth(found),
        *_unfound(found),
        *_progress(found),
        *_scores(found),
        *_left_out(found),
        *probe_verdict(found),
        *site_verdict(found),
        *sides(found),
        *personal_verdict(found),
        *_privacy(found),
    ]


def trivial_verdict(found: Summary) -> list[str]:
    """What is to be said first of a model that is no better than none; else nothing."""
    federated, trivial = found.method("federated"), found.trivial
    rivals = _no_better(found)
    if federated is None or trivial is None or not rivals:
        return []
    if found.metric == LOSS:
        return [
            "The run taught the model next to nothing: its loss on held-out data is "
            f"{_value(federated, found.metric)}, that of the base model as it came "
            f"{_value(trivial, found.metric)}."
        ]
    how = f", counted by {rivals[0].title}" if found.beside and len(rivals) == 1 else ""
    told = _pairs(found, federated.test, trivial.test)
    return [f"The model is no better than no model{how}: {_lower(trivial.title)} has {told}."]


def _no_better(found: Summary) -> tuple[Metric, ...]:
    """The scores by which the model is no better than what needs no training, but for chance."""
    federated, trivial = found.method("federated"), found.trivial
    if federated is None or trivial is None:
        return ()
    metrics, margin, gains = _judged(found), found.margin() or 0.0, {}
    if found.beside is None:
        least = 1.0 if found.metric == LOSS else abs(trivial.test.get(found.metric.key, 0.0))
        margin = _LEAST * least
    for metric in metrics:
        gains[metric] = metric.gain(federated.test, trivial.test)
    return tuple(m for m, gain in gains.items() if gain is not None and gain <= margin)


def _judged(found: Summary) -> tuple[Metric, ...]:
    """The scores by which a model is judged, the one that decides last."""
    return (found.metric,) if found.beside is None else (found.beside, found.metric)


def _pairs(found: Summary, new: Scores, old: Scores) -> str:
    """The scores of a trivial answer, with the model's."""
    return " and ".join(
        f"{metric.title} {score(old.get(metric.key))} (the model {score(new.get(metric.key))})"
        for metric in _judged(found)
    )


def worth(found: Summary) -> list[str]:
    """Whether federating is worth it, and for whom; nothing before there is a result."""
    federated, own, metric = found.method("federated"), found.method("own"), found.metric
    if federated is None or not _known(metric, federated) or metric in _no_better(found):
        return []
    if own is None or not _known(metric, own):
        return [
            "Whether federating is worth it to a site can't be told from this run: no site's own model "
            "was trained beside it."
        ]
    gain = metric.gain(federated.test, own.test) or 0.0
    told = (
        f"on everybody's held-out cases the federated model reaches {metric.title} "
        f"{_value(federated, metric)}, the sites' own models {_value(own, metric)} on average"
    )
    if gain <= 0:
        return [f"Federating is not worth it here: {told}."]
    if gain <= (found.margin() or 0.0):
        return [f"Whether federating is worth it here can't be told from chance: {told}."]
    return [_for_whom(found, told)]


def _for_whom(found: Summary, told: str) -> str:
    """Who gains, where everybody's cases are judged better: all, or those who meet such cases."""
    compared = [row for row in found.by_site if row.gain is not None]
    worse = [row.site for row in compared if _loses(row)]
    if not compared:
        return f"Federating is worth it for a site that meets everybody's kinds of cases: {told}."
    if not worse:
        return (
            f"Federating is worth it for every site: {told}, and on no site's own cases is its own "
            "model better."
        )
    names = "" if len(worse) == len(compared) else f" ({listed(worse)})"
    scores = f"by {found.metric.title} or {found.beside.title} " if found.beside else ""
    return (
        f"Federating is worth it for a site that meets everybody's kinds of cases: {told}. It is not "
        f"for one that only ever meets its own: there the own model is better {scores}at "
        f"{len(worse)} of {plural(len(compared), 'site')}{names}."
    )


def _loses(row: SiteScores) -> bool:
    """Whether any score of a site's own data falls by federating."""
    return (row.gain or 0.0) < 0 or (row.gain_accuracy or 0.0) < 0


def _unfound(found: Summary) -> list[str]:
    federated = found.method("federated")
    missed = [name for name, share in (federated.recall if federated else {}).items() if share == 0]
    if not missed:
        return []
    names = listed([quoted(name) for name in missed])
    return [f"It finds none of the held-out records labelled {names}."]


def _progress(found: Summary) -> list[str]:
    who = plural(len(found.sites), "simulated site")
    if not found.rounds_finished:
        return [f"The run has {who}; no round has finished yet."]
    if len(found.sites_trained) < len(found.sites):
        who = f"{len(found.sites_trained)} of {who}"
    rounds = plural(found.rounds_finished, "round")
    if found.finished:
        return [f"{who} trained one {found.trained} together in {rounds}."]
    return [
        f"This run is not finished: {found.rounds_finished} of {found.rounds_planned} rounds are "
        f"done with {who}, and what follows describes those."
    ]


def _scores(found: Summary) -> list[str]:
    federated, metric = found.method("federated"), found.metric
    if federated is None or metric.key not in federated.test:
        return _interim(found)
    text = f"On all sites' held-out data it reaches a {metric.title} of {_value(federated, metric)}"
    parts = [_against(found, key, words) for key, words in _RIVALS]
    compared = [part for part in parts if part]
    return [f"{text}: {'; '.join(compared)}." if compared else f"{text}."]


_RIVALS = (
    ("majority", "{trivial} ({score})"),
    ("base", "{trivial} ({score})"),
    ("own", "a site's own data alone (mean over sites {score})"),
    ("pooled", "training on all records pooled ({score})"),
)


def _left_out(found: Summary) -> list[str]:
    """Whoever is not in the scores, and why."""
    refused = tuple(f"{site} ({code})" for site, code in found.left_out.items() if code)
    empty = tuple(site for site, code in found.left_out.items() if not code)
    told = []
    if refused:
        told.append(f"{listed(refused)} refused to join: neither in the model nor in its scores.")
    if empty:
        have = "has" if len(empty) == 1 else "have"
        told.append(
            f"{listed(empty)} {have} no record in the test data: not in the scores on them."
        )
    if not found.test_held_out:
        told.append("There are no test scores: no test data were held out (data.test_share = 0).")
    return told


def _interim(found: Summary) -> list[str]:
    last = found.last_score
    if last is None or found.metric.key not in last:
        return []
    return [
        f"After round {last['round']} the simulator's own view of the {last['split']} data gives a "
        f"{found.metric.title} of {score(last[found.metric.key])}."
    ]


def _known(metric: Metric, *rows: MethodRow) -> bool:
    return all(metric.key in row.test for row in rows)


def _value(row: MethodRow, metric: Metric) -> str:
    return score(row.test.get(metric.key))


def _lower(title: str) -> str:
    return title[:1].lower() + title[1:]


def _against(found: Summary, key: str, words: str) -> str:
    federated, rival = found.method("federated"), found.method(key)
    if federated is None or rival is None:
        return ""
    gain = found.metric.gain(federated.test, rival.test)
    if gain is None:
        return ""
    score_of = _value(rival, found.metric)
    named = words.format(score=score_of, trivial=found.needs_no_training[1])
    if abs(gain) < 0.0005:
        return f"level with {named}"
    return f"{abs(gain):.3f} {'better' if gain > 0 else 'worse'} than {named}"


def probe_verdict(found: Summary) -> list[str]:
    """Whether the adapter beats the head-only probe, in words; nothing if there is no probe."""
    federated, probe = found.method("federated"), found.method("probe_federated")
    if federated is None or probe is None or federated.gain_over_probe is None:
        return []
    value, gain = _value(probe, found.metric), federated.gain_over_probe
    if not found.probe_at_same_epsilon:
        return [
            f"The head-only probe reaches {value}, but at another ε: the two can't be compared."
        ]
    under = "at the same ε" if federated.epsilon is not None else "without privacy"
    if gain <= 0:
        return [
            f"LoRA did not beat the head-only probe, which reaches {value} {under} "
            f"({signed(gain)} for LoRA): here the adapter does not pay for itself."
        ]
    margin = found.margin()
    caveat = ", which may be chance" if margin is not None and gain < margin else ""
    return [
        f"LoRA beats the head-only probe, which reaches {value} {under}, by {gain:.3f}{caveat}."
    ]


def site_verdict(found: Summary) -> list[str]:
    """At how many sites the own model is better on the site's own data, by every score there is."""
    compared = [row for row in found.by_site if row.gain is not None]
    if not compared:
        return []
    parts = [_by(found.metric, found.sites_worse, len(compared))]
    if found.beside:
        parts.append(_by(found.beside, found.sites_worse_by_accuracy, len(compared)))
    return [
        "On a site's own held-out data its own model is better than the federated one at "
        f"{', and at '.join(parts)}."
    ]


def _by(metric: Metric, sites: tuple[str, ...], of: int) -> str:
    if not sites:
        return f"none of {plural(of, 'site')} by {metric.title}"
    names = "" if len(sites) == of and of > 1 else f" ({listed(sites)})"
    return f"{len(sites)} of {plural(of, 'site')} by {metric.title}{names}"


def sides(found: Summary) -> list[str]:
    """Why own models may do well at home only: the sites' labels differ."""
    widest = _widest(found)
    rows = [row for row in found.by_site if row.own and row.own_everywhere]
    if widest is None or not any(_loses(row) for row in rows):
        return []
    label, (low, least), (high, most) = widest
    home, away = (_mean(found.metric, rows, part) for part in ("own", "own_everywhere"))
    if home is None or away is None or home <= away:
        return []
    return [
        f"The sites see different sides of the labels: {quoted(label)} is {percent(least)} of the "
        f"held-out records at {low} and {percent(most)} at {high}. An own model may lean on its site's "
        f"mix, so the own models reach {found.metric.title} {home:.3f} on their sites' own cases and "
        f"{away:.3f} on everybody's."
    ]


def _widest(found: Summary) -> tuple[str, tuple[str, float], tuple[str, float]] | None:
    """The label whose share differs most between two sites, with both; None if none differs much."""
    best = None
    for label in dict.fromkeys(name for shares in found.labels.values() for name in shares):
        shares = sorted((of.get(label, 0.0), site) for site, of in found.labels.items())
        (least, low), (most, high) = shares[0], shares[-1]
        if best is None or most - least > best[0]:
            best = most - least, (label, (low, least), (high, most))
    return best[1] if best is not None and best[0] >= _SIDED else None


def _mean(metric: Metric, rows: Iterable[SiteScores], part: str) -> float | None:
    """Mean of a score over sites; None if any lacks it."""
    values = [row.score(part, metric) for row in rows]
    known = [value for value in values if value is not None]
    return fmean(known) if known and len(known) == len(values) else None


def personal_verdict(found: Summary) -> list[str]:
    """What a head of the site's own on the federated adapter is worth at home."""
    rows = [row for row in found.by_site if row.personal and row.own and row.federated]
    personal, own, federated = (
        _mean(found.metric, rows, part) for part in ("personal", "own", "federated")
    )
    if personal is None or own is None or federated is None:
        return []
    gains = [found.metric.gain(row.personal, row.own) or 0.0 for row in rows]
    better = sum(gain > 0 for gain in gains)
    everywhere = _mean(found.metric, rows, "personal_everywhere")
    away = "" if everywhere is None else f", and {everywhere:.3f} on everybody's"
    return [
        "With a head of its own, trained on from the federated one and kept at the site, a site "
        f"reaches {found.metric.title} {personal:.3f} on its own cases on average{away}. On its own "
        f"cases its own model reaches {own:.3f} and the federated one {federated:.3f}; the head of its "
        f"own is better than the own model at {better} of {plural(len(rows), 'site')}."
    ]


def _privacy(found: Summary) -> list[str]:
    facts = found.privacy
    if facts.guarantee == "none" or facts.budget is None:
        return ["The run gives no differential privacy."]
    if facts.guarantee == "coordinator":
        return [f"Privacy: {facts.statement}."]
    if facts.epsilon is None:
        return [f"The plan allows ε = {facts.budget:g}; what has been spent is not known yet."]
    spent = f"ε = {epsilon(facts.epsilon)} at δ = {power(facts.delta)} for {facts.protects}"
    if facts.guarantee == "seeded" or not facts.private:
        return [f"Not private ({facts.statement}): with secret noise it would be {spent}."]
    return [f"Privacy: {spent} (the largest of the sites; the plan allows ε = {facts.budget:g})."]


Facts = Mapping[str, Any]


def attack_sentences(found: Facts | None) -> list[str]:
    """What ``attacks.json`` says, the caveat last; nothing if there were no attacks."""
    if not found:
        return []
    sentences = []
    if found["violated"]:
        sentences.append(
            "VIOLATION: a measured lower bound is above the claimed ε. The noise, the clipping or the "
            "accounting of this installation does not do what it states; don't release anything."
        )
    if found["audit"]:
        sentences.append(_audit(found["audit"], found))
    sentences.append(_membership(found["membership"], found))
    if found["memorisation"]:
        sentences.append(_memorised(found["memorisation"]))
    return [*sentences, found["caveat"]]


def _claim(value: float | None) -> str:
    return "nothing is claimed" if value is None else f"claimed ε = {epsilon(value)}"


def _audit(step: Facts, found: Facts) -> str:
    return (
        f"One step, everybody taking part ({step['canaries']:,} canaries): {_claim(step['claimed'])}, "
        f"measured ε ≥ {epsilon(step['lower_bound'])} at {said_percent(found['confidence'])} confidence "
        f"(≥ {epsilon(step['independent'])} if canaries don't touch each other's scores; "
        f"≥ {epsilon(step['any_mechanism'])} without assuming anything of the mechanism)."
    )


def _membership(run: Facts, found: Facts) -> str:
    return (
        f"The whole run, by membership of {plural(run['canaries'], 'planted record')}: "
        f"{_claim(run['claimed'])}, measured ε ≥ {epsilon(run['lower_bound'])} at "
        f"{said_percent(found['confidence'])} confidence; AUC {run['auc']:.3f} (0.5 is a guess), "
        f"{run['hits']:.1%} found at 1% false alarms."
    )


def _memorised(seen: Facts) -> str:
    return (
        f"Planted secrets: {seen['extracted']} of {seen['secrets']} completed, "
        f"{seen['extracted_unseen']} of those never trained on; exposure "
        f"{seen['exposure']:.2f} bits in the mean, {seen['exposure_unseen']:.2f} of those never trained "
        f"on, among {seen['candidates']} candidates (1.44 is what a model that never saw them has)."
    )
