"""What a site remembers from one round of a run to the next, and nobody else ever sees.

Personal parts of an adapter and control variates are made of private records. A deployed site keeps
them sealed on its own disk. Two rounds are kept: a round that is asked for again after a crash starts
from what the site remembered before it, as it did the first time.

Parts of the adapter that stay at a site: put in before a round, taken out after it.

Under differential privacy these parts are trained under the same clipping, noise and charge as if they
were sent. Later releases are computed with them; noise on the sent parts alone would not cover that.

SCAFFOLD's control variates, as one site sees them; see `silotune.strategies.scaffold`.

With option II, plain SGD at the sites and no optimizer at the server, the common variate is the mean
change of the last round over the summed learning rates of its steps, negated: a site reads it off two
successive global adapters, and nothing beside them has to travel.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

from silotune.models.layout import Layout, Span, gathered
from silotune.plan.plan import Plan
from silotune.strategies import method_of
from silotune.strategies.schedule import Group, learning_rate, phase_of
from silotune.strategies.server_optimizer import ServerOptimizer

Arrays = Mapping[str, NDArray[Any]]

_KEPT_ROUNDS = 2


class Sealer(Protocol):
    """Writes and reads private files, as `silotune.trust.vault.Vault` does."""

    def write(self, path: Path, content: bytes) -> None:
        """Put content at a path, whole or not at all."""
        ...

    def read(self, path: Path) -> bytes:
        """Content of a file."""
        ...


class RoundArrays(Protocol):
    """Arrays by round."""

    def recall(self, *, before: int) -> tuple[int, Arrays] | None:
        """What was kept in the newest round before one, and which round that was."""
        ...

    def keep(self, server_round: int, arrays: Arrays) -> None:
        """Keep what a round ended with; older rounds may be forgotten."""
        ...


class ProcessMemory:
    """Kept in this process: for comparison models, which nobody resumes."""

    def __init__(self) -> None:
        self._rounds: dict[int, Arrays] = {}

    def recall(self, *, before: int) -> tuple[int, Arrays] | None:
        """The newest round before one."""
        newest = max((n for n in self._rounds if n < before), default=None)
        return None if newest is None else (newest, self._rounds[newest])

    def keep(self, server_round: int, arrays: Arrays) -> None:
        """Keep copies."""
        self._rounds[server_round] = {name: array.copy() for name, array in arrays.items()}
        for old in sorted(self._rounds)[:-_KEPT_ROUNDS]:
            del self._rounds[old]


class SealedMemory:
    """Sealed files in a site's state folder, one a round.

    What a round ends with is kept in the process until the round's update is released. It is then
    written under the name of that very update, and read only if the update is known as released: one
    commit makes both count, and what a round that came to nothing left behind is never seen.

    Parameters
    ----------
    folder : Path
        In the site's state.
    run : str
        The run's name; its digest is the files' prefix.
    sealer : Sealer
        Encrypts at rest.
    released : callable
        SHA-256 of the update that was released in a round, or None.
    """

    def __init__(
        self, folder: Path, *, run: str, sealer: Sealer, released: Callable[[int], str | None]
    ) -> None:
        self._folder, self._sealer, self._released = folder, sealer, released
        self._prefix = hashlib.sha256(run.encode()).hexdigest()[:16]
        self._staged: dict[int, bytes] = {}

    def recall(self, *, before: int) -> tuple[int, Arrays] | None:
        """The newest released round before one."""
        for number in sorted({n for n, _ in self._files() if n < before}, reverse=True):
            digest = self._released(number)
            if digest is not None and (path := self._path(number, digest)).exists():
                return number, load(self._sealer.read(path))
        return None

    def keep(self, server_round: int, arrays: Arrays) -> None:
        """Keep what a round ended with until it is released, see `promote`."""
        content = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        self._staged = {server_round: bytes(save(content))}

    def promote(self, server_round: int, digest: str) -> None:
        """Write what a round ended with, as that of the update about to be released."""
        content = self._staged.pop(server_round, None)
        if content is None:
            return
        self._sealer.write(self._path(server_round, digest), content)
        files = self._files()
        kept = sorted({number for number, _ in files})[-_KEPT_ROUNDS:]
        for number, name in files:
            stale = number == server_round and name != self._path(server_round, digest).name
            if number not in kept or stale:
                (self._folder / name).unlink(missing_ok=True)

    def _files(self) -> list[tuple[int, str]]:
        found = self._folder.glob(f"{self._prefix}-*-*.sealed")
        return [(int(path.name.split("-")[1]), path.name) for path in found]

    def _path(self, server_round: int, digest: str) -> Path:
        return self._folder / f"{self._prefix}-{server_round:06d}-{digest[:32]}.sealed"


Vector = NDArray[np.float32]


class PersonalParts:
    """What the plan's strategy keeps at this site.

    Parameters
    ----------
    plan : Plan
        Names the strategy.
    layout : Layout
        Of the site's adapter.
    memory : Memory
        Where the kept parts are between rounds.
    batch : float
        Expected units in a step: the divisor of gradient sums.
    """

    def __init__(self, plan: Plan, *, layout: Layout, memory: RoundArrays, batch: float) -> None:
        self._plan, self._layout, self._memory, self._batch = plan, layout, memory, batch
        self._method = method_of(plan)
        self._kept = layout.spans(self._method.kept(plan))

    @property
    def any(self) -> bool:
        """Whether anything is kept."""
        return bool(self._kept)

    def personal(self, adapter: Vector, *, before: int) -> Vector:
        """The global adapter with the site's own parts in it, as they were before a round."""
        found = self._memory.recall(before=before) if self._kept else None
        return adapter if found is None else self._placed(adapter, found[1])

    def leave(self, own: Vector, update: Vector, server_round: int) -> Vector:
        """Keep the new own parts, and give the part of an update that is to be sent.

        Parameters
        ----------
        own : float32 array [layout.size]
            The adapter that the round started from at this site.
        update : float32 array
            Gradient sum, or change, of every part that the round trained.
        server_round : int
            From 1.
        """
        trained = self._layout.spans(self._method.trained(self._plan, server_round))
        sent = self._method.sent(self._plan, server_round)
        if len(trained) == len(self._layout.spans(sent)):
            return update
        whole = self._layout.spread(trained, update)
        kept = tuple(span for span in trained if span.part not in sent)
        self._memory.keep(server_round, self._moved(own, gathered(whole, kept), kept, server_round))
        return gathered(whole, self._layout.spans(sent))

    def _moved(
        self, own: Vector, update: Vector, spans: tuple[Span, ...], server_round: int
    ) -> Arrays:
        """The own parts after the round, and the state of the optimizer that moved them."""
        if not self._plan.sends_sums:
            moved = own + self._layout.spread(spans, update)
            return {"kept": gathered(moved, self._kept)}
        # One step a round: the coordinator's optimizer moves what is sent, its twin what is kept.
        optimizer = ServerOptimizer(self._plan, size=self._layout.size)
        found = self._memory.recall(before=server_round)
        if found is not None:
            optimizer.restore(found[1])
        gradient = update / np.float32(self._batch)
        moved = optimizer.step(own, gradient, spans, server_round=server_round)
        return {"kept": gathered(moved, self._kept), **optimizer.state()}

    def _placed(self, adapter: Vector, arrays: Arrays) -> Vector:
        own, start = np.array(adapter, dtype=np.float32), 0
        for span in self._kept:
            end = start + span.stop - span.start
            own[span.start : span.stop] = arrays["kept"][start:end]
            start = end
        return own


class ControlVariate:
    """One site's control variate.

    Parameters
    ----------
    plan : Plan
        With strategy "scaffold".
    layout : Layout
        Of the site's adapter.
    memory : Memory
        Where the variate is between rounds.
    """

    def __init__(self, plan: Plan, *, layout: Layout, memory: RoundArrays) -> None:
        self._plan, self._layout, self._memory = plan, layout, memory
        self._method = method_of(plan)

    def drift(self, adapter: Vector, server_round: int) -> Vector:
        """What each step adds to its gradient: the common variate minus the site's own.

        Zero in the first round of a phase, and after a round that this site missed.

        Returns
        -------
        float32 array
            Of every coordinate that the round trains.
        """
        common, own = self._variates(adapter, server_round)
        return common - own

    def learn(self, adapter: Vector, change: Vector, server_round: int) -> None:
        """Keep the own variate after a round that started at `adapter` and changed it by `change`."""
        common, own = self._variates(adapter, server_round)
        fresh = own - common - change / self._travel(server_round)
        self._memory.keep(server_round, {"adapter": adapter, "own": fresh})

    def _variates(self, adapter: Vector, server_round: int) -> tuple[Vector, Vector]:
        spans = self._layout.spans(self._method.trained(self._plan, server_round))
        found = self._memory.recall(before=server_round)
        before = server_round - 1
        fits = found is not None and found[0] == before
        if not fits or phase_of(self._plan, before) != phase_of(self._plan, server_round):
            nothing = np.zeros(sum(s.stop - s.start for s in spans), dtype=np.float32)
            return nothing, nothing
        assert found is not None
        moved = gathered(adapter, spans) - gathered(found[1]["adapter"], spans)
        return -moved / self._travel(before), np.asarray(found[1]["own"], dtype=np.float32)

    def _travel(self, server_round: int) -> Vector:
        """Sum of the learning rates of a round's steps, for each coordinate that it trains."""
        steps = self._plan.rounds.local_steps
        first = (server_round - 1) * steps
        travels: list[Vector] = []
        for span in self._layout.spans(self._method.trained(self._plan, server_round)):
            group: Group = "head" if span.part == "head" else "adapter"
            rates = [learning_rate(self._plan, group, step=n) for n in range(first, first + steps)]
            travels.append(np.full(span.stop - span.start, sum(rates), dtype=np.float32))
        return np.concatenate(travels)
