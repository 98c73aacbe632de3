"""The same apps on Flower's Ray simulation engine: one machine or a Ray cluster.

Flower runs the ServerApp on a thread of this process and the ClientApp in Ray actors. Between them
and the engine stand two thin wrappers that make it behave as `WorkerGrid` does: the program is
loaded once an actor, a site finds its name and the run's settings in its context, errors cross as
codes, and a crash of the engine ends the ServerApp instead of leaving it to wait for its deadline.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import logging
import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from silotune.errors import EnvironmentFault, WorkerDied
from silotune.flower import messages as wire
from silotune.flower.grid import SiteGrid
from silotune.simulation.pool import SiteSlot
from silotune.simulation.workers import (
    SiteProgram,
    answer,
    is_stable_code,
    load_program,
    stable_code,
)

logger = logging.getLogger("silotune.simulation.ray")


_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DISABLE_IMPORT_WARNING": "1",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # as Flower sets it when it is imported
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_worker_niceness": "0",  # Ray's own default is 15: last in the queue for a processor
    "FLWR_TELEMETRY_ENABLED": "0",
}
_POLL_SECONDS = 0.02
_PATIENCE_SECONDS = 60.0


def run_with_ray(
    server_app: ServerApp,
    factory: str,
    payload: Mapping[str, Any],
    *,
    sites: Sequence[SiteSlot],
    workers: int,
    address: str | None = None,
) -> None:
    """Run a ServerApp against simulated sites in Ray actors.

    Parameters
    ----------
    server_app : ServerApp
        Called on a thread of this process with a grid and a context.
    factory, payload
        As of `WorkerGrid`: each actor calls the factory once, with the payload. What the payload
        names, such as files, must be there on every machine of a cluster.
    sites : Sequence[SiteSlot]
        Partition ids follow their order. Node ids are random, and actors take any site, so that
        weights don't matter here.
    workers : int
        Actors on this machine. A cluster has one a CPU.
    address : str, optional
        An existing Ray cluster, such as ``"auto"`` or ``"10.0.0.1:6379"``.

    Raises
    ------
    EnvironmentFault
        Ray isn't installed.
    WorkerDied
        The engine ended before the ServerApp did.
    Exception
        Whatever the ServerApp raised.
    """
    if importlib.util.find_spec("ray") is None:
        raise EnvironmentFault(
            "the Ray engine needs the ray package", remedy="pip install 'silotune[ray]'"
        )
    names = tuple(slot.name for slot in sites)
    server = _RayServerApp(server_app, num_sites=len(names))
    site = _Site(factory, json.dumps(payload), names)
    where = {"address": address} if address else {"num_cpus": max(1, workers)}
    with _quiet_ray():
        _simulate(server, site, num_sites=len(names), where=where)
    if server.failure is not None:
        raise server.failure


def _simulate(server: _RayServerApp, site: _Site, *, num_sites: int, where: dict[str, Any]) -> None:
    from flwr.simulation import run_simulation

    try:
        run_simulation(
            server,
            site,
            num_supernodes=num_sites,
            backend_config={
                "init_args": {**where, "log_to_driver": False},
                "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            },
        )
    except Exception as exc:
        if server.abort():
            raise WorkerDied("Flower's Ray engine ended early; its log has the reason") from exc


class _RayServerApp(ServerApp):
    """The real ServerApp on a grid that can be told of the engine's end."""

    def __init__(self, app: ServerApp, *, num_sites: int) -> None:
        super().__init__()
        self._app, self._num_sites = app, num_sites
        self._aborted, self._finished = threading.Event(), threading.Event()
        self.failure: BaseException | None = None

    def __call__(self, grid: Grid, context: Context) -> None:
        try:
            self._app(_EngineGrid(grid, context.run_id, self._num_sites, self._aborted), context)
        except _EngineEnded:
            pass
        except BaseException as exc:
            self.failure = exc
            raise
        finally:
            self._finished.set()

    def abort(self) -> bool:
        """Make the ServerApp's next call to its grid fail; whether it had not ended by itself."""
        unfinished = not self._finished.is_set()
        self._aborted.set()
        self._finished.wait(_PATIENCE_SECONDS)
        return unfinished


class _EngineEnded(WorkerDied):
    """The engine is gone; what `run_with_ray` raises says so."""


class _EngineGrid(SiteGrid):
    """Flower's in-memory grid, as strict about the wire and about errors as `WorkerGrid`."""

    def __init__(self, grid: Grid, run_id: int, num_sites: int, aborted: threading.Event) -> None:
        super().__init__(run_id)
        self._grid, self._num_sites, self._aborted = grid, num_sites, aborted

    def get_node_ids(self) -> list[int]:
        # The engine starts the ServerApp first and registers the nodes then.
        ends = time.monotonic() + _PATIENCE_SECONDS
        while time.monotonic() < ends:
            self._check()
            nodes = sorted(self._grid.get_node_ids())
            if len(nodes) == self._num_sites:
                return nodes
            time.sleep(_POLL_SECONDS)
        raise WorkerDied("Flower's Ray engine did not register all sites")

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        self._check()
        sent: list[str] = []
        for message in messages:
            copy = wire.fresh_copy(message)
            sent += self._grid.push_messages([copy])
            message.metadata.__dict__["_message_id"] = copy.metadata.message_id
        return sent

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        self._check()
        return [_coded(reply) for reply in self._grid.pull_messages(message_ids)]

    def wait(self, timeout: float) -> None:
        time.sleep(min(timeout, _POLL_SECONDS))

    def _check(self) -> None:
        if self._aborted.is_set():
            raise _EngineEnded("Flower's Ray engine has ended")


class _Site(ClientApp):
    """Ships to the actors in place of the program, which each actor loads for itself."""

    def __init__(self, factory: str, payload: str, names: tuple[str, ...]) -> None:
        super().__init__()
        self._program, self._names = (factory, payload), names

    def __call__(self, message: Message, context: Context) -> Message:
        site = int(context.node_config["partition-id"])
        inner = Context(
            run_id=context.run_id,
            node_id=context.node_id,
            node_config={**context.node_config, "site": self._names[site]},
            state=context.state,
            run_config={},
        )
        try:
            program = _loaded(*self._program)
        except Exception as exc:
            logger.exception("the program can't be loaded")
            return wire.error_reply(message, code=stable_code(exc))
        reply = wire.fresh_copy(answer(program.client_app, message, inner))
        context.state = inner.state
        return reply


@functools.lru_cache(maxsize=1)
def _loaded(factory: str, payload: str) -> SiteProgram:
    return load_program(factory, json.loads(payload))


def _coded(reply: Message) -> Message:
    """The reply; if the engine itself made an error of it (a lost actor), without its text."""
    if not reply.has_error() or is_stable_code(reply.error.reason):
        return reply
    logger.error("the engine reports: %s", reply.error.reason)
    reply.error.__dict__["_reason"] = WorkerDied.code
    return reply


@contextlib.contextmanager
def _quiet_ray() -> Iterator[None]:
    """Ray and Flower without telemetry or dashboard, the environment restored, Ray shut down."""
    before, flower = dict(os.environ), logging.getLogger("flwr")
    level = flower.level
    os.environ.update(_SETTINGS)
    wire.disable_telemetry()
    flower.setLevel(logging.ERROR)
    try:
        yield
    finally:
        flower.setLevel(level)
        import ray

        if ray.is_initialized():
            ray.shutdown()
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)
