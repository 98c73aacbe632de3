"""What the federation is compared with: each site alone, pooled records, a head on frozen features.

They use the same trainer, strategy and optimizer as the federation, without messages, and see the
same number of examples in expectation. A federated one carries the noise of the federation's own sums,
shared or not. None of them exists in a deployment.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray

from silotune.client.model_cache import LocalTraining, ModelCache
from silotune.client.run_files import ProcessMemory, correlated_sums
from silotune.client.site_run import SiteRun
from silotune.client.terms import sigma_for
from silotune.client.trainer import SiteData, Trainer
from silotune.client.training.base import RoundUpdate, Vector
from silotune.data.declared import own_secret
from silotune.data.records import Records, Split
from silotune.data.site import SiteConfig
from silotune.models.adapter import write_adapter
from silotune.models.batching import Encoded
from silotune.models.choices import Choices
from silotune.models.features import Frozen, features_of
from silotune.models.layout import Layout
from silotune.models.start import start_adapter
from silotune.plan.plan import Plan
from silotune.privacy.noise import noise_for
from silotune.simulation.program import score
from silotune.strategies import method_of, strategy_for
from silotune.strategies.base import Terms
from silotune.trust.vault import Vault

Counts = NDArray[np.float64]
Kind = Literal["federated", "own", "pooled", "personal"]

_SCORE_BATCH = 256


@dataclass(frozen=True, kw_only=True)
class Job:
    """One model to train for comparison.

    Attributes
    ----------
    key, title : str
        Name in results.json and for people.
    plan : str
        Canonical JSON.
    kind : str
        ``federated`` over all sites, ``own`` for the one named by `site`, ``pooled``, or ``personal``:
        a head at every site, trained on from the federation's.
    sites : tuple of str
        Paths of all site.toml files: every model is scored on everybody's held-out data.
    choices : mapping
        `silotune.models.choices.Choices` as JSON.
    shared : str or None
        Folder where processes share frozen features.
    site : str or None
        For ``own``.
    start : bytes or None
        For ``personal``: the federation's adapter, float32.
    states : tuple of str
        The sites' state folders in the run, whose split the comparison uses; none for a new split.
    on : Split
        The held-out records that it is scored on; a search for settings looks at validation records.
    """

    key: str
    title: str
    plan: str
    kind: Kind
    sites: tuple[str, ...]
    choices: Mapping[str, Any]
    shared: str | None = None
    site: str | None = None
    start: bytes | None = None
    states: tuple[str, ...] = ()
    on: Split = Split.TEST


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A trained comparison model's counts on each site's test data.

    Attributes
    ----------
    job : Job
        What was trained.
    counts : mapping of site to float64 array
        Additive counts of the task; of ``personal`` those of each site's own model.
    everywhere : mapping of site to float64 array
        Of ``personal``: counts of each site's model on everybody's test data.
    seconds : float
        Training time, loading excluded.
    examples : int
        Records trained on, repetitions counted.
    """

    job: Job
    counts: dict[str, Counts]
    seconds: float
    examples: int
    everywhere: Mapping[str, Counts] = field(default_factory=dict)


def head_only(plan: Plan) -> Plan:
    """The same plan with every round on frozen features: the probe that LoRA must beat."""
    return plan.override({"optimizer.site.head_rounds": plan.rounds.number})


IN_THE_CLEAR: Mapping[str, Any] = {
    **dict.fromkeys(
        f"aggregation.{key}"
        for key in ("secure", "cohort", "threshold", "encoding", "update_bound")
    ),
    "privacy.noise": None,
}
"""Plan keys to remove: nothing is summed in secret, and each site adds noise of its own."""


def in_the_clear(plan: Plan) -> Plan:
    """The same plan without secure aggregation: for one trainer, whose sums nobody else adds to."""
    return plan.override(IN_THE_CLEAR)


def jobs_for(
    plan: Plan,
    sites: Sequence[SiteConfig],
    choices: Mapping[str, Any],
    *,
    shared: Path | None = None,
    adapter: Vector | None = None,
    states: Sequence[Path] = (),
) -> list[Job]:
    """The comparisons of a plan, longest first; with heads of their own if there is an `adapter`."""
    alone = in_the_clear(plan).override({"rounds.min_sites": 1})

    def job(key: str, title: str, of: Plan, kind: Kind, **more: Any) -> Job:
        return Job(
            key=key,
            title=title,
            plan=of.canonical(),
            kind=kind,
            sites=tuple(str(site.folder / "site.toml") for site in sites),
            choices=choices,
            shared=None if shared is None else str(shared),
            states=tuple(str(state) for state in states),
            **more,
        )

    jobs = [job("pooled", "Pooled records, one trainer", alone, "pooled")]
    declared = {s.name: s.units_for(plan) for s in sites}
    heads = plan.task.pools
    if heads and adapter is not None and plan.aggregation.head == "shared":
        start = np.asarray(adapter, dtype="<f4").tobytes()
        title = "Federated, with a head of one's own"
        jobs.append(job("personal", title, head_only(alone), "personal", start=start))
    for site in sorted(declared, key=lambda name: -declared[name]):
        jobs.append(job("own", f"Own records only: {site}", alone, "own", site=site))
    if heads and not trains_head_only(plan):
        probes: tuple[tuple[str, str, Plan, Kind], ...] = (
            ("probe_federated", "Federated head on frozen features", plan, "federated"),
            ("probe_pooled", "Pooled head on frozen features", alone, "pooled"),
        )
        jobs += [job(key, title, head_only(of), kind) for key, title, of, kind in probes]
    return jobs


def trains_head_only(plan: Plan) -> bool:
    """Whether no round of a plan trains the adapter."""
    return plan.head_rounds >= plan.rounds.number


def run_jobs(jobs: Sequence[Job], *, workers: int) -> Iterator[Outcome]:
    """Train the comparison models in worker processes; outcomes as they come, in any order."""
    if workers == 1:
        yield from map(run_job, jobs)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_calm) as pool:
        with _another_main():
            futures = [pool.submit(run_job, job) for job in jobs]
        for done in as_completed(futures):
            yield done.result()


@contextmanager
def _another_main() -> Iterator[None]:
    """Start processes that don't import the program again which simulates: it may be a plain script."""
    own, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = own


def _calm() -> None:
    """One thread a process, and no chatter."""
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def run_job(job: Job) -> Outcome:
    """Train one comparison model and score it on every site's test data."""
    plan = Plan.from_canonical(job.plan)
    choices = json.dumps(dict(job.choices), sort_keys=True)
    with tempfile.TemporaryDirectory() as scratch:
        parts = _parts(job, plan, models=_models(choices, job.shared), scratch=Path(scratch))
        if job.kind == "personal":
            return _with_own_heads(job, plan, parts)
        trainers = _trainers(job, plan, parts)
        for _, trainer in trainers:
            trainer.prepare()
        started = time.monotonic()
        adapter, examples = federate(plan, trainers)
        seconds = time.monotonic() - started
        frozen = trains_head_only(plan)
        counts = {
            part.site.name: score(
                _local(part), part.at_own_rank(adapter), split=job.on, frozen=frozen
            )
            for part in parts
            if len(_local(part).records.rows(job.on))
        }
    return Outcome(job=job, counts=counts, seconds=seconds, examples=examples)


def _parts(job: Job, plan: Plan, *, models: ModelCache, scratch: Path) -> list[SiteRun]:
    """The sites under a job's plan, with the records that the process has read already."""
    found = []
    for number, path in enumerate(job.sites):
        site = SiteConfig.load(Path(path))
        state = Path(job.states[number]) if job.states else None
        part = SiteRun(
            site,
            state=scratch / str(number),
            plan=plan,
            run=job.key,
            models=models,
            secret=own_secret(state, Vault(state)) if state else None,
        )
        read = (plan.model, plan.data, plan.privacy.unit, plan.private, plan.plan.seed, part.secret)
        key = f"{path} {read!r}"
        if key not in _READ:
            _READ[key] = _local(part).records, _local(part).encoded
        _local(part).records, _local(part).encoded = _READ[key]
        found.append(part)
    return found


_READ: dict[str, tuple[Records, Encoded]] = {}
"""Records and their tokens: the same for all comparisons that a process makes."""


@lru_cache(maxsize=1)
def _models(choices: str, shared: str | None) -> ModelCache:
    """The process's model: what it made of the records once serves every job."""
    return ModelCache(Choices(**json.loads(choices)), shared=Path(shared) if shared else None)


def _local(part: SiteRun) -> LocalTraining:
    """A site's records and model, which are in this process."""
    return cast(LocalTraining, part.training)


def _trainers(job: Job, plan: Plan, parts: list[SiteRun]) -> list[tuple[Terms, Trainer]]:
    if job.kind == "pooled":
        return [_pooled(plan, parts)]
    chosen = [part for part in parts if job.site in {None, part.site.name}]
    return [_trainer(part, node=number) for number, part in enumerate(chosen, start=1)]


def _trainer(
    part: SiteRun, *, node: int, frozen: Callable[[], Frozen] | None = None
) -> tuple[Terms, Trainer]:
    """A site's own trainer. Nothing is released: what it keeps counts at once, in this process."""
    declared = part.dataset.declared_units
    terms = Terms(node=node, site=part.site.name, declared_units=declared)
    return terms, _local(part).alone(frozen=frozen)


def _pooled(plan: Plan, parts: list[SiteRun]) -> tuple[Terms, Trainer]:
    """All sites' records as one site of the size that they declare together."""
    examples, units, train = list[Mapping[str, str]](), list[Any](), list[Any]()
    turns = [turns for part in parts if (turns := _local(part).records.turns) is not None]
    rows, offset = 0, 0
    for part in parts:
        records = _local(part).records
        units.append(records.unit_of + offset)
        train.append(records.rows(Split.TRAIN) + rows)
        examples += records.examples
        rows, offset = rows + len(records), offset + records.n_units()
    trainable = _local(parts[0]).trainable
    declared = sum(part.dataset.declared_units for part in parts)
    data = SiteData(
        site="pooled",
        encoded=trainable.model.task.encode(examples, trainable.model.tokenizer, plan=plan),
        unit_of=np.concatenate(units),
        train=np.concatenate(train),
        declared_units=declared,
        turns=np.concatenate(turns) if turns else None,
    )
    sigma = sigma_for(plan, declared) if plan.private else 0.0
    terms = Terms(node=1, site="pooled", declared_units=declared)

    def frozen() -> Frozen:
        return Frozen.joined(data.encoded, [_local(part).trainer.frozen for part in parts])

    return terms, Trainer(trainable, data, sigma=sigma, frozen=frozen)


def _with_own_heads(job: Job, plan: Plan, parts: list[SiteRun]) -> Outcome:
    """Each site's head trained on from the federation's, on its own records, in every round.

    The adapter stays as the federation left it, so its features of all records are computed once.
    """
    assert job.start is not None
    start = np.frombuffer(job.start, dtype="<f4")
    adapted = {part.site.name: _features(part, start) for part in parts}
    tested = [part for part in parts if len(_local(part).records.rows(job.on))]
    counts: dict[str, Counts] = {}
    everywhere: dict[str, Counts] = {}
    started, examples = time.monotonic(), 0
    for part in parts:
        name = part.site.name
        own, used = _own_head(part, plan, adapted[name], start=start)
        found = {other.site.name: _head_counts(other, own, adapted, on=job.on) for other in tested}
        counts |= {name: found[name]} if name in found else {}
        everywhere |= {name: np.sum([*found.values()], axis=0)} if found else {}
        examples += used
    return Outcome(
        job=job,
        counts=counts,
        seconds=time.monotonic() - started,
        examples=examples,
        everywhere=everywhere,
    )


def _own_head(part: SiteRun, plan: Plan, adapted: Frozen, *, start: Vector) -> tuple[Vector, int]:
    """The federation's adapter with a head that one site trained on, and the records that took."""
    own = _trainer(part, node=1, frozen=lambda: adapted)
    return federate(plan, [own], start=start)


def _features(part: SiteRun, adapter: Vector) -> Frozen:
    """Features of a site's records under an adapter."""
    local = _local(part)
    model, encoded = local.trainable.model, local.encoded
    write_adapter(model, adapter)
    inputs = local.trainer.inputs
    found = features_of(model, encoded, lambda rows: inputs([*map(int, rows)]), batch=_SCORE_BATCH)
    return Frozen(found, None)


def _head_counts(
    part: SiteRun, adapter: Vector, adapted: Mapping[str, Frozen], *, on: Split
) -> Counts:
    """Counts of an adapter's head on a site's held-out records."""
    model, rows = _local(part).trainable.model, _local(part).records.rows(on)
    write_adapter(model, adapter)
    features = adapted[part.site.name].seen(_local(part).encoded, rows, model.device)
    return model.task.head_score(model.module, features, _local(part).encoded, rows)


def federate(
    plan: Plan, trainers: Sequence[tuple[Terms, Trainer]], *, start: Vector | None = None
) -> tuple[Vector, int]:
    """Run all rounds over some trainers, without messages.

    Returns
    -------
    adapter : float32 array
        The final adapter.
    records : int
        Records trained on by all sites, repetitions counted.
    """
    layout = trainers[0][1].layout
    strategy = strategy_for(plan, layout=layout)
    strategy.cohort = {terms.node: terms for terms, _ in trainers}
    adapter = start_adapter(layout, plan) if start is None else start
    shares = {terms.site: _Share(plan, layout=layout, site=terms.site) for terms, _ in trainers}
    for number in range(1, plan.rounds.number + 1):
        strategy.begin(number, adapter)
        for terms, trainer in trainers:
            update = trainer.round(adapter, number, clip=strategy.settings().get("clip"))
            flat = shares[terms.site].added(update, number)
            strategy.fold(terms, np.asarray(flat, dtype=np.float32))
        adapter = strategy.conclude(
            strategy.finish(adapter, server_round=number), server_round=number
        )
    return adapter, sum(trainer.records_used for _, trainer in trainers)


class _Share:
    """A site's share of the noise, which a federation adds in whole numbers."""

    def __init__(self, plan: Plan, *, layout: Layout, site: str) -> None:
        self._plan, self._layout, self._site = plan, layout, site
        self._rows = ProcessMemory(kept=plan.privacy.bands - 1)

    def added(self, update: RoundUpdate, number: int) -> NDArray[Any]:
        """The update with the share of a round, if it lacks one."""
        if not update.missing_noise:
            return update.flat
        return correlated_sums(
            update.flat,
            number,
            plan=self._plan,
            spans=self._layout.spans(method_of(self._plan).trained(self._plan, number)),
            missing=update.missing_noise,
            memory=self._rows,
            noise=noise_for(self._plan.plan.seed, "baseline share", self._site, number),
        )
