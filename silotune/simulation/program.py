"""The sites that one simulation process plays, and the simulator's own view of them.

The ClientApp here is the one of a deployment. What stands beside it, `SimulatedSites.inspect`, never
exists in one: it scores adapters on held-out data that no site would let out. `CanarySites` are the
sites of an attacked run, with canaries among their records.
"""

from __future__ import annotations

import resource
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
from flwr.app import Context
from numpy.typing import NDArray

from silotune.client.app import build_client_app
from silotune.client.model_cache import LocalTraining, ModelCache
from silotune.client.site_run import SiteRun
from silotune.client.together import most_at_once
from silotune.client.training.base import Vector
from silotune.client.training.bounds import table_of
from silotune.client.training.launcher import Launcher
from silotune.client.training.process import TrainerProcesses
from silotune.data.records import Records, Split
from silotune.data.site import SiteConfig
from silotune.errors import RunError
from silotune.models.adapter import save_adapter, write_adapter
from silotune.models.batching import batches
from silotune.models.choices import Choices
from silotune.plan.plan import Plan
from silotune.privacy.attacks.canaries import Example
from silotune.simulation.joint_answers import JointAnswers, SimulatedTraining
from silotune.trust.identity import load_or_create

Arrays = dict[str, NDArray[Any]]

_CANARY_BATCH = 64
_FILES_A_SITE, _OTHER_FILES = 2, 1024  # a ledger, and its journal while it is written


class SimulatedSites:
    """Program of a simulation worker.

    Parameters
    ----------
    payload : mapping
        ``plan`` (canonical JSON), ``run``, ``sites`` (paths of site.toml files in node order),
        ``states`` (their state folders), ``choices`` (`silotune.models.choices.Choices`),
        ``shared`` (a folder for what processes share), ``roster`` (public keys, in hex, by site) and
        ``isolate`` (whether records are read in confined processes).
    """

    kind: ClassVar[type[LocalTraining] | None] = None
    joint: JointAnswers | None = None

    def __init__(self, payload: Mapping[str, Any]) -> None:
        self._plan = Plan.from_canonical(payload["plan"])
        self._run = str(payload["run"])
        self._configs = [Path(path) for path in payload["sites"]]
        self._states = [Path(path) for path in payload["states"]]
        self._models = ModelCache(
            Choices(**payload["choices"]), shared=Path(payload["shared"]), kind=self.kind
        )
        # A seeded run is the same to the last bit whoever trains beside whom: there each is alone.
        if self.kind is None and self._plan.plan.seed is None and not payload["isolate"]:
            self.joint = JointAnswers()
            self._models.kind = partial(SimulatedTraining, joint=self.joint)
        self._roster = {name: bytes.fromhex(key) for name, key in payload["roster"].items()}
        self._isolate, self._choices = bool(payload["isolate"]), dict(payload["choices"])
        self._runs: dict[int, SiteRun] = {}
        self._local: dict[int, LocalTraining] = {}
        if not self._plan.only_sums:
            shared = self._models.for_plan(self._plan)
            if self.joint is not None:
                self.joint.most = most_at_once(shared)
        _allow_files(_FILES_A_SITE * len(self._configs))
        self.client_app = build_client_app(self._find)

    def _find(self, context: Context, plan: Plan, run: str) -> SiteRun:
        if plan != self._plan or run != self._run:
            raise RunError("the simulation knows one plan and one run")
        return self.site(int(context.node_config["partition-id"]))

    def site(self, index: int) -> SiteRun:
        """The site at an index (node order from 0), made on first use."""
        if index not in self._runs:
            config = SiteConfig.load(self._configs[index])
            self._runs[index] = SiteRun(
                config,
                state=self._states[index],
                plan=self._plan,
                run=self._run,
                models=self._processes(config, self._states[index])
                if self._isolate
                else self._models,
                to_disk=False,
                roster=self._roster,
            )
        return self._runs[index]

    def training(self, index: int) -> LocalTraining:
        """The records and the model of the site at an index, in this process."""
        site = self.site(index)
        if not self._isolate:
            return cast(LocalTraining, site.training)
        # What the simulator alone asks for, such as scores on held-out data, no trainer would answer.
        if index not in self._local:
            self._local[index] = self._models.training(site.job)
        return self._local[index]

    def _processes(self, site: SiteConfig, state: Path) -> TrainerProcesses:
        """Confined processes of a site's own, which compute with what was chosen for the run."""
        base = site.model_place(self._plan)
        table = table_of(site, scratch=state / "scratch", models=[base] if base else [])
        chosen = {name: str(self._choices[name]) for name in ("device", "dtype", "attention")}
        return TrainerProcesses(site, launcher=Launcher(table), chosen=chosen)

    def inspect(
        self, site_index: int, request: dict[str, Any], arrays: Arrays
    ) -> tuple[dict[str, Any], Arrays]:
        """Answer the simulator: ``score``, ``finish`` or ``save``, as ``request["op"]`` says."""
        site = self.site(site_index)
        match request["op"]:
            case "score":
                training, split = self.training(site_index), Split[str(request["split"]).upper()]
                frozen = bool(request["frozen"])
                if not len(training.records.rows(split)):
                    return {}, {}
                adapter = site.at_own_rank(arrays["flat"])
                found = {"counts": score(training, adapter, split=split, frozen=frozen)}
                own = site.updates.personal(adapter, before=int(request["round"]) + 1)
                if own is not None:
                    found["personal"] = score(training, own, split=split, frozen=frozen)
                return {}, found
            case "finish":
                body = site.finish()
                return {
                    "certificate": None if body is None else body.model_dump(mode="json"),
                    "train_seconds": {str(k): v for k, v in site.updates.seconds.items()},
                    "records": site.updates.records_used,
                }, {}
            case "save":
                model = self._models.for_plan(self._plan).model
                save_adapter(model, arrays["flat"], Path(request["folder"]), plan=self._plan)
                return {"description": model.description, "parameters": model.layout.size}, {}
            case other:
                raise RunError(f"no such request: {other}")


def _allow_files(number: int) -> None:
    """Let this process keep so many files open, if the system does: each site has a ledger."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = number + _OTHER_FILES
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def build(payload: Mapping[str, Any]) -> SimulatedSites:
    """The worker's factory."""
    return SimulatedSites(payload)


def score(
    training: LocalTraining, adapter: Vector, *, split: Split, frozen: bool
) -> NDArray[np.float64]:
    """Counts of an adapter on one split of a site's records.

    Parameters
    ----------
    training : LocalTraining
        Whose records.
    adapter : float32 array
        At the site's rank.
    split : Split
        Which records.
    frozen : bool
        Whether only the head was trained so far: then the cached features give the same counts.
    """
    model = training.trainable.model
    write_adapter(model, adapter)
    total: NDArray[np.float64] | None = None
    size = training.job.plan.privacy.max_physical_batch
    for rows in batches(training.encoded, training.records.rows(split), size=size):
        if frozen:
            features = training.trainer.frozen.seen(training.encoded, rows, model.device)
            counts = model.task.head_score(model.module, features, training.encoded, rows)
        else:
            counts = model.task.score(model.module, training.trainer.inputs(rows))
        total = counts if total is None else total + counts
    if total is None:
        raise RunError(
            f"site {training.job.site.name} has no records in the {split.name.lower()} split"
        )
    return total


def payload_for(
    plan: Plan,
    *,
    run: str,
    sites: list[SiteConfig],
    states: list[Path],
    choices: Choices,
    shared: Path,
    isolate: bool = False,
) -> dict[str, Any]:
    """What `build` takes, as JSON values. The simulator enrols the sites: it makes their keys."""
    return {
        "plan": plan.canonical(),
        "run": run,
        "sites": [str(site.folder / "site.toml") for site in sites],
        "states": [str(state) for state in states],
        "choices": asdict(choices),
        "shared": str(shared),
        "isolate": isolate,
        "roster": enrol(sites, states) if plan.aggregation.secure else {},
    }


def enrol(sites: list[SiteConfig], states: list[Path]) -> dict[str, str]:
    """Identity keys in the sites' state folders; the public ones, in hex, by site."""
    keys = [load_or_create(state / "signing.key", to_disk=False) for state in states]
    publics = [key.public_key().public_bytes_raw().hex() for key in keys]
    return dict(zip((site.name for site in sites), publics, strict=True))


class _PlantedTraining(LocalTraining):
    """A training on canaries too, each a unit of its own."""

    planted: Sequence[Example] = ()

    @cached_property
    def records(self) -> Records:
        """The site's records, and the canaries."""
        own = super().records
        first, more = own.n_units(), len(self.planted)
        turns = own.turns
        if turns is not None:
            in_turn = np.arange(more, dtype=np.int64) % self.job.plan.privacy.bands
            turns = np.concatenate([turns, in_turn])
        return replace(
            own,
            examples=[*own.examples, *self.planted],
            unit_of=np.concatenate([own.unit_of, np.arange(first, first + more, dtype=np.int64)]),
            split=np.concatenate([own.split, np.full(more, Split.TRAIN, dtype=np.uint8)]),
            turns=turns,
        )


class CanarySites(SimulatedSites):
    """Program of a worker of an attacked run.

    Parameters
    ----------
    payload : mapping
        That of `SimulatedSites`, and ``planted``: the canaries to train on, a list a site.
    """

    kind = _PlantedTraining

    def __init__(self, payload: Mapping[str, Any]) -> None:
        self._planted = payload["planted"]
        super().__init__(payload)

    def site(self, index: int) -> SiteRun:
        """The site at an index, with its canaries."""
        found = super().site(index)
        cast(_PlantedTraining, found.training).planted = self._planted[index]
        return found

    def inspect(
        self, site_index: int, request: dict[str, Any], arrays: Arrays
    ) -> tuple[dict[str, Any], Arrays]:
        """Answer the attacker too: ``losses`` and ``complete`` of examples under an adapter."""
        match request["op"]:
            case "losses":
                return {}, {"losses": self._losses(site_index, request["examples"], arrays["flat"])}
            case "complete":
                site = self.site(site_index)
                model = self.training(site_index).trainable.model
                write_adapter(model, site.at_own_rank(arrays["flat"]))
                prompts = [{"prompt": prompt} for prompt in request["prompts"]]
                return {"texts": [p.output for p in model.task.predict(model, prompts)]}, {}
            case _:
                return super().inspect(site_index, request, arrays)

    def _losses(
        self, site_index: int, examples: Sequence[Example], flat: NDArray[np.float32]
    ) -> NDArray[np.float64]:
        site = self.site(site_index)
        model = self.training(site_index).trainable.model
        write_adapter(model, site.at_own_rank(flat))
        encoded = model.task.encode(examples, model.tokenizer, plan=self._plan)
        found = np.empty(len(examples))
        for rows in batches(encoded, range(len(examples)), size=_CANARY_BATCH):
            with model.module.inference():
                inputs = model.task.collate(encoded, rows, model.device)
                found[rows] = model.task.losses(model.module, inputs).double().cpu().numpy()
        return found


def build_with_canaries(payload: Mapping[str, Any]) -> CanarySites:
    """The factory of a worker of an attacked run."""
    return CanarySites(payload)
