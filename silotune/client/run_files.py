"""Files of a run at a site: sealed, by kind and round, and what is kept in them between rounds.

All that a site writes for a run, and needs for no longer than the run, goes through `RunFiles`: answers
that may be asked for again, keys and shares of secure rounds, and what a strategy keeps at the site. A
file is whole and on the disk, or not there. `remove_old` takes them away some time after the run's end.

What a strategy keeps is made of private records and never leaves: parts of an adapter that stay at the
site (`PersonalParts`), and the control variates of SCAFFOLD (`ControlVariate`). Two rounds of it are
kept: one that is asked for again after a crash starts from what the site had before it, as it did the
first time. Under differential privacy personal parts are trained under the same clipping, noise and
charge as if they were sent: later releases are computed with them, and noise on the sent parts alone
would not cover that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

from silotune.errors import ReleaseConflict
from silotune.models.layout import Group, Layout, Part, Span, gathered, laid_out
from silotune.plan.plan import Plan
from silotune.privacy.bands import Row, correlated
from silotune.privacy.noise import NoiseSource
from silotune.strategies import method_of
from silotune.strategies.server_optimizer import ServerOptimizer, learning_rate, phase_of
from silotune.trust.files import (
    create_private_folder,
    replace_file,
    require_private,
    sync_directory,
)
from silotune.trust.vault import Vault

Arrays = Mapping[str, NDArray[Any]]

KEPT_DAYS = 30
"""Files of a run are kept so long after its end."""

FEWEST_ROUNDS = 2
"""Rounds of what a strategy keeps that stay: one asked for again starts from the one before it."""

_DIGEST = 32
_ROW = "noise"
_DAY = 24 * 3600.0


@dataclass(frozen=True)
class FileKind:
    """A kind of files, whose names begin with the run's digest and the round.

    Attributes
    ----------
    folder : str
        In the site's state.
    digits : int
        Of the round in a name.
    suffix : str
        What names end with.
    """

    folder: str
    digits: int = 8
    suffix: str = ".sealed"


OUTBOX = FileKind("outbox", suffix=".safetensors")
"""Answers that may be asked for again, named by release and content."""

ROUNDS = FileKind("rounds")
"""Keys and shares of secure rounds."""

MEMORY = FileKind("memory", digits=6)
"""What a strategy, or correlated noise, keeps at the site, named by the update that it belongs to."""

KINDS = (OUTBOX, ROUNDS, MEMORY)


class RunFiles:
    """Files of one kind and one run: a round has one, or several with names of their own.

    Parameters
    ----------
    state : Path
        The site's state folder.
    kind : FileKind
        What they are.
    run : str
        The run's id.
    vault : Vault or None
        Seals the files; without one they are written as they are.
    to_disk : bool
        Force files to the disk; False in simulations only.
    """

    def __init__(
        self,
        state: Path,
        kind: FileKind,
        *,
        run: str,
        vault: Vault | None = None,
        to_disk: bool = True,
    ) -> None:
        self.run, self._kind = run, kind
        self._folder, self._vault, self._to_disk = state / kind.folder, vault, to_disk
        create_private_folder(self._folder, to_disk=to_disk)

    def write(self, number: int, content: bytes, *, name: str = "") -> None:
        """Put a round's file on the disk, whole or not at all."""
        path = self._path(number, name)
        sealed = self._vault.seal(content, name=path.name) if self._vault else content
        replace_file(path, sealed, to_disk=self._to_disk)

    def read(self, number: int, *, name: str = "") -> bytes | None:
        """Content of a round's file; None if there is none.

        Raises
        ------
        SealBroken
            It was changed, renamed, or sealed by another vault.
        FileExposed
            Other accounts of the machine may read or write it.
        """
        path = self._path(number, name)
        if not path.exists():
            return None
        if self._vault is not None:
            return self._vault.read(path)
        require_private(path)
        return path.read_bytes()

    def remove(self, number: int, *, name: str = "") -> None:
        """Remove a round's file, if there is one."""
        self._path(number, name).unlink(missing_ok=True)

    def version(self, number: int) -> tuple[int, int] | None:
        """Changes whenever a round is written anew, by whichever process; None if there is none."""
        try:
            found = self._path(number).stat()
        except FileNotFoundError:
            return None
        return found.st_ino, found.st_mtime_ns

    def names(self, number: int) -> list[str]:
        """Names of a round's files."""
        return sorted(name for found, name, _ in self._found() if found == number)

    def rounds(self) -> list[int]:
        """Rounds that have files, the newest last."""
        return sorted({number for number, _, _ in self._found()})

    def prune(self, *, below: int) -> None:
        """Remove files of older rounds: keys that are gone can't be taken."""
        for number, _, path in self._found():
            if number < below:
                path.unlink(missing_ok=True)

    def _found(self) -> Iterator[tuple[int, str, Path]]:
        beginning = f"{_stem(self.run)}-"
        for path in self._folder.iterdir():
            if path.name.startswith(beginning) and path.name.endswith(self._kind.suffix):
                _, number, *name = path.name.removesuffix(self._kind.suffix).split("-", 2)
                yield int(number), "".join(name), path

    def _path(self, number: int, name: str = "") -> Path:
        stem = f"{_stem(self.run)}-{number:0{self._kind.digits}d}"
        return self._folder / f"{stem}{'-' if name else ''}{name}{self._kind.suffix}"


def _stem(run: str) -> str:
    # The id comes from the coordinator: its digest is a safe file name, it may not be.
    return hashlib.sha256(run.encode()).hexdigest()[:16]


def remove_old(state: Path, *, ended: Mapping[str, float | None], now: float) -> list[str]:
    """Remove the files of runs that are over for `KEPT_DAYS`; cut short, it goes on when called again.

    Parameters
    ----------
    state : Path
        The site's state folder.
    ended : mapping of str to float or None
        When each run ended, in seconds since the epoch; None for a run that has not: nothing of it
        is touched. Of a run that is not named, whatever was written so long ago goes.
    now : float
        The time.

    Returns
    -------
    list of str
        Named runs of which something was removed.
    """
    run_of = {_stem(run): run for run in ended}
    removed: set[str] = set()
    for folder in [found for kind in KINDS if (found := state / kind.folder).is_dir()]:
        gone = 0
        for path in list(folder.iterdir()):
            # What a crash left half written begins with a dot.
            run = run_of.get(path.name.removeprefix(".").partition("-")[0])
            since = path.lstat().st_mtime if run is None else ended[run]
            if since is None or now - since < KEPT_DAYS * _DAY:
                continue
            path.unlink(missing_ok=True)
            gone += 1
            removed |= set() if run is None else {run}
        if gone:
            sync_directory(folder)
    return sorted(removed)


class RoundArrays(Protocol):
    """Arrays by round."""

    def recall(self, *, before: int) -> tuple[int, Arrays] | None:
        """What was kept in the newest round before one, and which round that was."""
        ...

    def keep(self, server_round: int, arrays: Arrays) -> None:
        """Keep what a round ended with; older rounds may be forgotten."""
        ...


class ProcessMemory:
    """Kept in this process: for comparison models, which nobody resumes.

    Parameters
    ----------
    kept : int
        How many rounds are kept.
    """

    def __init__(self, *, kept: int = FEWEST_ROUNDS) -> None:
        self._kept, self._rounds = kept, dict[int, Arrays]()

    def recall(self, *, before: int) -> tuple[int, Arrays] | None:
        """The newest round before one."""
        newest = max((n for n in self._rounds if n < before), default=None)
        return None if newest is None else (newest, self._rounds[newest])

    def all(self, rounds: Iterable[int]) -> dict[int, Arrays]:
        """What is kept of these rounds."""
        return {number: self._rounds[number] for number in rounds if number in self._rounds}

    def keep(self, server_round: int, arrays: Arrays) -> None:
        """Keep copies."""
        self._rounds[server_round] = {name: array.copy() for name, array in arrays.items()}
        for old in sorted(self._rounds, reverse=True)[self._kept :]:
            del self._rounds[old]


class CarriedMemory:
    """Kept elsewhere: given before a round, taken after it.

    Attributes
    ----------
    given : (int, mapping of name to array) or None
        What was kept in the newest round before.
    left : mapping of name to array
        What the round ended with.
    """

    def __init__(self) -> None:
        self.given: tuple[int, Arrays] | None = None
        self.left: Arrays = {}

    def recall(self, *, before: int) -> tuple[int, Arrays] | None:
        """What was given."""
        return self.given

    def keep(self, server_round: int, arrays: Arrays) -> None:
        """Have it ready to be taken."""
        self.left = dict(arrays)


class SealedMemory:
    """Sealed files in a site's state folder, one a round.

    What a round ends with is kept in the process until the round's update is released. It is then
    written under the name of that very update, and read only if the update is known as released: one
    commit makes both count, and what a round that came to nothing left behind is never seen.

    Parameters
    ----------
    files : RunFiles
        Of kind `MEMORY`.
    released : callable
        SHA-256 of the update that was released in a round, or None.
    kept : int
        How many rounds are kept.
    """

    def __init__(
        self,
        files: RunFiles,
        *,
        released: Callable[[int], str | None],
        kept: int = FEWEST_ROUNDS,
    ) -> None:
        self._files, self._released, self._kept = files, released, kept
        self._staged: dict[int, bytes] = {}

    def recall(self, *, before: int) -> tuple[int, Arrays] | None:
        """The newest released round before one."""
        for number in reversed([n for n in self._files.rounds() if n < before]):
            digest = self._released(number)
            content = digest and self._files.read(number, name=digest[:_DIGEST])
            if content:
                return number, load(content)
        return None

    def all(self, rounds: Iterable[int]) -> dict[int, Arrays]:
        """What was kept in each of these rounds that was released.

        Raises
        ------
        ReleaseConflict
            A round was released, and what was kept with it is gone.
        """
        found: dict[int, Arrays] = {}
        for number in rounds:
            digest = self._released(number)
            if digest is None:
                continue
            content = self._files.read(number, name=digest[:_DIGEST])
            if content is None:
                raise ReleaseConflict(f"what round {number} left here for later rounds is gone")
            found[number] = load(content)
        return found

    def keep(self, server_round: int, arrays: Arrays) -> None:
        """Keep what a round ended with until it is released, see `promote`."""
        content = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        self._staged = {server_round: bytes(save(content))}

    def promote(self, server_round: int, digest: str) -> None:
        """Write what a round ended with, as that of the update about to be released."""
        content, own = self._staged.pop(server_round, None), digest[:_DIGEST]
        if content is None:
            return
        self._files.write(server_round, content, name=own)
        for name in self._files.names(server_round):
            if name != own:
                self._files.remove(server_round, name=name)
        self._files.prune(below=self._files.rounds()[-self._kept :][0])


Vector = NDArray[np.float32]


def correlated_sums(
    sums: NDArray[np.floating[Any]],
    server_round: int,
    *,
    plan: Plan,
    spans: Sequence[Span],
    missing: Mapping[Part, float],
    memory: ProcessMemory | SealedMemory,
    noise: NoiseSource,
) -> Vector:
    """A round's clipped sums with noise, which is kept: later rounds take back a part of it.

    Parameters
    ----------
    sums : float64 array
        Of the spans, one after the other.
    server_round : int
        From 1.
    plan : Plan
        Says what is taken back.
    spans : sequence of Span
        What the sums are of.
    missing : mapping of part to float
        Standard deviation of the fresh noise.
    memory : ProcessMemory or SealedMemory
        Has the noise of the rounds before, and gets that of this one.
    noise : NoiseSource
        Of the fresh noise.
    """
    made, row = correlated(
        sums,
        rows_before(memory, server_round, bands=plan.privacy.bands),
        column=plan.privacy.column,
        stds=[missing[span.part] for span in spans],
        sizes=[span.size for span in spans],
        noise=noise,
    )
    keep_row(memory, server_round, row)
    return made


def rows_before(
    memory: ProcessMemory | SealedMemory, server_round: int, *, bands: int
) -> dict[int, Row]:
    """Noise of the rounds before one that it may take back from, by how many rounds ago."""
    kept = memory.all(range(max(1, server_round - bands + 1), server_round))
    return {server_round - number: arrays[_ROW] for number, arrays in kept.items()}


def keep_row(memory: ProcessMemory | SealedMemory, server_round: int, row: Row) -> None:
    """Keep a round's noise for `rows_before`."""
    memory.keep(server_round, {_ROW: row})


def with_own_parts(
    adapter: Vector, found: tuple[int, Arrays] | None, kept: Iterable[Span]
) -> Vector:
    """The global adapter with what a site `found` kept in the spans that it keeps."""
    if found is None:
        return adapter
    own = np.array(adapter, dtype=np.float32)
    for span, place in laid_out(kept):
        own[span.start : span.stop] = found[1]["kept"][place]
    return own


class PersonalParts:
    """What the plan's strategy keeps at this site.

    Parameters
    ----------
    plan : Plan
        Names the strategy.
    layout : Layout
        Of the site's adapter.
    memory : RoundArrays
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
        return with_own_parts(adapter, found, self._kept)

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


class ControlVariate:
    """One site's control variate, see `silotune.strategies.scaffold`.

    With option II, plain SGD at the sites and no optimizer at the server, the common variate is the
    mean change of the last round over the summed learning rates of its steps, negated: a site reads
    it off two successive global adapters, and nothing beside them has to travel.

    Parameters
    ----------
    plan : Plan
        With strategy "scaffold".
    layout : Layout
        Of the site's adapter.
    memory : RoundArrays
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
            nothing = np.zeros(sum(s.size for s in spans), dtype=np.float32)
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
            travels.append(np.full(span.size, sum(rates), dtype=np.float32))
        return np.concatenate(travels)
