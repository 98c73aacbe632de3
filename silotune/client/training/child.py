"""The trainer: a process that reads records and trains, with one socket to the daemon and nothing else.

Started by the launcher, with two descriptors: the socket, and a pipe that says what the process may
touch. It confines itself to that before it imports a library that starts threads, and before it is told
anything of a site. Then it answers one question after the other until the daemon is gone.
"""

from __future__ import annotations

import errno
import json
import os
import select
import socket
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from silotune.client.data_parallel import Ranks
from silotune.client.isolation.confinement import Confinement, confine
from silotune.client.training.database import looked_up
from silotune.errors import SilotuneError

if TYPE_CHECKING:
    from silotune.client.model_cache import LocalTraining, ModelCache
    from silotune.client.training.messages import (
        Arrays,
        AskLook,
        AskRound,
        Begin,
        Question,
        Said,
    )

_URL = "SILOTUNE_DATABASE_URL"


def main() -> None:
    """Answer questions until there are no more."""
    descriptor, told_bounds, work, style, level = sys.argv[1:]
    connection = socket.socket(fileno=int(descriptor))
    with os.fdopen(int(told_bounds), "rb") as pipe:
        bounds = json.loads(pipe.read())
    if bounds["url"]:
        place = bounds["reach"]
        os.environ[_URL] = looked_up(bounds["url"], tuple(place)) if place else bounds["url"]
    confinement, ranks = _confinement(bounds), Ranks()
    scratch, devices = confinement.write[0], bounds["devices"]
    protections = confine(confinement, share=lambda: ranks.fork(devices, scratch=scratch))
    if ranks.leader is not None:  # the daemon is the first process's to talk to
        connection.close()
        connection = ranks.leader
    threading.Thread(target=_end_with, args=(connection,), daemon=True).start()
    # Only now: their threads are bound too.
    from silotune.client.training.messages import Begun, LayerOfIsolation, send, told
    from silotune.logs import configure
    from silotune.privacy import costs

    configure(style="json" if style == "json" else "text", level=level)
    if work == "costs":
        costs.serve(connection)
        return
    layers = tuple(
        LayerOfIsolation(name=layer.name, in_force=layer.in_force, reason=told(layer.reason))
        for layer in protections
    )
    if ranks.leader is None:
        send(connection, Begun(protections=layers))
    _Answers(connection, ranks).serve()


def _confinement(bounds: dict[str, Any]) -> Confinement:
    """What the launcher said, read."""
    reach = bounds["reach"]
    return Confinement(
        read=tuple(map(Path, bounds["read"])),
        write=tuple(map(Path, bounds["write"])),
        reach=None if reach is None else (reach[0], reach[1]),
        memory=None if bounds["memory"] is None else bounds["memory"] // bounds["devices"],
        processes=bounds["processes"],
        gpu=bounds["gpu"],
        loopback=bounds["devices"] > 1,
    )


def _end_with(connection: socket.socket) -> None:
    """End the process when the daemon is gone, also in the middle of its work: nobody is left to ask."""
    hung_up = select.poll()
    hung_up.register(connection, select.POLLRDHUP)
    hung_up.poll()
    os._exit(0)


class _Answers:
    """Answers the daemon's questions with a training in this process, and others where they share it."""

    def __init__(self, connection: socket.socket, ranks: Ranks) -> None:
        self._connection, self._ranks = connection, ranks
        self._training: LocalTraining | None = None
        self._models: ModelCache | None = None
        self._read: Any = None
        self._sigma = 0.0

    def serve(self) -> None:
        """One question after the other."""
        from silotune.client.training import messages as m

        while (asked := m.receive_question(self._connection)) is not None:
            question, given = asked
            shared = isinstance(question, m.Begin | m.AskPrepared | m.AskRound)
            if shared:
                self._ranks.tell(m.send, question, given)
            fault: Exception | None = None
            try:
                answer, arrays = self._answer(question, given)
            except Exception as exc:
                answer, arrays, fault = _failure(exc), {}, exc
            if self._ranks.leader is None:
                m.send(self._connection, answer, arrays)
            if fault is not None and isinstance(question, m.AskRound):
                self._ranks.end_unless_shared(fault)

    def _answer(self, question: Question, given: Arrays) -> tuple[Said, Arrays]:
        from silotune.client.training import messages as m

        if isinstance(question, m.Begin):
            self._begin(question)
            return m.Begun(protections=()), {}
        if isinstance(question, m.AskLook):
            return _looked(question), {}
        training = self._training
        assert training is not None  # the daemon begins with a Begin
        if isinstance(question, m.AskPrepared | m.AskRound):
            self._sigma = question.sigma
        answer: m.Said
        arrays: m.Arrays = {}
        match question:
            case m.AskLayout():
                answer = m.LayoutFound(layout=training.layout().to_json())
            case m.AskLoaded():
                answer = self._loaded(training)
            case m.AskWeights():
                answer = m.WeightsFound(sha256=training.weights_sha256() or "")
            case m.AskPrepared():
                training.prepare()
                answer = self._prepared()
            case m.AskRound():
                answer, arrays = _round(training, question, given)
            case m.AskTables():
                prior = _prior(question.prior, given)
                answer, arrays = m.TablesCounted(), training.tables(given["adapter"], prior=prior)
        return answer, arrays

    def _prepared(self) -> Said:
        from silotune.client.training.messages import Prepared, few

        return Prepared(
            records=self._read.records,
            rows_left_out=self._read.rows_left_out,
            left_out=few(self._read.left_out),
            fingerprint=self._read.fingerprint,
        )

    def _begin(self, begin: Begin) -> None:
        import torch

        from silotune.client.model_cache import LocalTraining, ModelCache
        from silotune.client.training.base import TrainingJob
        from silotune.data.site import SiteConfig
        from silotune.models.choices import Choices
        from silotune.plan.plan import Plan

        if begin.threads:
            torch.set_num_threads(max(1, begin.threads // self._ranks.size))
        device = self._ranks.device(begin.device)
        told = {"device": device, "dtype": begin.dtype, "attention": begin.attention}
        choices = Choices(**told) if begin.dtype else None
        self._models = ModelCache(choices, device=device, trial=begin.trial)
        job = TrainingJob(
            site=SiteConfig.from_mapping(json.loads(begin.site), folder=Path(begin.folder)),
            plan=Plan.from_canonical(begin.plan),
            base=begin.base,
            rank=begin.rank,
            sigma=lambda: self._sigma,
            secret=lambda: bytes.fromhex(begin.secret),
            on_records=lambda found: setattr(self, "_read", found),
        )
        self._training = LocalTraining(job, self._models, ranks=self._ranks)

    def _loaded(self, training: LocalTraining) -> Said:
        from silotune.client.training.messages import ModelLoaded

        model, loaded = training.trainable.model, training.loaded()
        return ModelLoaded(
            layout=loaded.layout.to_json(),
            dtype=loaded.dtype,
            device=str(model.device),
            attention=model.attention,
        )


def _round(training: LocalTraining, asked: AskRound, given: Arrays) -> tuple[Said, Arrays]:
    from silotune.client.training.messages import RoundDone

    work = training.blank if asked.blank else training.round
    prior = _prior(asked.prior, given)
    done = work(given["adapter"], asked.round, clip=asked.clip, prior=prior)
    kept = {f"kept:{name}": array for name, array in done.kept.items()}
    return RoundDone(records=done.records), {"flat": done.flat, **kept}


def _prior(number: int | None, given: Arrays) -> tuple[int, Arrays] | None:
    if number is None:
        return None
    named = {name.partition(":")[2]: a for name, a in given.items() if name.startswith("prior:")}
    return number, named


def _looked(asked: AskLook) -> Said:
    """What the doctor is told: of foreign errors the kind alone, since they may quote a record."""
    from silotune.client.training.look import look

    try:
        return look(asked)
    except Exception as exc:
        return _failed(exc, type(exc).__name__)


def _failure(exc: Exception) -> Said:
    """What the daemon is told of an error; the log has all of it."""
    import logging

    logging.getLogger(__name__).error("the training failed", exc_info=exc)
    return _failed(exc, f"{type(exc).__name__}: {exc}")


def _failed(exc: Exception, detail: str) -> Said:
    from silotune.client.errors import TrainerDiskFull, TrainerFault, TrainerOutOfMemory
    from silotune.client.training.messages import Failed, told

    code, remedy = TrainerFault.code, ""
    if isinstance(exc, SilotuneError):
        code, detail, remedy = exc.code, exc.detail, exc.remedy
    elif isinstance(exc, MemoryError) or "out of memory" in str(exc) or _ALLOCATOR in str(exc):
        code = TrainerOutOfMemory.code
    elif isinstance(exc, OSError) and exc.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
        code = TrainerDiskFull.code
    name = type(exc).__name__[:64]
    return Failed(code=code, error=name, detail=told(detail), remedy=told(remedy))


_ALLOCATOR = "can't allocate memory"  # how PyTorch's allocator for the CPU begins

if __name__ == "__main__":
    main()
