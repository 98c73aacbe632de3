"""A one-run audit of a plan's private step, in gradient space, by the run's own code.

A small federation of its own takes one step. Its sites are those of a run (`SiteRun`: sampling,
clipping, noise, gate, ledger, certificate), its rounds those of a coordinator, with secure aggregation
and shared noise if the plan has them. Only the model differs: linear layers on which canary i
has the gradient ``e_i``, ten clip norms long, in every part of the adapter. Each canary is in with
probability 1/2; its coordinate of the released sum says whether it was. With a rate of 1 the claim is
exactly that of one Gaussian: what the plan's noise multiplier is worth in a step, before sampling hides
who took part.

The noise is added where the plan's is: to the sums beside the ledger, or in the training, if that goes
on from noisy sums. Of such a plan two local steps are audited, which cost together what one of its own
costs. Of noise that is correlated over rounds what a block of rounds costs is audited, in one round with
noise of its own.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from silotune.client.app import build_client_app
from silotune.client.model_cache import LocalTraining, ModelCache
from silotune.client.site_run import SiteRun
from silotune.client.terms import missing_noise, sigma_for
from silotune.client.trainer import TrainableModel
from silotune.client.training.base import TrainingJob, Vector
from silotune.data.records import Records, Split
from silotune.data.site import SiteConfig
from silotune.models.batching import Encoded, Rows
from silotune.models.choices import Choices
from silotune.models.layout import ArrayEntry, Layout
from silotune.models.task import LoadedModel
from silotune.plan.plan import Plan
from silotune.privacy.accounting import epsilon
from silotune.privacy.attacks.bounds import Coins, Scores
from silotune.privacy.events import gaussian_event
from silotune.rounds.rounds import RoundLoop
from silotune.rounds.run_directory import RunDirectory
from silotune.simulation.grid import WorkerGrid
from silotune.simulation.pool import SiteSlot
from silotune.simulation.program import enrol

CANARIES = 10_000

_REACH = 10.0  # of a canary's raw gradient, in clip norms: clipping has work to do
_MOST_SITES = 5
_PARTS = {"canary.lora_B.weight": "adapter", "head.weight": "head"}
_RUN = "audit"


@dataclass(frozen=True, kw_only=True)
class StepScores:
    """What an audited step gave away.

    Attributes
    ----------
    scores : float64 array [canaries]
        In standard deviations of the noise that the plan asks for (of the gradient, without noise).
    coins : bool array [canaries]
        Which canaries were in.
    claimed : float or None
        Epsilon of the step by the sites' own certificates; None without privacy.
    mu : float
        Distance of the scores of canaries that are in from the others', as claimed.
    sites : int
        Whose updates were summed.
    """

    scores: Scores
    coins: Coins
    claimed: float | None
    mu: float
    sites: int


def step_scores(
    plan: Plan, sites: Sequence[SiteConfig], *, canaries: int = CANARIES, seed: int | None = None
) -> StepScores:
    """Take one step with planted canaries and score each of them.

    Parameters
    ----------
    plan : Plan
        Without privacy, or with privacy for each unit.
    sites : sequence of SiteConfig
        Those of the run: the least noise of any of them is audited.
    canaries : int
        How many.
    seed : int, optional
        Of the coins; secret without one. The noise is the plan's.
    """
    audited = step_plan(plan, sites)
    count = audited.aggregation.threshold or 1
    coins = np.random.default_rng(seed).random(canaries) < 0.5
    with tempfile.TemporaryDirectory(prefix="silotune-audit-") as folder:
        adapter, claimed = _play(audited, sites[0], coins, count=count, folder=Path(folder))
    declared = sites[0].units_for(plan)
    units = count * audited.expected_batch(declared)
    return _scored(audited, adapter * -units, coins, claimed=claimed, sites=count)


def step_plan(plan: Plan, sites: Sequence[SiteConfig]) -> Plan:
    """One step of the plan's mechanism, or two that cost as much, in which everybody takes part."""
    secure = plan.aggregation.secure
    count = max(3, min(plan.aggregation.threshold or 3, _MOST_SITES)) if secure else None
    in_training = plan.per_unit and not missing_noise(plan, ("A", "B", "head"), sigma=1.0)
    settings: dict[str, Any] = {
        "rounds.number": 1,
        "rounds.min_sites": count or 1,
        "rounds.local_steps": 2 if in_training else 1,
        "rounds.evaluate_every": 0,
        "lora.target_modules": None,  # head and adapter, whatever the plan trains
        "optimizer.site": {
            "adapter_lr": 1.0,
            "head_lr": 1.0,
            "warmup_share": 0.0,
            "schedule": "constant",
            "local": "sgd",
        },
        "optimizer.server": {"name": "sgd", "lr": 1.0, "momentum": 0.0},
        "privacy.rate": 1.0,
        "privacy.batch": None,
        "privacy.bands": None,
        "privacy.band_weights": None,
        "privacy.metrics_share": 0.0,
        "aggregation": {"strategy": "fedavg", "encoding": plan.aggregation.encoding},
    }
    if secure:
        bound = None if plan.private else 2.0 * plan.privacy.max_records_per_unit
        parts = {"secure": True, "cohort": count, "threshold": count, "update_bound": bound}
        settings["aggregation"] |= {key: value for key, value in parts.items() if value}
    if plan.private:
        assert plan.privacy.delta is not None  # validated with the plan
        units = [site.units_for(plan) for site in sites]
        sigma = min(sigma_for(plan, each) for each in units)
        settings["privacy.epsilon"] = epsilon([gaussian_event(sigma)], delta=plan.privacy.delta)
    return plan.override(settings)


def _play(
    plan: Plan, like: SiteConfig, coins: Coins, *, count: int, folder: Path
) -> tuple[Vector, float | None]:
    """The adapter after the step, from zero, and the largest epsilon that a site certifies."""
    shares = np.array_split(np.flatnonzero(coins), count)
    names = [f"site{number}" for number in range(count)]
    configs = [_site(like, plan, name) for name in names]
    states = [folder / name for name in names]
    for state in states:
        state.mkdir(mode=0o700)
    program = _Canaries(plan, configs, states, shares, canaries=len(coins))
    directory = RunDirectory.create(folder, "audit", plan_toml="")
    slots = [SiteSlot(name) for name in names]
    _programs[str(folder)] = program
    try:
        with WorkerGrid(f"{__name__}:program_of", {"at": str(folder)}, slots, workers=0) as grid:
            grid.wait_until_ready()
            adapter = RoundLoop(plan=plan, run=_RUN, grid=grid, store=directory).execute()
        bodies = [site.finish() for site in program.runs]
    finally:
        del _programs[str(folder)]
    stated = [body.exposures[0].epsilon for body in bodies if body is not None]
    return adapter, max(stated) if stated else None


def _scored(
    plan: Plan, total: Vector, coins: Coins, *, claimed: float | None, sites: int
) -> StepScores:
    """The best linear score of each canary, given the noise that the plan asks for."""
    steps, stds = plan.rounds.local_steps, [1.0 for _ in _sizes(plan)]
    lengths = [_raw(plan, part) * _records(plan) for part in _sizes(plan)]
    if plan.private:
        (sigma,) = {sigma_for(plan, len(coins))}
        local = plan.privacy.noise == "local"
        scale = math.sqrt(sites * steps) if local else 1.0
        stds, lengths = [], []
        for part in _sizes(plan):
            norm, share = plan.privacy.clipping.of(part)
            stds.append(scale * sigma * norm / math.sqrt(share))
            lengths.append(norm * steps)
        if not plan.privacy.clipping.grouped:  # one norm over both parts
            lengths = [length / math.sqrt(len(lengths)) for length in lengths]
    signals = [length / std for length, std in zip(lengths, stds, strict=True)]
    mu = math.hypot(*signals)
    parts = np.split(total.astype(np.float64), len(stds))
    scores = np.sum(
        [part / std * signal / mu for part, std, signal in zip(parts, stds, signals, strict=True)],
        axis=0,
    )
    return StepScores(scores=scores, coins=coins, claimed=claimed, mu=mu, sites=sites)


def _sizes(plan: Plan) -> tuple[str, ...]:
    """The parts of the plan's adapter: not every task has a head."""
    return ("adapter", "head") if plan.task.has_head else ("adapter",)


def _raw(plan: Plan, part: str) -> float:
    """Length of a canary record's gradient in a part."""
    return _REACH * plan.privacy.clipping.of(part).norm if plan.private else 1.0


def _records(plan: Plan) -> int:
    """Records of a canary: two where a unit may have them, to see that they are clipped as one."""
    return min(2, plan.privacy.max_records_per_unit)


def _site(like: SiteConfig, plan: Plan, name: str) -> SiteConfig:
    """A site of the audit: nothing to refuse, no limit of its own, and the records are canaries."""
    terms = like.dataset(plan.data.dataset)
    budget = terms.budget
    if budget and plan.private:
        limits = {"epsilon": 2.0 * cast(float, plan.privacy.epsilon), "delta": plan.privacy.delta}
        budget = budget.model_copy(update={**limits, "colluding_epsilon": None})
    offered = terms.model_copy(update={"budget": budget})
    changes = {"name": name, "policy": None, "datasets": {plan.data.dataset: offered}}
    return like.model_copy(update=changes)


class _CanaryModel(nn.Module):
    """One linear output a part, summed: the gradient of a record is its input."""

    prefix = None

    def __init__(self, parts: Sequence[str], size: int) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({part: nn.Linear(size, 1, bias=False) for part in parts})
        names = {part: name for name, part in _PARTS.items()}
        self.trained = {
            names[part]: cast(nn.Linear, layer).weight for part, layer in self.layers.items()
        }

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        outputs = [layer(batch[part]).squeeze(1) for part, layer in self.layers.items()]
        return torch.stack(outputs).sum(0)


class _CanaryTask:
    """Records that are canaries: the target of a row is the number of its canary."""

    def __init__(self, plan: Plan, size: int) -> None:
        self._lengths = {part: _raw(plan, part) for part in _sizes(plan)}
        self._size = size

    def collate(self, encoded: Encoded, rows: Rows, device: torch.device) -> dict[str, Tensor]:
        """The input of each part: the canary's coordinate."""
        chosen = torch.from_numpy(encoded.targets[np.asarray(rows)])
        inputs = nn.functional.one_hot(chosen, self._size).float().to(device)
        return {part: length * inputs for part, length in self._lengths.items()}

    def losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """The outputs themselves."""
        return cast(Tensor, model(batch))


class _AuditedTraining(LocalTraining):
    """Records that are canaries, and a model that is made for them."""

    def __init__(
        self, job: TrainingJob, models: ModelCache, canaries: NDArray[np.int64], size: int
    ) -> None:
        super().__init__(job, models)
        self._canaries, self._size = canaries, size

    @cached_property
    def trainable(self) -> TrainableModel:
        """The canaries' model."""
        module = _CanaryModel(_sizes(self.job.plan), self._size)
        entries = [
            ArrayEntry(n, tuple(p.shape), cast(Any, _PARTS[n])) for n, p in module.trained.items()
        ]
        loaded = LoadedModel(
            module=cast(Any, module),
            tokenizer=None,
            task=cast(Any, _CanaryTask(self.job.plan, self._size)),
            layout=Layout(tuple(entries)),
            device=torch.device("cpu"),
            dtype=torch.float32,
            attention="none",
            description="canaries",
            plan=self.job.plan,
        )
        return TrainableModel(self.job.plan, loaded)

    @cached_property
    def records(self) -> Records:
        """Each canary's records, to train on."""
        units = np.repeat(np.arange(len(self._canaries), dtype=np.int64), _records(self.job.plan))
        return Records([{}] * len(units), units, np.full(len(units), Split.TRAIN, dtype=np.uint8))

    @cached_property
    def encoded(self) -> Encoded:
        """One token a record; the target is the canary."""
        targets = self._canaries[self.records.unit_of]
        return Encoded.of([[0]] * len(targets), targets.tolist(), 0)


class _Canaries:
    """The sites of an audit as a program of the simulation's grid."""

    def __init__(
        self,
        plan: Plan,
        sites: Sequence[SiteConfig],
        states: Sequence[Path],
        shares: Sequence[NDArray[np.int64]],
        *,
        canaries: int,
    ) -> None:
        keys = enrol(list(sites), list(states)) if plan.aggregation.secure else {}
        roster = {name: bytes.fromhex(key) for name, key in keys.items()}
        choices = Choices(device="cpu", dtype="float32", attention="eager")
        self.runs = [
            SiteRun(
                site,
                state=state,
                plan=plan,
                run=_RUN,
                models=ModelCache(
                    choices, kind=partial(_AuditedTraining, canaries=share, size=canaries)
                ),
                to_disk=False,
                roster=roster,
            )
            for site, state, share in zip(sites, states, shares, strict=True)
        ]
        self.client_app = build_client_app(
            lambda context, plan, run: self.runs[int(context.node_config["partition-id"])]
        )

    def inspect(
        self, site_index: int, request: dict[str, Any], arrays: dict[str, NDArray[Any]]
    ) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """Nothing is asked."""
        raise NotImplementedError


_programs: dict[str, _Canaries] = {}  # of audits in progress; the grid runs them in this process


def program_of(payload: Mapping[str, Any]) -> _Canaries:
    """The grid's factory."""
    return _programs[payload["at"]]
