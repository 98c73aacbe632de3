"""A whole plan from a few public facts: every number by a rule, and why.

`draft` is what `silotune plan new` writes down. It asks for what only people can know (what is to be
learned, from whom, how private) and takes the rest from what was measured on public data
(docs/accuracy.md). What `silotune.plan.left_out` has a rule for follows from that.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from silotune.plan.document import with_settings
from silotune.plan.left_out import Number, left_out, settings_of
from silotune.plan.plan import Plan
from silotune.plan.tasks import TASKS

FEWEST_ROUNDS = 40
"""Of a slow link: with fewer a head does not come to its end."""

_RATE, _LEAST_RATE = 0.12, 0.01
_MOST_BATCH = 4000  # units a step, of all sites: more average no more noise away than is left
_HOURS = 8.0  # what the exchanges of a run may take over the sites' link
_HEAD_INPUTS = {True: 2048, False: 384}  # cosines, or a small encoder's own features
_ADAPTER_NUMBERS = 500_000  # of a small decoder at rank 8
_LATENCY = 2.0  # seconds a round: two exchanges
_HELD_OUT = 0.3


@dataclass(frozen=True, kw_only=True)
class PlanFacts:
    """What is known in public before a plan is written.

    Attributes
    ----------
    name, purpose, base, sha256, dataset : str
        As in the plan; no `sha256` where the base model is not on this machine.
    task : str
        One of `silotune.plan.tasks.TASKS`.
    labels : tuple of str
        The classes.
    multi_label : bool
        Whether a record may have any number of them.
    target : tuple of float or None
        Least and greatest number that is learned, where it is one.
    units : tuple of int
        Privacy units that each site declares.
    unit : str
        What one is; "record" or, for instance, "patient".
    records_a_unit : int
        The most records that a unit takes part with.
    epsilon : float or None
        None without privacy.
    delta : float or None
        None for a tenth of one over the units of the largest site, 1e-5 at most.
    link : float
        Megabits a second that a site can send.
    max_length : int
        Tokens of a text.
    split_by : str
        "unit", or "group" where texts look alike.
    """

    name: str
    purpose: str
    base: str
    sha256: str | None = None
    task: str
    labels: tuple[str, ...] = ()
    multi_label: bool = False
    target: tuple[float, float] | None = None
    dataset: str
    units: tuple[int, ...]
    unit: str = "record"
    records_a_unit: int = 1
    epsilon: float | None
    delta: float | None = None
    link: float = 100.0
    max_length: int = 128
    split_by: Literal["unit", "group"] = "unit"

    @property
    def trained(self) -> float:
        """Units of all sites that are expected to be trained on."""
        return sum(self.units) * (1.0 - _HELD_OUT)


def draft(facts: PlanFacts) -> tuple[Plan, tuple[Number, ...]]:
    """A plan, and each of its settings with one line on why it is what it is.

    Raises
    ------
    PlanInvalid
        The facts make no plan, such as a classification with one label.
    """
    given = tuple(_numbers(facts))
    written = Plan.from_mapping(with_settings({}, settings_of(given)))
    numbers = left_out(written)
    return written.completed(numbers, source="plan"), (*given, *numbers)


def _numbers(facts: PlanFacts) -> Iterator[Number]:
    for section in (_about, _data, _rounds, _privacy, _aggregation):
        for key, value, why in section(facts):
            if value is not None:
                yield Number(key=key, value=value, why=why)


Lines = Iterator[tuple[str, Any, str]]


def _about(facts: PlanFacts) -> Lines:
    yield "plan.name", facts.name, "run directories are named after it"
    yield "plan.purpose", facts.purpose, "for the people who approve the plan at each site"
    yield "model.base", facts.base, "must be at every site already; nothing is downloaded"
    yield "model.sha256", facts.sha256, "every site starts from these weights"
    yield "model.task", facts.task, "as told"
    if facts.labels:
        yield "model.labels", list(facts.labels), "as told; records with others are left out"
    if facts.multi_label:
        yield "model.multi_label", True, "as told: a record has any number of the labels"
    if facts.target is not None:
        lower, upper = facts.target
        target = {"lower": lower, "upper": upper}
        yield "model.target", target, "as told; records beyond it are left out"


def _data(facts: PlanFacts) -> Lines:
    yield "data.dataset", facts.dataset, "the name in each site's site.toml"
    yield "data.max_length", facts.max_length, "tokens; longer texts are cut"
    yield "data.test_share", 0.2, "held out for the end"
    yield "data.validation_share", 0.1, "held out for choices"
    why = {
        "unit": "a unit is on one side; use 'group' if texts differ by a word",
        "group": "whole groups are on one side: tested on what was never seen",
    }
    yield "data.split_by", facts.split_by, why[facts.split_by]


def _rounds(facts: PlanFacts) -> Lines:
    number, why = rounds_for(facts)
    yield "rounds.number", number, why
    needed = _threshold(len(facts.units))
    yield "rounds.min_sites", needed, f"two thirds of {len(facts.units)} sites: some may be away"
    yield "rounds.local_steps", 1, "a round then equals one step on the pooled records"
    yield "rounds.evaluate_every", max(1, number // 12), "a dozen points of a curve"
    yield "optimizer.server.name", "adam", "one rate suits strong noise and weak; sgd's does not"


def rounds_for(facts: PlanFacts) -> tuple[int, str]:
    """How many rounds, and why: what learning needs, unless the link is slow."""
    wanted = TASKS[facts.task].rounds
    seconds = _LATENCY + 8e-6 * _bytes(facts) / facts.link
    possible = math.floor(_HOURS * 3600 / seconds)
    if possible >= wanted:
        return wanted, "more gained under .005 where it was measured, and each costs an exchange"
    return max(FEWEST_ROUNDS, possible), (
        f"what {_HOURS:g} hours allow at {facts.link:g} Mbit/s, at least {FEWEST_ROUNDS}; "
        f"{wanted} would be better"
    )


def _bytes(facts: PlanFacts) -> float:
    """About what a site moves in a round, both ways."""
    if not TASKS[facts.task].has_head:
        return 2 * 4.0 * _ADAPTER_NUMBERS
    few = len(facts.labels) <= 8 and facts.split_by == "unit"
    return 2 * 4.0 * (_HEAD_INPUTS[few] + 1) * max(1, len(facts.labels))


def _privacy(facts: PlanFacts) -> Lines:
    private = facts.epsilon is not None
    yield (
        "privacy.mode",
        "record" if private else "none",
        "each unit is hidden" if private else "no protection: for records that may be public",
    )
    if private:
        yield "privacy.unit", facts.unit, "whose data is protected as one"
        if facts.unit != "record":
            bound = facts.records_a_unit
            yield "privacy.max_records_per_unit", bound, "a unit with more takes part with these"
        yield "privacy.epsilon", facts.epsilon, "of the whole run, for each unit; as told"
        yield "privacy.delta", *_delta(facts)
    yield "privacy.rate", *_rate(facts)
    if private and not TASKS[facts.task].has_head:
        yield "privacy.clip", 1.0, "lower is less noise and more bias"
    elif private and TASKS[facts.task].each_token:
        clip = {"head": 0.25, "adapter": 0.25}
        yield "privacy.clip", clip, "a text's gradient is a mean over its tokens, and short"
    elif private:
        clip = {"head": 2.0, "adapter": 2.0}
        yield "privacy.clip", clip, "half of the longest gradient that features of length 4 give"
    if private and len(facts.units) >= 3:
        yield "privacy.noise", "shared", "the sum has the noise of pooled training"


def _delta(facts: PlanFacts) -> tuple[float, str]:
    if facts.delta is not None:
        return facts.delta, "as told"
    largest = max(facts.units)
    found = min(1e-5, float(f"{0.1 / largest:.1g}"))
    return found, f"a tenth of one over the {largest:,} units of the largest site, 1e-5 at most"


def _rate(facts: PlanFacts) -> tuple[float, str]:
    """Sampling rate: large, until a step has more units than it can use."""
    bounded = _MOST_BATCH / facts.trained
    if bounded >= _RATE:
        return _RATE, f"each step draws about {_RATE * facts.trained:,.0f} units of all sites"
    rate = float(f"{max(bounded, _LEAST_RATE):.2g}")
    return (
        rate,
        f"about {rate * facts.trained:,.0f} units a step, of all sites: enough for any head",
    )


def _threshold(sites: int) -> int:
    return max(1, math.ceil(2 * sites / 3))


def _aggregation(facts: PlanFacts) -> Lines:
    sites = len(facts.units)
    yield "aggregation.strategy", "fedavg", "one step a round: the mean is exact"
    if sites < 3 or facts.epsilon is None:
        return
    yield "aggregation.secure", True, "the coordinator sees sums over sites, and no update"
    yield "aggregation.cohort", sites, "the sites of a round, at most"
    yield "aggregation.threshold", _threshold(sites), "with fewer a round is void; sizes the noise"
    if 8e-6 * _bytes(facts) / 2 > 10.0 * facts.link:
        yield "aggregation.encoding", "uint16", "half the upload, for a link as slow as this"
