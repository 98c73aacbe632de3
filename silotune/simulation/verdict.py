"""The outcome of a run in plain words, with the numbers that carry it.

The words follow the numbers: where federating or the adapter does not pay, the text says so.
"""

from __future__ import annotations

from silotune.simulation.figures import MethodRow, Metric, Summary
from silotune.simulation.wording import epsilon, listed, plural, power, score, signed


def verdict(found: Summary) -> list[str]:
    """Sentences for the head of the report and the end of a run, most important first."""
    return [
        *_progress(found),
        *_scores(found),
        *_left_out(found),
        *probe_verdict(found),
        *_sites(found),
        *_privacy(found),
    ]


def _progress(found: Summary) -> list[str]:
    who = plural(len(found.sites), "simulated site")
    if not found.rounds_finished:
        return [f"The run has {who}; no round has finished yet."]
    if len(found.sites_trained) < len(found.sites):
        who = f"{len(found.sites_trained)} of {who}"
    if found.finished:
        return [f"{who} trained one adapter together in {plural(found.rounds_finished, 'round')}."]
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
    return [f"{text}: {' and '.join(compared)}." if compared else f"{text}."]


_RIVALS = (
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
        f"{found.metric.title} of {score(last[found.metric.key])}; no baseline has been run."
    ]


def _value(row: MethodRow, metric: Metric) -> str:
    return score(row.test.get(metric.key))


def _against(found: Summary, key: str, words: str) -> str:
    federated, rival = found.method("federated"), found.method(key)
    if federated is None or rival is None:
        return ""
    gain = found.metric.gain(federated.test, rival.test)
    if gain is None:
        return ""
    named = words.format(score=_value(rival, found.metric))
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
            f"The head-only probe reaches {value}, but under another privacy budget: the two can't "
            "be compared."
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


def _sites(found: Summary) -> list[str]:
    compared = [row for row in found.by_site if row.gain is not None]
    if not compared:
        return []
    if not found.sites_worse:
        return [
            f"On its own held-out data, no site of {len(compared)} is better off with its own model."
        ]
    return [
        f"On its own held-out data, federating is worse than the own model at "
        f"{len(found.sites_worse)} of {plural(len(compared), 'site')}: {listed(found.sites_worse)}."
    ]


def _privacy(found: Summary) -> list[str]:
    facts = found.privacy
    if facts.budget is None:
        return ["The run gives no differential privacy."]
    if facts.epsilon is None:
        return [
            f"The plan's privacy budget is ε = {facts.budget:g}; what has been spent is not known yet."
        ]
    spent = f"ε = {epsilon(facts.epsilon)} at δ = {power(facts.delta)} for each {facts.unit}"
    if facts.private:
        return [f"Privacy: {spent} (the largest of the sites; budget ε = {facts.budget:g})."]
    return [f"Not private ({facts.statement}): with secret noise it would be {spent}."]
