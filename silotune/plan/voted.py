"""A vote among fixed candidates: plans that differ in a few settings, what excludes them, and words.

Each site divides its training units into disjoint blocks. In every block each candidate is trained on
one part of the units and scored on the others, and the block votes for the best: *sample and aggregate*
(Nissim, Raskhodnikova, Smith, STOC 2007) inside a site, where DP-Hype (arXiv 2510.04902) has one vote a
site and hides whole sites. A unit is in one block and can turn that one vote, however many candidates
there are and however long they train, so the whole search is one Gaussian release of sensitivity
sqrt(2). How many votes there are follows from public numbers alone, and a block without units votes too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from silotune.errors import PlanInvalid
from silotune.plan.counted import fixed_for_sums
from silotune.plan.document import with_settings
from silotune.plan.explain import explain
from silotune.plan.sections import OptimizerSection, Sections

VOTES = "votes"
"""The word that a site's policy has among its tasks, beside the task itself, to take part in votes."""

VARIED = (
    "optimizer.", "rounds.number", "privacy.rate", "privacy.batch", "privacy.clip",
    "model.head_features", "model.feature_scale", "model.class_weights",
)  # fmt: skip
"""How the keys begin that candidates may differ in."""

MOST_STEPS = 20_000
"""Of all candidates together, in each block: what a site computes for a vote is bounded."""


def blocks_at(plan: Sections, declared_units: int) -> int:
    """How many blocks a site has that declares so many units: one at least."""
    assert plan.vote is not None
    return max(1, int(plan.training_units(declared_units) / plan.vote.block_units))


def candidate_tables(plan: Sections) -> tuple[dict[str, Any], ...]:
    """The plan of each candidate, as tables. Raises `PlanInvalid` where a key lies inside a value."""
    assert plan.vote is not None
    return tuple(with_settings(base_tables(plan), one) for one in plan.vote.candidates)


def base_tables(plan: Sections) -> dict[str, Any]:
    """The plan that all candidates are of, as tables."""
    assert plan.vote is not None
    written = plan.written()
    made = _said({key: written[key] for key in ("plan", "model", "lora", "data")})
    made |= _said(written["vote"]["plan"])
    made["plan"]["name"] = made.pop("name")
    return made


def _said(tables: Mapping[str, Any]) -> dict[str, Any]:
    """Tables without what is left open."""
    return {
        key: _said(value) if isinstance(value, dict) else value
        for key, value in tables.items()
        if value is not None
    }


def vote_tables(
    plan: Sections,
    candidates: Sequence[Mapping[str, Any]],
    *,
    epsilon: float,
    units: int,
    **more: Any,
) -> dict[str, Any]:
    """A plan for a vote among candidates of a plan that trains, as tables.

    Parameters
    ----------
    plan : Sections
        The plan that is to be trained afterwards. Candidates train its head alone, in all rounds.
    candidates : sequence of mapping
        What each has otherwise, by dotted keys.
    epsilon : float
        What the vote costs each unit.
    units : int
        That all sites declare together.
    **more
        Other keys of ``[vote]``.
    """
    written = plan.model_dump(mode="json", exclude_none=True)
    about, rounds, privacy = written["plan"], written["rounds"], written["privacy"]
    optimizer = written["optimizer"]
    optimizer["site"]["head_rounds"] = 0  # there is no adapter: all rounds are
    training = {"rounds": rounds, "optimizer": optimizer, "privacy": privacy}
    aggregation = written["aggregation"]
    kept = ("secure", "cohort", "threshold", "encoding")
    return {
        "plan": {
            **about,
            "name": f"{about['name'][:57]}-vote",
            "purpose": f"Choose settings of the plan {about['name']} by votes of the sites' records.",
        },
        "model": written["model"],
        "lora": {"target_modules": "none", "r": 1},
        "data": written["data"],
        "rounds": {"number": 1, "min_sites": rounds["min_sites"], "deadline": rounds["deadline"]},
        "privacy": {
            **{key: privacy[key] for key in ("unit", "delta", "noise") if key in privacy},
            "mode": "record", "epsilon": epsilon, "clip": 1.0, "rate": 1.0,
        },
        "aggregation": {key: aggregation[key] for key in kept if key in aggregation},
        "vote": {
            "units": units,
            **more,
            "plan": {"name": about["name"], **training, "aggregation": aggregation},
            "candidates": [dict(one) for one in candidates],
        },
    }  # fmt: skip


def vote_conflicts(plan: Sections, conflicts: Callable[[Sections], list[str]]) -> list[str]:
    """What a vote excludes, and what is wrong with its candidates.

    Parameters
    ----------
    plan : Sections
        With or without a vote.
    conflicts : callable
        Those of a candidate's plan.
    """
    if plan.vote is None:
        return []
    return [*_excluded(plan), *_of_candidates(plan, conflicts)]


def _excluded(plan: Sections) -> Iterator[str]:
    assert plan.vote is not None
    yield from fixed_for_sums(plan, when="in a vote")
    if not plan.task.pools:
        yield f"vote: {plan.model.task} has no head to train alone, which is what candidates train"
        return
    if plan.optimizer.written() != OptimizerSection().written():
        yield "optimizer: the vote itself trains nothing; it belongs under vote.plan"
    if plan.lora.start is not None:
        yield "lora.start: candidates train a head alone, from its start; remove it"
    if plan.privacy.unit != plan.vote.plan.privacy.unit:
        yield "vote.plan.privacy.unit: must be privacy.unit, whose records a block has whole"


def _of_candidates(plan: Sections, conflicts: Callable[[Sections], list[str]]) -> Iterator[str]:
    """What is wrong with candidates, told once for all that it is wrong with."""
    assert plan.vote is not None
    numbers, texts, steps = dict[str, list[int]](), set[str](), 0
    for number, settings in enumerate(plan.vote.candidates, start=1):
        found, lines = _candidate(plan, settings, conflicts)
        if found is not None:
            text = json.dumps(found.model_dump(mode="json"), sort_keys=True)
            lines += ["the same as an earlier one"] * (text in texts)
            texts.add(text)
            steps += found.steps
        for line in lines:
            numbers.setdefault(line, []).append(number)
    for line, those in numbers.items():
        place = "number" if len(those) == 1 else "numbers"
        yield f"vote.candidates: {place} {', '.join(map(str, those))}: {line}"
    if steps > MOST_STEPS:
        yield f"vote.candidates: {steps:,} steps together; at most {MOST_STEPS:,} in a block"


def _candidate(
    plan: Sections, settings: Mapping[str, Any], conflicts: Callable[[Sections], list[str]]
) -> tuple[Sections | None, list[str]]:
    """A candidate's plan, if it is one, and what is wrong with it."""
    if other := [key for key in settings if not key.startswith(VARIED)]:
        return None, [f"{other[0]} can't be voted on; candidates differ in {', '.join(VARIED)}"]
    lines = []
    if "optimizer.site.adapter_lr" in settings:
        lines.append("optimizer.site.adapter_lr: candidates train a head alone")
    if None in settings.values():
        lines.append("a key has no value; name what the candidate has instead")
    try:
        made = with_settings(base_tables(plan), settings)
        found = Sections.model_validate_json(json.dumps(made))
    except ValidationError as exc:
        return None, [*lines, *explain(exc, Sections)]
    except PlanInvalid as exc:
        return None, [*lines, exc.detail]
    return found, [*lines, *conflicts(found), *_untrainable(found)]


def _untrainable(candidate: Sections) -> Iterator[str]:
    """What can't be tried in a block of a few units, quickly and as it would be in earnest."""
    if candidate.head_rounds < candidate.rounds.number:
        yield (
            "trains an adapter; candidates train a head alone, on features computed once: "
            "lora.target_modules = 'none'"
        )
    if candidate.privacy.bands > 1:
        yield "privacy.bands: must be 1 in a vote, where the noise of each step is drawn anew"
    if candidate.rounds.sites is not None:
        yield "rounds.sites: not in a vote, which counts on the noise of all sites"
    if not candidate.sends_sums:
        yield "rounds.local_steps: must be 1 in a vote"
    if candidate.aggregation.strategy != "fedavg" or candidate.aggregation.head != "shared":
        yield "aggregation: must be 'fedavg' with a shared head in a vote"
    if candidate.privacy.mode == "site":
        yield "privacy.mode: 'record' or 'none' in a vote; blocks are of units, not of sites"


def settings_in_words(settings: dict[str, Any]) -> str:
    """A candidate's settings in a line."""
    told = (f"{key.removeprefix('optimizer.')} {_short(value)}" for key, value in settings.items())
    return ", ".join(told) or "as the plan is"


def _short(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else json.dumps(value)


def vote_in_words(plan: Sections) -> str:
    """What is done and released, for who must approve it."""
    vote, unit = plan.vote, plan.privacy.unit
    assert vote is not None
    listed = "; ".join(
        f"{number}: {settings_in_words(settings)}"
        for number, settings in enumerate(vote.candidates, start=1)
    )
    whose = "all sites together" if plan.aggregation.secure else "each site by itself"
    return (
        f"Settings of the plan '{vote.plan.name}' are chosen by votes. Each site divides its training "
        f"{unit}s into blocks of about {vote.block_units}. In each block a head is trained by every one "
        f"of {len(vote.candidates)} candidates on a part of the {unit}s and scored on the others, and "
        f"the block votes for the best. Released for {whose}: the number of votes of each candidate, "
        f"with noise. One {unit} is in one block and can change one vote. No model, score or record "
        f"leaves. The candidates: {listed}."
    )
