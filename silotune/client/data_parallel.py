"""Several processes for one site's steps, each on a device of its own, through Accelerate.

Every process holds the model and the records, and is asked the same questions. The first one draws a
step's units, whole micro-batches are dealt out, each process clips its own units, and the clipped sums
are added up; what the first one makes of the total, noise included, is what all go on with. So a unit is
never split, noise is added once, and a step is the same as in one process but for the order in which
numbers in float64 are added.

The processes are forks of the trainer, made after it has entered a network of its own, and talk by Gloo
over its loopback. That is right for GPUs too: what is added up is an adapter, some megabytes a step, and
what NCCL would need (shared memory, sockets beyond those of TCP) stays closed. If one of them dies, so
do all, and the round fails as by any trainer's death.

Nothing is imported here that starts threads: it would be there before the process is confined.
"""

from __future__ import annotations

import ctypes
import logging
import math
import os
import select
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

from silotune.data.site import ResourcesConfig
from silotune.errors import SelfCheckFailed

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor, nn

    Rows = tuple[list[int], NDArray[np.int64]]
    """A micro-batch: record numbers, and for each the number of its unit within the batch."""

_log = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1
_LOST = 71  # exit code of a process whose others are gone
_PATIENCE = timedelta(days=7)  # the daemon's deadline comes first


def processes_for(resources: ResourcesConfig) -> int:
    """How many processes a site's trainer is: one for each GPU that it may use, else one.

    It is known before PyTorch is imported, from the driver's devices and ``CUDA_VISIBLE_DEVICES``. On
    processors alone it is what ``resources.devices`` says.
    """
    if resources.device == "cpu":
        return resources.devices or 1
    if ":" in resources.device:
        return 1
    found = len([path for path in Path("/dev").glob("nvidia*") if path.name[6:].isdigit()])
    if (chosen := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        found = min(found, len([name for name in chosen.split(",") if name.strip()]))
    return max(1, min(resources.devices or found, found))


@dataclass
class Ranks:
    """A process among those that share a site's steps; alone until `fork`.

    Attributes
    ----------
    rank, size : int
        Which one it is, from 0, and how many there are.
    leader : socket or None
        Where the first one tells this one what it was asked; None in the first.
    """

    rank: int = 0
    size: int = 1
    leader: socket.socket | None = None
    _followers: list[socket.socket] = field(default_factory=list)
    _meeting: str = ""
    _differs: bool = False
    _shared: Exception | None = None

    # --- processes ---

    def fork(self, size: int, *, scratch: Path) -> None:
        """Start the others: copies of this process, which has one thread and has imported no library.

        Parameters
        ----------
        size : int
            How many there are to be, with this one.
        scratch : Path
            Folder in which they find one another.
        """
        first, self.size, self._meeting = os.getpid(), size, f"file://{scratch / 'ranks'}"
        for rank in range(1, size):
            ours, theirs = socket.socketpair()
            if os.fork() == 0:
                ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
                if os.getppid() != first:
                    os._exit(_LOST)
                for link in (*self._followers, ours):
                    link.close()
                self.rank, self.leader, self._followers = rank, theirs, []
                return
            theirs.close()
            self._followers.append(ours)

    def tell(self, send: Callable[..., None], *asked: Any) -> None:
        """Have the others do what this one was asked: ``send(socket, *asked)`` to each."""
        for link in self._followers:
            try:
                send(link, *asked)
            except OSError:
                self._lose("a process of the trainer is gone")

    def join(self) -> None:
        """Meet the others, once; with PyTorch imported."""
        if self.size == 1 or not self._meeting:
            return
        threading.Thread(target=self._end_with, daemon=True).start()
        import torch
        from accelerate import PartialState

        os.environ |= {
            "RANK": str(self.rank),
            "LOCAL_RANK": str(self.rank),
            "WORLD_SIZE": str(self.size),
            "LOCAL_WORLD_SIZE": str(self.size),
            "GLOO_SOCKET_IFNAME": "lo",
        }
        threads = torch.get_num_threads()
        PartialState(cpu=True, backend="gloo", init_method=self._meeting, timeout=_PATIENCE)
        torch.set_num_threads(threads)  # Accelerate sets its own where OMP_NUM_THREADS does not
        self._meeting = ""

    def _end_with(self) -> None:
        """End the process as soon as another one has, whatever it is doing."""
        gone = select.poll()
        for link in (*self._followers, *([self.leader] if self.leader else [])):
            gone.register(link, select.POLLRDHUP)
        gone.poll()
        self._lose("a process of the trainer is gone")

    def device(self, wanted: str) -> str:
        """The device of this process, where `wanted` is that of a trainer alone."""
        return wanted if self.size == 1 or wanted == "cpu" else f"cuda:{self.rank}"

    def end_unless_shared(self, fault: Exception) -> None:
        """End the process after a round that failed in it alone: the others wait for it in a step."""
        if self.size > 1 and fault is not self._shared:
            self._lose("a round failed outside of its steps")

    def _lose(self, why: str) -> NoReturn:
        _log.error("%s; this one ends too", why)
        logging.shutdown()
        os._exit(_LOST)

    # --- a step ---

    def micro_batch(self, most: int, *, expected: float, unit: int) -> int:
        """Most records of a micro-batch: small enough for all to have one, and not below a unit's."""
        return most if self.size == 1 else min(most, max(unit, math.ceil(expected / self.size)))

    def deal(self, drawn: Sequence[Rows], *, data: Callable[[], bytes]) -> tuple[list[Rows], int]:
        """The process's part of what the first one drew, and how many records were drawn in all.

        Parameters
        ----------
        drawn : sequence of (rows, units)
            The micro-batches that this process drew; those of the first one count.
        data : callable
            SHA-256 of the records, which must be the same everywhere.
        """
        if self.size == 1:
            return list(drawn), sum(len(rows) for rows, _ in drawn)
        import numpy as np

        own = np.frombuffer(data(), dtype=np.int64)
        sizes = [len(rows) for rows, _ in drawn] if self.rank == 0 else []
        head = self._from_first(np.array([len(sizes), *own], dtype=np.int64))
        self._differs = not np.array_equal(head[1:], own)
        sizes = self._from_first(_filled(sizes, int(head[0]))).tolist()
        parts = [np.asarray(each, dtype=np.int64) for batch in drawn for each in batch]
        text = np.concatenate(parts) if parts and self.rank == 0 else np.zeros(0, dtype=np.int64)
        text = self._from_first(_filled(text, 2 * sum(sizes)))
        edges = np.cumsum([2 * size for size in sizes])[:-1]
        pairs = [np.split(each, 2) for each in np.split(text, edges)] if sizes else []
        mine = [(rows.tolist(), units) for rows, units in pairs[self.rank :: self.size]]
        return mine, sum(sizes)

    @contextmanager
    def adding(self, parameters: Sequence[nn.Parameter], *, private: bool) -> Iterator[None]:
        """Within it each process accumulates its part; at the end each has the sum of all.

        Raises
        ------
        SelfCheckFailed
            Another process failed in its part; this one's own failure comes as it is.
        """
        if self.size == 1:
            yield
            return
        fault: Exception | None = None
        try:
            yield
        except Exception as exc:
            fault = exc
        if self._differs:
            fault = SelfCheckFailed("the processes of the trainer have read different records")
        name = "summed_grad" if private else "grad"
        failed = self._sum(parameters, name, failed=fault is not None)
        if failed:
            told = SelfCheckFailed("another process of the trainer failed; its log says in what")
            self._shared = fault or told
            raise self._shared

    def _sum(self, parameters: Sequence[nn.Parameter], name: str, *, failed: bool) -> bool:
        """Add up a step's sums over all processes; whether one of them failed."""
        import torch

        flat = [
            torch.zeros(p.numel(), dtype=torch.float64)
            if failed or (held := getattr(p, name)) is None
            else held.detach().reshape(-1).double().cpu()
            for p in parameters
        ]
        vector = torch.cat([*flat, torch.tensor([float(failed)], dtype=torch.float64)])
        total = self._together(lambda accelerate: accelerate.reduce(vector, "sum"))
        for parameter, part in zip(
            parameters, torch.split(total[:-1], [*map(len, flat)]), strict=True
        ):
            dtype = torch.float64 if name == "summed_grad" else parameter.dtype
            setattr(parameter, name, part.view(parameter.shape).to(parameter.device, dtype))
        return bool(total[-1] > 0)

    def as_first(self, tensors: list[Tensor]) -> list[Tensor]:
        """The first process's tensors, of these shapes and one type, in all of them."""
        if self.size == 1:
            return tensors
        import torch

        flat = torch.cat([tensor.detach().reshape(-1).cpu() for tensor in tensors])
        flat = self._together(lambda accelerate: accelerate.broadcast(flat))
        parts = torch.split(flat, [tensor.numel() for tensor in tensors])
        return [p.view(t.shape).to(t.device) for p, t in zip(parts, tensors, strict=True)]

    def _from_first(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        import torch

        if not len(numbers):
            return numbers
        sent = torch.from_numpy(numbers)
        found = self._together(lambda accelerate: accelerate.broadcast(sent))
        return cast("NDArray[np.int64]", found.numpy())

    def _together(self, exchange: Callable[[Any], Tensor]) -> Tensor:
        from accelerate import utils

        self.join()
        try:
            return exchange(utils)
        except RuntimeError as exc:  # Gloo's: the other end is closed
            self._lose(f"a process of the trainer is gone ({exc})")


def _filled(found: Sequence[int] | NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """The first process's numbers, or room for them."""
    import numpy as np

    return np.array(found, dtype=np.int64) if len(found) else np.zeros(size, dtype=np.int64)
