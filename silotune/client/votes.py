"""The votes of one site's blocks: every candidate trained and scored in every block, and one vote each.

One unit more or less changes one vote and nothing else, to the last bit: a block's units, their side in
it and its randomness follow from the units' own names and the block's number; texts are encoded and go
through the base model with those of their block alone, as the rounding of a batch hangs on all that is
in it; and whatever fails in a block costs candidates of that block their score. Candidates that are
equally good in a block share its vote; so do all of them in a block where none has a score, as it is
empty or could not be computed. Shares are not negative and 1 together at most, so that two votes are
never further apart than two for one candidate each: by the root of 2.

Blocks are small and the choice is for all sites, so a step in a block is made like one of the
federation's: all units of the block take part, for sampling a few of them would be a noise that many
sites do not have, and the sum gets noise in the proportion that the candidate's own has to the sum of
all sites. This noise makes the trial true to life and protects nobody; the one that does is added to
the votes, beside the ledger.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from silotune.client.terms import sigma_for
from silotune.client.trainer import SiteData, TrainableModel, Trainer
from silotune.data.records import SCORED, Records
from silotune.models.adapter import write_adapter
from silotune.models.batching import Encoded
from silotune.models.features import Frozen, compute_frozen
from silotune.models.layout import Vector, laid_out
from silotune.models.scores import metrics_of
from silotune.models.start import start_adapter
from silotune.plan.counted import part_scale
from silotune.plan.plan import Plan, candidates_of
from silotune.plan.voted import blocks_at
from silotune.privacy.noise import noise_for
from silotune.strategies import strategy_for
from silotune.strategies.base import Terms

_log = logging.getLogger(__name__)

Floats = NDArray[np.float64]

_ONE = 1 << 30  # a whole vote

_IN_A_BLOCK: Mapping[str, Any] = {
    "aggregation": None,
    "lora": {"target_modules": "none", "r": 1},
    "data.test_share": 0.0,
    "data.validation_share": 0.0,
    "rounds.min_sites": 1,
    "rounds.evaluate_every": 0,
    "privacy.metrics_share": 0.0,
    "privacy.noise": None,
    "privacy.batch": None,
    "privacy.rate": 1.0,
    "optimizer.site.head_rounds": 0,
}
"""What a plan is in a block: one trainer without messages, that has the head and takes every unit."""


@dataclass(frozen=True, eq=False)
class VoteBlock:
    """The records of a block, encoded by themselves, and what the base model makes of them.

    Attributes
    ----------
    encoded : Encoded
    frozen : Frozen
    unit_of : int64 array [records]
        Dense numbers within the block.
    trained, scored : int64 array
        Places of the records on either side.
    """

    encoded: Encoded
    frozen: Frozen
    unit_of: NDArray[np.int64]
    trained: NDArray[np.int64]
    scored: NDArray[np.int64]


def tried_plans(plan: Plan) -> tuple[Plan, ...]:
    """The candidates of a vote as they are tried in a block."""
    return tuple(candidate.override(_IN_A_BLOCK) for candidate in candidates_of(plan))


def site_votes(
    records: Records,
    plan: Plan,
    *,
    site: str,
    declared_units: int,
    trainable: Callable[[Plan], TrainableModel],
) -> Floats:
    """The sum of the votes of a site's blocks, scaled so that one unit moves it by 1 at most.

    Parameters
    ----------
    records : Records
        Of `silotune.data.records.load_records`, for this plan.
    plan : Plan
        With a vote.
    site : str
        The site's name.
    declared_units : int
        What it declares: how many blocks there are, and how noisy a step is.
    trainable : callable
        Gives the model of a plan.

    Returns
    -------
    float64 array [number of candidates]
    """
    scores = block_scores(
        records, plan, site=site, declared_units=declared_units, trainable=trainable
    )
    whole: NDArray[np.int64] = shares_of(scores).sum(axis=0)
    return whole.astype(np.float64) * (part_scale(plan) / _ONE)


def shares_of(scores: Floats) -> NDArray[np.int64]:
    """Each block's vote [blocks, candidates], in ``1 / _ONE``: whole numbers add up exactly."""
    usable = np.where(np.isnan(scores), -np.inf, scores)
    best = (usable == usable.max(axis=1, keepdims=True)).astype(np.int64)
    shares: NDArray[np.int64] = best * (_ONE // best.sum(axis=1, keepdims=True))
    return shares


def block_scores(
    records: Records,
    plan: Plan,
    *,
    site: str,
    declared_units: int,
    trainable: Callable[[Plan], TrainableModel],
) -> Floats:
    """What each block makes of each candidate [blocks, candidates]; NaN where it could not be tried."""
    blocks = blocks_at(plan, declared_units)
    expected = plan.training_units(declared_units) / blocks * (1.0 - SCORED)
    scores = np.full((blocks, len(candidates_of(plan))), np.nan)
    made: list[VoteBlock | None] = []
    model: TrainableModel | None = None
    pairs = zip(candidates_of(plan), tried_plans(plan), strict=True)
    for column, (candidate, tried) in enumerate(pairs):
        if model is None or model.plan.model != tried.model:
            model = trainable(tried)
            made = [_block(records, number, model) for number in range(blocks)]
        model = model.under(tried)
        factor = _realism(plan, candidate, declared_units=declared_units, trained=expected)
        for number, block in enumerate(made):
            if block is not None:
                name = f"{site} block {number}"
                scores[number, column] = _tried(
                    block, model, name=name, units=expected, sigma=factor
                )
        _log.info("candidate %d of %d was tried in %d blocks", column + 1, scores.shape[1], blocks)
    if failed := int(np.isnan(scores).all(axis=1).sum()):
        _log.warning(
            "%d of %d blocks could try no candidate: all share their votes", failed, blocks
        )
    return scores


def _realism(plan: Plan, candidate: Plan, *, declared_units: int, trained: float) -> float:
    """Noise multiplier of a step in a block: the federation's, scaled from its batch to the block's."""
    if not candidate.private:
        return 0.0
    vote, sigma = plan.vote, sigma_for(candidate, declared_units)
    assert vote is not None
    if candidate.privacy.noise == "local":
        sigma *= math.sqrt(candidate.rounds.min_sites)
    whole = candidate.expected_batch(declared_units) * vote.units / declared_units
    return sigma * trained / whole


def _block(records: Records, number: int, model: TrainableModel) -> VoteBlock | None:
    """A block's records, or None if the model can't be shown them."""
    ballots = records.ballots
    assert ballots is not None
    rows = np.flatnonzero(ballots.block == number)
    scored = ballots.scored[rows]
    if not scored.any() or scored.all():
        return None
    try:
        task, tokenizer = model.model.task, model.model.tokenizer
        encoded = task.encode(
            [records.examples[row] for row in rows.tolist()], tokenizer, plan=model.plan
        )
        frozen = compute_frozen(model.model, encoded)
    except Exception:
        _log.exception("a block could not be encoded")
        return None
    return VoteBlock(
        encoded=encoded,
        frozen=frozen,
        unit_of=np.unique(records.unit_of[rows], return_inverse=True)[1].astype(np.int64),
        trained=np.flatnonzero(~scored),
        scored=np.flatnonzero(scored),
    )


def _tried(
    block: VoteBlock, model: TrainableModel, *, name: str, units: float, sigma: float
) -> float:
    """A candidate's score in a block, the higher the better; NaN if it could not be trained."""
    try:
        head = _trained(block, model, name=name, units=units, sigma=sigma)
        return _score(block, model, head)
    except Exception:
        _log.exception("a candidate could not be tried in a block")
        return math.nan


def _trained(
    block: VoteBlock, model: TrainableModel, *, name: str, units: float, sigma: float
) -> Vector:
    """The head that a candidate comes to in a block."""
    plan, layout = model.plan, model.model.layout
    declared = max(1, round(units))
    data = SiteData(
        site=name,
        encoded=block.encoded,
        unit_of=block.unit_of,
        train=block.trained,
        declared_units=declared,
    )
    trainer = Trainer(model, data, sigma=sigma, frozen=lambda: block.frozen, finishes=False)
    strategy = strategy_for(plan, layout=layout)
    terms = Terms(node=1, site=name, declared_units=declared)
    strategy.cohort, head = {1: terms}, start_adapter(layout, plan)
    for number in range(1, plan.rounds.number + 1):
        update = trainer.round(head, number)
        flat = np.asarray(update.flat, dtype=np.float32)
        noise = noise_for(plan.plan.seed, "vote", name, number)
        for span, place in laid_out(layout.spans({"head"})):
            if std := update.missing_noise.get(span.part, 0.0):
                flat[place] = noise.added(flat[place], std)
        strategy.begin(number, head)
        strategy.fold(terms, flat)
        head = strategy.conclude(strategy.finish(head, server_round=number), server_round=number)
    return head


def _score(block: VoteBlock, model: TrainableModel, head: Vector) -> float:
    """By the metric that decides for the task, on the units that the candidate did not see."""
    loaded, plan = model.model, model.plan
    write_adapter(loaded, head)
    total = sum(_counts(block, model))
    metric = plan.task.metrics[0]
    found = metrics_of(plan, np.asarray(total))[metric.key]
    return found if metric.higher_is_better else -found


def _counts(block: VoteBlock, model: TrainableModel) -> Iterator[Floats]:
    loaded, size = model.model, model.plan.privacy.max_physical_batch
    for start in range(0, len(block.scored), size):
        rows: Sequence[int] = block.scored[start : start + size].tolist()
        features = block.frozen.seen(block.encoded, rows, loaded.device)
        yield loaded.task.head_score(loaded.module, features, block.encoded, rows)
