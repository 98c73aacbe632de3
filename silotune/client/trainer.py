"""One site's part of a round: a few steps on its own records, privately.

With one local step the site returns the step's noisy clipped gradient sum; with several, the change of
its adapter. Head-only rounds run on features that are computed once and kept in memory.

Privacy units are drawn by Poisson sampling and packed into micro-batches.
"""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from silotune.client.data_parallel import Ranks
from silotune.client.local_steps import local_steps
from silotune.client.run_files import (
    ControlVariate,
    PersonalParts,
    ProcessMemory,
    RoundArrays,
    correlated_sums,
)
from silotune.client.terms import missing_noise, round_event
from silotune.client.training.base import RoundUpdate, Vector
from silotune.errors import SelfCheckFailed
from silotune.models.adapter import write_adapter
from silotune.models.batching import Encoded, batches, record_of
from silotune.models.features import Frozen, compute_frozen
from silotune.models.layout import Layout, Part
from silotune.models.task import LoadedModel
from silotune.plan.plan import Plan
from silotune.privacy.clipping import Attached, attach
from silotune.privacy.engine import ClipGroup, DpSgd, PlainSgd
from silotune.privacy.events import DpEvent
from silotune.privacy.noise import NoiseSource, noise_for
from silotune.strategies import method_of
from silotune.strategies.server_optimizer import Phase, phase_of
from silotune.strategies.site_privacy import hidden


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Records of whole units that are run through the model together.

    Attributes
    ----------
    rows : list of int
        Record numbers.
    units : int array [len(rows)]
        For each record, which unit of this micro-batch it belongs to (0, 1, ...).
    """

    rows: list[int]
    units: NDArray[np.int64]

    @property
    def n_units(self) -> int:
        """Number of units in the batch."""
        return int(self.units.max()) + 1

    def apart(self) -> list[MicroBatch]:
        """Each unit in a batch of its own."""
        rows = np.asarray(self.rows)
        return [
            MicroBatch(rows=own.tolist(), units=np.zeros(len(own), dtype=np.int64))
            for own in (rows[self.units == unit] for unit in range(self.n_units))
        ]


class UnitSampler:
    """Draws the units of a step independently, each with the same probability.

    Parameters
    ----------
    encoded : Encoded
        The site's records; like lengths share a micro-batch.
    unit_of : int array [records]
        Dense unit number of each record.
    rows : int array
        The records that may be drawn.
    max_records : int
        A unit with more records gives a uniform sample of this many.
    max_physical : int
        Largest number of records in a micro-batch.
    """

    def __init__(
        self,
        *,
        encoded: Encoded,
        unit_of: NDArray[np.int64],
        rows: NDArray[np.int64],
        max_records: int,
        max_physical: int,
    ) -> None:
        order = np.argsort(unit_of[rows], kind="stable")
        ordered = rows[order]
        _, starts = np.unique(unit_of[ordered], return_index=True)
        self._units = np.split(ordered, starts[1:]) if len(rows) else []
        self._encoded, self._unit_of = encoded, unit_of
        self._max_records, self._max_physical = max_records, max_physical

    @property
    def units(self) -> int:
        """Number of units that may be drawn: private, never released."""
        return len(self._units)

    def draw(self, rate: float, noise: NoiseSource) -> list[MicroBatch]:
        """One Poisson sample of units, as micro-batches that never split a unit; may be empty."""
        rows = self.rows(rate, noise)
        packed = batches(self._encoded, rows, size=self._max_physical, units=self._unit_of[rows])
        return [self._numbered(batch) for batch in packed]

    def rows(self, rate: float, noise: NoiseSource) -> NDArray[np.int64]:
        """The records of such a sample, a unit's side by side."""
        chosen = np.flatnonzero(noise.uniform(self.units) < rate)
        drawn = [self._bounded(self._units[index], noise) for index in chosen]
        return np.concatenate([np.zeros(0, dtype=np.int64), *drawn])

    def _bounded(self, rows: NDArray[np.int64], noise: NoiseSource) -> NDArray[np.int64]:
        if len(rows) <= self._max_records:
            return rows
        order = np.argsort(noise.uniform(len(rows)), kind="stable")
        return np.sort(rows[order[: self._max_records]])

    def _numbered(self, rows: list[int]) -> MicroBatch:
        _, units = np.unique(self._unit_of[rows], return_inverse=True)
        return MicroBatch(rows=rows, units=units.astype(np.int64))


_log = logging.getLogger(__name__)

Engine = DpSgd | PlainSgd

_MOVE_PATIENCE = 4  # LoRA's A has no gradient until B left zero, one or two steps later


@dataclass(frozen=True, kw_only=True)
class SiteData:
    """A site's encoded records and what it says of them in public.

    Attributes
    ----------
    site : str
        The site's name.
    encoded : Encoded
        Token ids and targets of every record.
    unit_of : int array [records]
        Dense number of each record's privacy unit.
    train : int array
        Records that may be trained on.
    declared_units : int
        Public, rounded number of units, from the site's configuration.
    turns : int array [units] or None
        See `silotune.data.records.Records`.
    """

    site: str
    encoded: Encoded
    unit_of: NDArray[np.int64]
    train: NDArray[np.int64]
    declared_units: int
    turns: NDArray[np.int64] | None = None

    def train_in(self, turn: int, *, bands: int) -> NDArray[np.int64]:
        """Records that may be trained on in every round that is `turn` (from 0) in its block."""
        if bands == 1:
            return self.train
        if self.turns is None:
            raise SelfCheckFailed("nothing says in which rounds a unit may be drawn")
        mine: NDArray[np.int64] = self.train[self.turns[self.unit_of[self.train]] == turn]
        return mine

    @cached_property
    def sha256(self) -> bytes:
        """Of the records and whose they are."""
        encoded = self.encoded
        parts = (encoded.ids, encoded.offsets, encoded.targets, self.unit_of, self.train)
        types = b"" if encoded.types is None else encoded.types.tobytes()
        return hashlib.sha256(b"".join(part.tobytes() for part in parts) + types).digest()


class TrainableModel:
    """A loaded model made ready for training: one for a process, shared by all sites in it.

    Parameters
    ----------
    plan : Plan
        Says whether gradients are per unit.
    model : LoadedModel
        From `silotune.models.base.load_model`.
    """

    def __init__(self, plan: Plan, model: LoadedModel) -> None:
        self.plan, self.model = plan, model
        self.attached: Attached = attach(model.module, private=plan.per_unit, dtype=model.dtype)
        self._parts = {
            id(model.module.trained[entry.name]): entry.part
            for entry in model.layout.entries
            if entry.name in model.module.trained
        }

    def under(self, plan: Plan) -> TrainableModel:
        """The same weights under a plan of the same model, adapter and mode of privacy."""
        other = copy.copy(self)
        other.plan, other.model = plan, replace(self.model, plan=plan)
        return other

    def part_of(self, parameter: nn.Parameter) -> Part:
        """Which part of the adapter a trained parameter is."""
        return self._parts[id(parameter)]

    def parameters(self, parts: Collection[Part]) -> tuple[nn.Parameter, ...]:
        """Parameters of some parts, in the order of the layout."""
        return tuple(p for p in self.model.parameters() if self.part_of(p) in parts)

    def engine(self, parts: Collection[Part], *, sigma: float, noise: NoiseSource | None) -> Engine:
        """A fresh engine for the steps of one round, which trains these parts and no others."""
        for parameter in self.model.parameters():
            parameter.requires_grad_(self.part_of(parameter) in parts)
        if not self.plan.per_unit:
            return PlainSgd(self.attached, self.parameters(parts))
        return DpSgd(self.attached, self._groups(parts), sigma=sigma, noise=noise)

    def _groups(self, parts: Collection[Part]) -> list[ClipGroup]:
        clipping = self.plan.privacy.clipping
        grouped: dict[str, list[nn.Parameter]] = {}
        for parameter in self.parameters(parts):
            grouped.setdefault(clipping.group(self.part_of(parameter)), []).append(parameter)
        alone = len(grouped) == 1  # it has all of the sensitivity
        return [
            ClipGroup(
                name=name,
                parameters=tuple(own),
                clip=clipping.bounds[name].norm,
                share=1.0 if alone else clipping.bounds[name].share,
            )
            for name, own in grouped.items()
        ]


class Trainer:
    """Trains one site's share of a plan.

    Parameters
    ----------
    trainable : TrainableModel
        The shared model.
    data : SiteData
        The site's records.
    sigma : float
        Noise multiplier; ignored without privacy.
    frozen : callable, optional
        Gives what the base model alone makes of the records, if somebody has it already.
    memory : Memory, optional
        Where the site keeps its own parts and variates between rounds; by default in this process.
    ranks : Ranks, optional
        The processes that share its steps; by default this one is alone.
    finishes : bool
        Whether a round ends with all that its update needs before it leaves. A site's `SiteRun` sees to
        that itself: it adds what `missing_noise` names, and has the strategy shorten what goes out.

    Attributes
    ----------
    shared, data : TrainableModel, SiteData
        What it was given.
    batch : float
        Expected units in a step.
    records_used : int
        Records trained on so far, repetitions counted: private, for the simulator's comparisons.
    """

    def __init__(
        self,
        trainable: TrainableModel,
        data: SiteData,
        *,
        sigma: float,
        frozen: Callable[[], Frozen] | None = None,
        memory: RoundArrays | None = None,
        ranks: Ranks | None = None,
        finishes: bool = True,
    ) -> None:
        self.shared, self.data, self._sigma = trainable, data, sigma
        self._finishes = finishes
        self._plan, self._model = trainable.plan, trainable.model
        self._ranks = ranks or Ranks()
        privacy = self._plan.privacy
        max_physical = self._ranks.micro_batch(
            privacy.max_physical_batch,
            expected=self._plan.expected_batch(data.declared_units),
            unit=privacy.max_records_per_unit,
        )
        self._samplers = [
            UnitSampler(
                encoded=data.encoded,
                unit_of=data.unit_of,
                rows=data.train_in(turn, bands=privacy.bands),
                max_records=privacy.max_records_per_unit,
                max_physical=max_physical,
            )
            for turn in range(privacy.bands)
        ]
        self._sent_noise = ProcessMemory(kept=privacy.bands - 1)  # of comparisons
        self._find_frozen = frozen or (lambda: compute_frozen(self._model, data.encoded))
        self._still = {id(p): _MOVE_PATIENCE for p in self._model.parameters()}
        memory = memory or ProcessMemory()
        self.batch = self._plan.expected_batch(data.declared_units)
        self.keeping = PersonalParts(
            self._plan, layout=self.layout, memory=memory, batch=self.batch
        )
        scaffold = self._plan.aggregation.strategy == "scaffold"
        self._control = (
            ControlVariate(self._plan, layout=self.layout, memory=memory) if scaffold else None
        )
        self.records_used = 0

    @property
    def layout(self) -> Layout:
        """The layout of adapters and updates."""
        return self._model.layout

    def round(
        self, adapter: Vector, server_round: int, *, clip: float | None = None
    ) -> RoundUpdate:
        """Run the local steps of a round (from 1) from the global adapter.

        Parameters
        ----------
        adapter : float32 array [layout.size]
            The global adapter.
        server_round : int
            Number of the round.
        clip : float, optional
            Norm of this round under adaptive clipping.

        Raises
        ------
        SelfCheckFailed
            A run-time check failed; nothing may be released.
        """
        method = method_of(self._plan)
        own = self.keeping.personal(adapter, before=server_round)
        write_adapter(self._model, own)
        noise = self.stream(server_round)
        trained = method.trained(self._plan, server_round)
        parts = [span.part for span in self.layout.spans(trained)]
        missing = missing_noise(self._plan, parts, sigma=self._sigma)
        if missing and (not self._finishes or self._plan.privacy.noise == "shared"):
            return self._clean(trained, missing, server_round, noise)
        if missing and self._plan.privacy.bands > 1:
            flat = correlated_sums(
                self._clean(trained, missing, server_round, noise).flat,
                server_round,
                plan=self._plan,
                spans=self.layout.spans(trained),
                missing=missing,
                memory=self._sent_noise,
                noise=noise,
            )
            return RoundUpdate(flat=flat, event=self._event())
        engine = self.shared.engine(trained, sigma=self._sigma, noise=noise)
        if self._plan.sends_sums:
            sums, records = self._step(engine, server_round, noise)
            flat = _flatten(sums)
        else:
            flat, records = self._walk(engine, noise, adapter, server_round)
        sent = self.leave(adapter, own, flat, server_round, records=records)
        if not self._finishes:
            return RoundUpdate(flat=sent, event=self._event())
        units = self.data.declared_units
        sent = method.outgoing(self._plan, sent, declared_units=units)
        sent = hidden(self._plan, sent, clip=clip, sigma=self._sigma, noise=noise)
        return RoundUpdate(flat=sent, event=self._event())

    def leave(
        self, adapter: Vector, own: Vector, flat: Vector, server_round: int, *, records: int
    ) -> Vector:
        """Keep what stays here of a round's sum or change; the part of it that is sent.

        Parameters
        ----------
        adapter, own : float32 array [layout.size]
            The global adapter, and what the round started from here.
        flat : float32 array
            The sum, or the change.
        server_round : int
            From 1.
        records : int
            Trained on.
        """
        self.records_used += records
        if self._control is not None and not self._plan.sends_sums:
            self._control.learn(adapter, flat, server_round)
        return self.keeping.leave(own, flat, server_round)

    def _clean(
        self,
        trained: Collection[Part],
        missing: Mapping[Part, float],
        server_round: int,
        noise: NoiseSource,
    ) -> RoundUpdate:
        """Clipped sums whose noise comes later."""
        engine = self.shared.engine(trained, sigma=self._sigma, noise=None)
        sums, records = self._step(engine, server_round, noise)
        self.records_used += records
        flat = torch.cat([part.detach().reshape(-1).double().cpu() for part in sums]).numpy()
        return RoundUpdate(flat=flat, event=self._event(), missing_noise=missing)

    def _event(self) -> DpEvent | None:
        """What a round costs."""
        return round_event(self._plan, self.data.declared_units, sigma=self._sigma)

    def stream(self, server_round: int) -> NoiseSource:
        """Randomness of a round: the OS's, or the plan's seed for this site and round."""
        return noise_for(self._plan.plan.seed, "train", self.data.site, server_round)

    def _step(
        self, engine: Engine, server_round: int, noise: NoiseSource
    ) -> tuple[list[Tensor], int]:
        """One step: sample units, accumulate micro-batches, return the (noisy) sums."""
        phase = phase_of(self._plan, server_round)
        rate, sampler = self._drawing(server_round)
        drawn = [(batch.rows, batch.units) for batch in sampler.draw(rate, noise)]
        own, records = self._ranks.deal(drawn, data=lambda: self.data.sha256)
        with self._ranks.adding(engine.parameters, private=self._plan.per_unit):
            for rows, units in own:
                self._accumulate(engine, MicroBatch(rows=rows, units=units), phase)
        if self.looks_at_gradients and phase != "head" and records:
            self.look_at_gradients({id(p): _has_gradient(p) for p in engine.parameters})
        return self._ranks.as_first(engine.release()), records

    def stacks(self, server_round: int) -> bool:
        """Whether a round can share its passes with those of other sites (`client.together`)."""
        alone = self._plan.per_unit or self._uses_frozen or self._ranks.size > 1 or self._finishes
        return not alone and phase_of(self._plan, server_round) != "head"

    def _drawing(self, server_round: int) -> tuple[float, UnitSampler]:
        rate = self._plan.draw_rate(self.data.declared_units)
        return rate, self._samplers[(server_round - 1) % len(self._samplers)]

    def drawn(self, server_round: int, noise: NoiseSource) -> NDArray[np.int64]:
        """The records of a step."""
        rate, sampler = self._drawing(server_round)
        return sampler.rows(rate, noise)

    def _accumulate(self, engine: Engine, batch: MicroBatch, phase: Phase) -> None:
        """Add a micro-batch to a step; a unit that can't be computed adds nothing.

        A failure would tell that the unit was drawn, and zero for all of the batch would move the
        sum by more than one clip: so each unit is tried alone.
        """
        try:
            self._add(engine, batch, phase)
        except Exception:
            if not self._plan.per_unit:
                raise
            _log.exception("%d units could not be computed together", batch.n_units)
            failed = 0
            for unit in batch.apart():
                try:
                    self._add(engine, unit, phase)
                except Exception:
                    failed += 1
            if failed == batch.n_units:
                self._try_public_text(engine)

    def _add(self, engine: Engine, batch: MicroBatch, phase: Phase) -> None:
        losses, record_of = self._losses(batch, phase)
        units = torch.from_numpy(batch.units).to(losses.device)[record_of]
        engine.accumulate(losses, units=units, n_units=batch.n_units)

    def _try_public_text(self, engine: Engine) -> None:
        """Raise what hinders any text from being computed, if that is why units failed."""
        plan, model = self._plan, self._model
        example = model.task.example("a", number=0, plan=plan)
        encoded = model.task.encode([example], model.tokenizer, plan=plan)
        inputs = model.task.collate(encoded, [0], model.device)
        model.task.losses(model.module, inputs).sum().backward()  # type: ignore[no-untyped-call]
        self.shared.attached.check_gradients(engine.parameters, len(record_of(inputs, 1)))
        self.shared.attached.clear()

    def _losses(self, batch: MicroBatch, phase: Phase) -> tuple[Tensor, Tensor]:
        """The losses of a micro-batch's records, and which of them each sequence is of."""
        task, module = self._model.task, self._model.module
        if phase == "head":
            encoded, device = self.data.encoded, self._model.device
            features = self.frozen.seen(encoded, batch.rows, device)
            sequences = torch.from_numpy(encoded.sequences[batch.rows]).to(device)
            rows = torch.arange(len(batch.rows), device=device).repeat_interleave(sequences)
            return task.head_losses(module, features, encoded, batch.rows), rows
        inputs = self.inputs(batch.rows)
        return task.losses(module, inputs), record_of(inputs, len(batch.rows))

    @cached_property
    def frozen(self) -> Frozen:
        """What the base model alone makes of every record, computed on first use and kept."""
        return self._find_frozen()

    @property
    def _uses_frozen(self) -> bool:
        """Whether anything of the base model alone is worth computing once."""
        below = self._model.module.prefix is not None
        uses = self._plan.steps * self._plan.rate_for(self.data.declared_units)
        # A head's features pay at once. What lies below a language model's adapter is as much work as
        # the steps that it saves, where a record is used once.
        return (below and (self._plan.task.pools or uses >= 1.0)) or self._plan.head_rounds > 0

    def prepare(self) -> None:
        """Do now what would otherwise keep the first round waiting."""
        if self._uses_frozen:
            _ = self.frozen

    def inputs(self, rows: list[int]) -> dict[str, Tensor]:
        """The task's batch of some records."""
        if self._uses_frozen:
            return self.frozen.inputs(self._model, self.data.encoded, rows)
        return self._model.task.collate(self.data.encoded, rows, self._model.device)

    def _walk(
        self, engine: Engine, noise: NoiseSource, adapter: Vector, server_round: int
    ) -> tuple[Vector, int]:
        """Several local steps with the site's own optimizer; the change of the parameters."""
        parameters, used = engine.parameters, 0
        drift = self.drift(adapter, server_round)

        def means() -> list[Tensor]:
            nonlocal used
            sums, records = self._step(engine, server_round, noise)
            used += records
            return [total / self.batch for total in sums]

        changes = local_steps(
            self._plan,
            parameters,
            [self.shared.part_of(parameter) for parameter in parameters],
            server_round=server_round,
            means=means,
            drift=None if drift is None else torch.from_numpy(drift)[None],
        )
        return _flatten(changes), used

    def drift(self, adapter: Vector, server_round: int) -> Vector | None:
        """SCAFFOLD's term of each step's gradient, if the strategy has it."""
        return None if self._control is None else self._control.drift(adapter, server_round)

    @property
    def looks_at_gradients(self) -> bool:
        """Whether there are tensors of which no gradient was seen yet."""
        return bool(self._still)

    def look_at_gradients(self, moved: Mapping[int, bool]) -> None:
        """Every trainable tensor must have had a gradient within the first non-empty steps.

        Looked at before noise is added, which would move any tensor. A tensor that a round does not
        train is not looked at in that round: `moved` says of those that it does, by their ``id``.
        """
        for key, has_gradient in moved.items():
            if key in self._still and has_gradient:
                del self._still[key]
            elif key in self._still:
                self._still[key] -= 1
        stuck = [key for key, patience in self._still.items() if patience <= 0]
        if stuck:
            trained = self._model.module.trained
            names = [name for name, parameter in trained.items() if id(parameter) in stuck]
            found = f"{len(names)} trainable tensors never had a gradient: {names[0]}"
            if not self._plan.private:
                raise SelfCheckFailed(found)
            # Which gradients are zero depends on records: it can't change what leaves.
            _log.error(found)
            for key in stuck:
                del self._still[key]


def _flatten(parts: list[Tensor]) -> Vector:
    flat = torch.cat([part.detach().reshape(-1).float().cpu() for part in parts])
    return np.asarray(flat.numpy(), dtype=np.float32)


def _has_gradient(parameter: nn.Parameter) -> bool:
    """Whether the step's sum of a parameter, clipped or plain, is anything but zero."""
    holder = cast(Any, parameter)
    total = getattr(holder, "summed_grad", None)
    total = holder.grad if total is None else total
    return total is not None and bool(total.any())
