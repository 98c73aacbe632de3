"""What the attacks on a run found, in sentences: for the terminal and the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from silotune.simulation.wording import epsilon, plural

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
        f"measured ε ≥ {epsilon(step['lower_bound'])} at {found['confidence']:.0%} confidence "
        f"(≥ {epsilon(step['independent'])} if canaries don't touch each other's scores; "
        f"≥ {epsilon(step['any_mechanism'])} without assuming anything of the mechanism)."
    )


def _membership(run: Facts, found: Facts) -> str:
    return (
        f"The whole run, by membership of {plural(run['canaries'], 'planted record')}: "
        f"{_claim(run['claimed'])}, measured ε ≥ {epsilon(run['lower_bound'])} at "
        f"{found['confidence']:.0%} confidence; AUC {run['auc']:.3f} (0.5 is a guess), "
        f"{run['hits']:.1%} found at 1% false alarms."
    )


def _memorised(seen: Facts) -> str:
    return (
        f"Planted secrets: {seen['extracted']} of {seen['secrets']} completed, "
        f"{seen['extracted_unseen']} of those never trained on; exposure "
        f"{seen['exposure']:.2f} bits in the mean, {seen['exposure_unseen']:.2f} of those never trained "
        f"on, among {seen['candidates']} candidates (1.44 is what a model that never saw them has)."
    )
