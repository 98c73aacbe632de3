"""Rounds of several sites in the same passes through their common model: for simulations.

The sites of a process have one frozen model between them, and an adapter each. Where the model is small
a pass over a few records of one site costs nearly what one over those of twenty does. So the records of
all sites' steps are one batch, and every sequence goes through its own site's adapter
(`silotune.privacy.engine.StackedSgd`). Each site draws what it would draw alone, takes the steps that it
would take alone, and comes to the numbers that it would come to alone, up to rounding. No number of one
site enters those of another.

A real site never comes here: it is alone in its process.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from silotune.client.local_steps import local_steps
from silotune.client.trainer import TrainableModel, Trainer
from silotune.client.training.base import Vector
from silotune.errors import SelfCheckFailed
from silotune.models.adapter import read_adapter, write_adapter
from silotune.models.batching import Encoded, record_of
from silotune.privacy.engine import StackedSgd
from silotune.privacy.noise import NoiseSource
from silotune.strategies import method_of

_MOST_SITES = 32
_MOST_BYTES = 1 << 28  # of adapters side by side, gradients and messages of them
_COPIES = 8
_FEW_TOKENS = 2048  # in a pass: of so many or fewer padding costs less than another pass
_MOST_PADDED = 1.3
_TEXTS = ("A word.", "A few words more than that, which say nothing.", "Some words of a text.")
_OWNERS = (0, 1, 0)
_CLOSE = 0.1  # of what another adapter would make of a loss


@dataclass(kw_only=True)
class JointMember:
    """One site of those that train together.

    Attributes
    ----------
    trainer : Trainer
        The site's.
    adapter : float32 array [layout.size]
        The global adapter.
    server_round : int
        From 1.
    """

    trainer: Trainer
    adapter: Vector
    server_round: int
    _own: Vector = field(init=False)
    _noise: NoiseSource = field(init=False)
    _records: int = 0
    _drawn: int = 0
    _moved: list[dict[int, bool]] = field(default_factory=list)

    def begin(self) -> Vector:
        """What the round starts from at this site."""
        self._own = self.trainer.keeping.personal(self.adapter, before=self.server_round)
        self._noise = self.trainer.stream(self.server_round)
        return self._own

    def draw(self) -> NDArray[np.int64]:
        """A step's records."""
        rows = self.trainer.drawn(self.server_round, self._noise)
        self._drawn, self._records = len(rows), self._records + len(rows)
        return rows

    def note(self, moved: dict[int, bool]) -> None:
        """Remember which parameters had a gradient in the step."""
        if self._drawn:
            self._moved.append(moved)

    def end(self, flat: Vector) -> Vector:
        """What is sent of the round's sum or change. Raises as `Trainer.round` does."""
        for moved in self._moved:
            if self.trainer.looks_at_gradients:
                self.trainer.look_at_gradients(moved)
        return self.trainer.leave(
            self.adapter, self._own, flat, self.server_round, records=self._records
        )


def most_at_once(shared: TrainableModel) -> int:
    """How many sites of a model train together; 1 if its plan or the model has each of them alone."""
    plan, size = shared.plan, shared.model.layout.nbytes
    most = min(_MOST_SITES, _MOST_BYTES // (_COPIES * size))
    return most if most > 1 and not plan.per_unit and _keeps_apart(shared) else 1


def _keeps_apart(shared: TrainableModel) -> bool:
    """Whether each sequence goes through its own adapter: tried on public texts with two of them.

    A layer that sees the positions of a text first, or more than one text at once, would mix them.
    """
    model, start = shared.model, read_adapter(shared.model)
    texts = enumerate(_TEXTS)
    examples = [model.task.example(text, number=n, plan=shared.plan) for n, text in texts]
    encoded = model.task.encode(examples, model.tokenizer, plan=shared.plan)
    turn = np.arange(start.size, dtype=np.float32)
    adapters = [start + np.float32(0.1) * np.cos(turn * step) for step in (1.0, 1.3)]
    engine = StackedSgd(shared.attached, _stacked(shared, adapters), ())
    inputs = model.task.collate(encoded, range(len(_TEXTS)), model.device)
    of = torch.tensor(_OWNERS, device=model.device)[record_of(inputs, len(_TEXTS))]
    try:
        with model.module.inference():
            first, second = (_losses(shared, encoded, adapter) for adapter in adapters)
            with engine.members(of):
                stacked = model.task.losses(model.module, inputs)
    except SelfCheckFailed:
        return False
    finally:
        write_adapter(model, start)
    alone = torch.where(torch.tensor(_OWNERS, device=model.device) == 0, first, second)
    return bool((stacked - alone).abs().max() < _CLOSE * (first - second).abs().min())


def _losses(shared: TrainableModel, encoded: Encoded, adapter: Vector) -> Tensor:
    """Each text's loss under an adapter, computed alone."""
    model = shared.model
    write_adapter(model, adapter)
    each = [model.task.collate(encoded, [row], model.device) for row in range(len(encoded))]
    return torch.cat([model.task.losses(model.module, inputs) for inputs in each])


def groups(members: Sequence[JointMember]) -> Iterator[list[int]]:
    """Which of the members train together, by their numbers; some are alone.

    A step of a group is expected to take no more records than the plan lets a pass have.
    """
    groups = dict[tuple[int, int], tuple[list[int], float]]()
    for number, member in enumerate(members):
        trainer = member.trainer
        if not trainer.stacks(member.server_round):
            yield [number]
            continue
        key = id(trainer.shared), member.server_round
        group, records = groups.get(key, ([], 0.0))
        if group and records + trainer.batch > _room(trainer):
            yield group
            group, records = [], 0.0
        groups[key] = [*group, number], records + trainer.batch
    yield from (group for group, _ in groups.values())


def _room(trainer: Trainer) -> int:
    """Most sequences of a pass."""
    return trainer.shared.plan.privacy.max_physical_batch


def changes(members: Sequence[JointMember]) -> list[Vector | None]:
    """Each member's sum or change of a round, before `JointMember.end`; None if it is not finite.

    Parameters
    ----------
    members : sequence of JointMember
        Of one of the `groups`.
    """
    trainer, server_round = members[0].trainer, members[0].server_round
    shared, plan = trainer.shared, trainer.shared.plan
    trained = shared.parameters(method_of(plan).trained(plan, server_round))
    engine = StackedSgd(
        shared.attached, _stacked(shared, [member.begin() for member in members]), trained
    )
    if plan.sends_sums:
        found = _step(members, engine, trained)
    else:
        batch = torch.tensor([member.trainer.batch for member in members])

        def means() -> list[Tensor]:
            sums = _step(members, engine, trained)
            return [total / batch.to(total).view(-1, *[1] * (total.dim() - 1)) for total in sums]

        found = local_steps(
            plan,
            engine.parameters,
            [shared.part_of(parameter) for parameter in trained],
            server_round=server_round,
            means=means,
            drift=_drifts(members),
        )
    rows = torch.cat([part.detach().flatten(1).float().cpu() for part in found], dim=1)
    finite = rows.isfinite().all(1).tolist()
    return [row if fine else None for row, fine in zip(rows.numpy(), finite, strict=True)]


def _stacked(shared: TrainableModel, adapters: Sequence[Vector]) -> dict[int, Tensor]:
    """Values of all trained parameters, by their ``id``: ``[adapters, *shape]``."""
    flat = torch.from_numpy(np.stack(adapters)).to(shared.model.device)
    parameters = shared.model.parameters()
    columns = torch.split(flat, [parameter.numel() for parameter in parameters], dim=1)
    return {
        id(parameter): own.reshape(len(adapters), *parameter.shape).clone()
        for parameter, own in zip(parameters, columns, strict=True)
    }


def _drifts(members: Sequence[JointMember]) -> Tensor | None:
    found = [member.trainer.drift(member.adapter, member.server_round) for member in members]
    rows = [row for row in found if row is not None]
    return torch.from_numpy(np.stack(rows)) if rows else None


def _step(
    members: Sequence[JointMember], engine: StackedSgd, trained: Sequence[nn.Parameter]
) -> list[Tensor]:
    """One step of every member: their sums."""
    model = members[0].trainer.shared.model
    for part in _passes(members):
        own = [members[number].trainer.data.encoded.subset(rows) for number, rows in part.items()]
        encoded = Encoded.joined(own)
        inputs = model.task.collate(encoded, range(len(encoded)), model.device)
        of = torch.tensor([n for n, rows in part.items() for _ in rows], device=model.device)
        with engine.members(of[record_of(inputs, len(encoded))]):
            engine.accumulate(model.task.losses(model.module, inputs))
    sums = engine.release()
    if any(member.trainer.looks_at_gradients for member in members):
        moved = torch.stack([total.flatten(1).any(1) for total in sums], dim=1).tolist()
        for member, own in zip(members, moved, strict=True):
            member.note(dict(zip(map(id, trained), own, strict=True)))
    return sums


def _passes(members: Sequence[JointMember]) -> Iterator[dict[int, list[int]]]:
    """The records that each draws for a step, by member, in parts that go through the model at once.

    A part has no more sequences than the plan lets a pass have, and of those that are long enough to
    count not many more positions than tokens: records of like length come together.
    """
    room, drawn = _room(members[0].trainer), list[tuple[float, int, int, int]]()
    for number, member in enumerate(members):
        rows, encoded = member.draw(), member.trainer.data.encoded
        sizes, lengths = encoded.sequences[rows].tolist(), encoded.lengths[rows].tolist()
        widths = [length / size for length, size in zip(lengths, sizes, strict=True)]
        drawn += zip(widths, sizes, [number] * len(rows), rows.tolist(), strict=True)
    part, taken, tokens = dict[int, list[int]](), 0, 0.0
    for width, size, number, row in sorted(drawn):
        positions = (taken + size) * width
        wasteful = tokens > _FEW_TOKENS and positions > _MOST_PADDED * (tokens + size * width)
        if part and (taken + size > room or wasteful):
            yield part
            part, taken, tokens = {}, 0, 0.0
        part.setdefault(number, []).append(row)
        taken, tokens = taken + size, tokens + size * width
    if part:
        yield part
