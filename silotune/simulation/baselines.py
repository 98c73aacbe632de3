"""What the federation is compared with: each site alone, pooled records, a head on frozen features.

They use the same trainer, strategy and optimizer as the federation, without messages, and see the
same number of examples in expectation. None of them exists in a deployment.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from silotune.client.runtime import SiteRun
from silotune.client.terms import sigma_for
from silotune.client.trainer import SiteData, Trainer, Vector
from silotune.client.warm import WarmModel
from silotune.data.site import SiteConfig
from silotune.data.splits import Split
from silotune.errors import PrivacyError
from silotune.models.choices import Choices
from silotune.models.features import Frozen
from silotune.models.layout import initial_adapter
from silotune.plan import Plan
from silotune.simulation.program import score
from silotune.strategies import strategy_for
from silotune.strategies.base import Terms

Counts = NDArray[np.float64]
Kind = Literal["federated", "own", "pooled"]


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
        ``federated`` over all sites, ``own`` for the one named by `site`, or ``pooled``.
    sites : tuple of str
        Paths of all site.toml files: every model is scored on everybody's held-out data.
    choices : mapping
        `silotune.models.choices.Choices` as JSON.
    shared : str or None
        Folder where processes share frozen features.
    site : str or None
        For ``own``.
    """

    key: str
    title: str
    plan: str
    kind: Kind
    sites: tuple[str, ...]
    choices: Mapping[str, Any]
    shared: str | None = None
    site: str | None = None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A trained comparison model's counts on each site's test data.

    Attributes
    ----------
    job : Job
        What was trained.
    counts : mapping of site to float64 array
        Additive counts of the task.
    seconds : float
        Training time, loading excluded.
    examples : int
        Records trained on, repetitions counted.
    """

    job: Job
    counts: dict[str, Counts]
    seconds: float
    examples: int


def head_only(plan: Plan) -> Plan:
    """The same plan with every round on frozen features: the probe that LoRA must beat."""
    return plan.override({"optimizer.site.head_rounds": plan.rounds.number})


def in_the_clear(plan: Plan) -> Plan:
    """The same plan without secure aggregation: nothing is sent here, and each adds its own noise."""
    keys = ("secure", "cohort", "threshold", "encoding", "update_bound")
    settings: dict[str, Any] = dict.fromkeys(f"aggregation.{key}" for key in keys)
    return plan.override({**settings, "privacy.noise": None})


def jobs_for(
    plan: Plan,
    sites: Sequence[SiteConfig],
    choices: Mapping[str, Any],
    *,
    shared: Path | None = None,
) -> list[Job]:
    """The comparisons of a plan, longest first."""
    paths = tuple(str(site.folder / "site.toml") for site in sites)
    plan = in_the_clear(plan)
    alone = plan.override({"rounds.min_sites": 1})

    def job(key: str, title: str, of: Plan, kind: Kind, site: str | None = None) -> Job:
        text = of.canonical()
        return Job(
            key=key,
            title=title,
            plan=text,
            kind=kind,
            sites=paths,
            choices=choices,
            shared=None if shared is None else str(shared),
            site=site,
        )

    jobs = [job("pooled", "Pooled records, one trainer", alone, "pooled")]
    declared = {s.name: s.dataset(plan.data.dataset).declared_units for s in sites}
    for site in sorted(declared, key=lambda name: -declared[name]):
        jobs.append(job("own", f"Own records only: {site}", alone, "own", site))
    if plan.model.task == "text_classification":
        probe = head_only(plan)
        jobs.append(job("probe_federated", "Federated head on frozen features", probe, "federated"))
        jobs.append(job("probe_pooled", "Pooled head on frozen features", probe, "pooled"))
    return jobs


def run_jobs(jobs: Sequence[Job], *, workers: int) -> Iterator[Outcome]:
    """Train the comparison models in worker processes; outcomes as they come, in any order."""
    if workers == 1:
        yield from map(run_job, jobs)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_calm) as pool:
        for done in as_completed([pool.submit(run_job, job) for job in jobs]):
            yield done.result()


def _calm() -> None:
    """One thread a process, and no chatter."""
    import torch

    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def run_job(job: Job) -> Outcome:
    """Train one comparison model and score it on every site's test data."""
    plan = Plan.from_canonical(job.plan)
    warm = _warm(json.dumps(dict(job.choices), sort_keys=True), job.shared)
    with tempfile.TemporaryDirectory() as scratch:
        parts = [
            SiteRun(
                SiteConfig.load(Path(path)),
                state=Path(scratch) / str(number),
                plan=plan,
                run=job.key,
                warm=warm,
            )
            for number, path in enumerate(job.sites)
        ]
        trainers = _trainers(job, plan, parts)
        for _, trainer in trainers:
            trainer.prepare()
        started = time.monotonic()
        adapter, examples = federate(plan, trainers)
        seconds = time.monotonic() - started
        frozen = plan.optimizer.site.head_rounds >= plan.rounds.number
        counts = {
            part.site.name: score(part, adapter, split=Split.TEST, frozen=frozen)
            for part in parts
            if len(part.records.rows(Split.TEST))
        }
    return Outcome(job=job, counts=counts, seconds=seconds, examples=examples)


@lru_cache(maxsize=1)
def _warm(choices: str, shared: str | None) -> WarmModel:
    """The process's model: what it made of the records once serves every job."""
    return WarmModel(Choices(**json.loads(choices)), shared=Path(shared) if shared else None)


def _trainers(job: Job, plan: Plan, parts: list[SiteRun]) -> list[tuple[Terms, Trainer]]:
    if job.kind == "pooled":
        return [_pooled(plan, parts)]
    chosen = [part for part in parts if job.site in {None, part.site.name}]
    return [
        (
            Terms(
                node=number,
                site=part.site.name,
                declared_units=part.dataset.declared_units,
            ),
            part.trainer,
        )
        for number, part in enumerate(chosen, start=1)
    ]


def _pooled(plan: Plan, parts: list[SiteRun]) -> tuple[Terms, Trainer]:
    """All sites' records as one site of the size that they declare together."""
    examples, units, train = list[Mapping[str, str]](), list[Any](), list[Any]()
    rows, offset = 0, 0
    for part in parts:
        records = part.records
        units.append(records.unit_of + offset)
        train.append(records.rows(Split.TRAIN) + rows)
        examples += records.examples
        rows, offset = rows + len(records), offset + records.n_units()
    trainable = parts[0].trainable
    declared = sum(part.dataset.declared_units for part in parts)
    data = SiteData(
        site="pooled",
        encoded=trainable.model.task.encode(examples, trainable.model.tokenizer, plan=plan),
        unit_of=np.concatenate(units),
        train=np.concatenate(train),
        declared_units=declared,
    )
    sigma = sigma_for(plan, declared) if plan.private else 0.0
    terms = Terms(node=1, site="pooled", declared_units=declared)

    def frozen() -> Frozen:
        return Frozen.joined(data.encoded, [part.trainer.frozen for part in parts])

    return terms, Trainer(trainable, data, sigma=sigma, frozen=frozen)


def federate(plan: Plan, trainers: Sequence[tuple[Terms, Trainer]]) -> tuple[Vector, int]:
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
    adapter = initial_adapter(layout, plan)
    for number in range(1, plan.rounds.number + 1):
        strategy.begin(number, adapter)
        for terms, trainer in trainers:
            update = trainer.round(adapter, number, clip=strategy.settings().get("clip"))
            if update.missing_noise:
                raise PrivacyError("noise can be shared only in a sum under secure aggregation")
            strategy.fold(terms, np.asarray(update.flat, dtype=np.float32))
        adapter = strategy.finish(adapter, server_round=number)
    return adapter, sum(trainer.records_used for _, trainer in trainers)
