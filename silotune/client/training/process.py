"""The daemon's side of the trainer: starts the process, asks, watches the clock, and ends it.

Two kinds of process run the same program. A *survey* may read the base model alone: what the site says
in public of the model (the adapter's layout, the type of its products) comes from it, and so does a
round without records. A *trainer* may read the records too, and from then on is believed in nothing
that can be checked. It is kept between rounds, and ended after the run or when nothing was asked of it
for ``resources.keep_warm`` seconds; a fault ends it, and the next question starts another.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray

from silotune.client.errors import (
    IsolationMissing,
    TrainerAnswerInvalid,
    TrainerDied,
    TrainerFault,
    TrainerNotStarted,
)
from silotune.client.isolation.confinement import Protection, require
from silotune.client.training import messages as m
from silotune.client.training.base import (
    LoadedAs,
    Prior,
    RecordsRead,
    Trained,
    TrainingJob,
    Vector,
    sums_of,
)
from silotune.client.training.bounds import table_of
from silotune.client.training.launcher import Launcher
from silotune.data.site import ProtectionName, SiteConfig
from silotune.data.values import Rule
from silotune.errors import AdapterMismatch, SilotuneError, catalogue
from silotune.logs import JsonFormatter
from silotune.models.layout import Layout

logger = logging.getLogger(__name__)

_LONGEST_LOAD = 3600.0
_LONGEST_START, _LAST_SECONDS = 120.0, 2.0
_SURVEY_SECONDS = 30.0  # that a survey is kept for another question
_ARRAYS = (
    64  # bytes a number of the adapter: in float64, and what is kept with an optimizer's state
)
_SMALL = 1 << 20

_A = TypeVar("_A", bound=m.Said)


class TrainerProcess:
    """One process, from its start to its end.

    Parameters
    ----------
    begin : Begin or None
        What it is for; None if there is no run.
    launcher : Launcher
        Starts it.
    model, dataset : str
        What it may open, by the names of the launcher's table; empty for nothing.
    required : collection of str
        Protections that have to be in force.

    Raises
    ------
    TrainerNotStarted
        It could not be started, or ended at once.
    IsolationMissing
        A required protection is not in force.
    """

    def __init__(
        self,
        begin: m.Begin | None,
        *,
        launcher: Launcher,
        model: str,
        dataset: str,
        required: Collection[ProtectionName],
    ) -> None:
        self._launcher, self.pid = launcher, 0
        self._connection, child = socket.socketpair()
        self.started = self.used = time.monotonic()
        try:
            with child:
                self.pid = launcher.start(
                    child, work="train", model=model, dataset=dataset, **_log_settings()
                )
            begun, _ = self._answer(m.Begun, most=0, seconds=_LONGEST_START)
            self.protections = tuple(
                Protection(name=cast(ProtectionName, p.name), in_force=p.in_force, reason=p.reason)
                for p in begun.protections
            )
            require(self.protections, required)
            if begin is not None:
                self.ask(begin, m.Begun, seconds=_LONGEST_START)
        except (OSError, SilotuneError) as exc:
            self.end()
            if isinstance(exc, IsolationMissing):
                raise
            raise TrainerNotStarted(str(exc)) from exc

    def ask(
        self,
        question: m.Said,
        kind: type[_A],
        arrays: Mapping[str, NDArray[Any]] | None = None,
        *,
        seconds: float,
        most: int = 0,
    ) -> tuple[_A, m.Arrays]:
        """Ask, and wait for the answer; whatever fails ends the process.

        Raises
        ------
        TrainerFault
            Of some kind: it died, took too long, or gave no such answer.
        SilotuneError
            What it says that it failed on; the process lives.
        """
        self.used = time.monotonic()
        try:
            self._connection.settimeout(seconds)
            m.send(self._connection, question, arrays)
            answer = self._answer(kind, most=most, seconds=seconds)
        except OSError as exc:
            raise self._ended(TrainerDied(exc.strerror or str(exc))) from exc
        except TrainerFault as exc:
            raise self._ended(exc) from exc
        self.used = time.monotonic()
        return answer

    def _answer(self, kind: type[_A], *, most: int, seconds: float) -> tuple[_A, m.Arrays]:
        answer, arrays = m.receive_answer(self._connection, most=most, seconds=seconds)
        if isinstance(answer, m.Failed):
            raise _error_of(answer)
        if not isinstance(answer, kind):
            raise TrainerAnswerInvalid(f"it is a {answer.kind!r}")
        return answer, arrays

    def _ended(self, fault: TrainerFault) -> TrainerFault:
        """End the process, and say how it ended if that is the fault."""
        if type(fault) is TrainerFault or not self.pid:
            return fault  # it said so itself, and lives
        code = None
        if isinstance(fault, TrainerDied):
            with suppress(OSError):
                code = self._launcher.ended(self.pid, seconds=_LAST_SECONDS)
        self.end()
        if code is None:
            return fault
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return TrainerDied(f"the trainer ended with {how}")

    def end(self) -> None:
        """End it, now; its memory, devices and scratch folder are given back."""
        self._connection.close()
        if self.pid:
            self._launcher.end(self.pid)

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        try:
            return self._launcher.ended(self.pid) is None
        except OSError:
            return False


def look_at(site: SiteConfig, name: str, *, rule: Rule) -> m.Looked:
    """Have a trainer of one's own read a dataset, confined as in a run: before there is one.

    Raises
    ------
    IsolationMissing, TrainerNotStarted, TrainerFault
        It can't be had here, or failed.
    SilotuneError
        What it says that reading failed on.
    """
    alone = site.model_copy(update={"datasets": {name: site.dataset(name)}, "policy": None})
    with tempfile.TemporaryDirectory(prefix="silotune-") as folder:
        launcher = Launcher(table_of(alone, scratch=Path(folder) / "trainers"))
        with closing(launcher):
            required = site.isolation.require
            process = TrainerProcess(
                None, launcher=launcher, model="", dataset=name, required=required
            )
            asked = m.AskLook(site=_site_json(site, name), folder=str(site.folder), rule=rule)
            return process.ask(asked, m.Looked, seconds=_LONGEST_LOAD)[0]


def start_costs(launcher: Launcher) -> Callable[[socket.socket], Callable[[], None]]:
    """What starts a process that computes costs, for `silotune.privacy.costs.compute_apart`."""

    def start(connection: socket.socket) -> Callable[[], None]:
        pid = launcher.start(connection, work="costs", model="", dataset="", **_log_settings())
        return partial(launcher.end, pid)

    return start


def _log_settings() -> dict[str, str]:
    handlers = logging.getLogger().handlers
    as_json = any(isinstance(handler.formatter, JsonFormatter) for handler in handlers)
    level = logging.getLevelName(logging.getLogger().getEffectiveLevel()).lower()
    return {"style": "json" if as_json else "text", "level": level}


def _error_of(failed: m.Failed) -> SilotuneError:
    kinds = {kind.code: kind for kind in catalogue()}
    return kinds.get(failed.code, TrainerFault)(failed.detail, remedy=failed.remedy or None)


@dataclass
class _Surveyed:
    """What surveys found out of one plan and base model."""

    layout: Layout | None = None
    loaded: m.ModelLoaded | None = None


class TrainerProcesses:
    """Gives each run a training in processes of its own.

    Parameters
    ----------
    site : SiteConfig
        Its ``[resources]`` hold for every process.
    launcher : Launcher
        Starts them.
    chosen : mapping, optional
        ``device``, ``dtype`` and ``attention`` to compute with, if they are not chosen there.
    """

    def __init__(
        self, site: SiteConfig, *, launcher: Launcher, chosen: Mapping[str, str] | None = None
    ) -> None:
        self.site, self.launcher = site, launcher
        self.chosen = chosen or {"device": site.resources.device, "dtype": "", "attention": ""}
        self.surveyed: dict[tuple[str, str, int], _Surveyed] = {}
        self._all: WeakSet[ProcessTraining] = WeakSet()

    def training(self, job: TrainingJob) -> ProcessTraining:
        """The training of a run: nothing is started for it yet."""
        training = ProcessTraining(job, self)
        self._all.add(training)
        return training

    def close(self) -> None:
        """End every process."""
        for training in list(self._all):
            training.close()

    def describe(self) -> dict[str, Any] | None:
        """The trainer as `silotune site status` tells it; None if there is none."""
        found = [told for training in list(self._all) if (told := training.describe())]
        return found[0] if found else None


class ProcessTraining:
    """A run's training, by way of its processes.

    Parameters
    ----------
    job : TrainingJob
        Whose records, for which plan.
    processes : TrainerProcesses
        The site's.
    """

    def __init__(self, job: TrainingJob, processes: TrainerProcesses) -> None:
        self._job, self._processes = job, processes
        self._lock = threading.RLock()
        self._survey: TrainerProcess | None = None
        self._trainer: TrainerProcess | None = None
        self._timer: threading.Timer | None = None

    # --- of the base model alone ---

    def layout(self) -> Layout:
        """The adapter's layout at the plan's rank; no weight is loaded for it."""
        found = self._surveyed
        if self._job.plan.only_sums:
            return sums_of(self._job.plan).layout
        if found.layout is None:
            answer, _ = self._of_survey(m.AskLayout(), m.LayoutFound)
            found.layout = _layout(answer.layout)
        return found.layout

    def loaded(self) -> LoadedAs:
        """Load the model and try it, where no record is read."""
        if self._job.plan.statistics is not None:
            return sums_of(self._job.plan)
        found = self._model_loaded()
        return LoadedAs(layout=_layout(found.layout), dtype=found.dtype)

    def weights_sha256(self) -> str | None:
        """Hash of the base model's weights here: the plan's, which was checked when they were loaded."""
        if self._job.plan.model.sha256 is not None or not self._job.base:
            return self._job.plan.model.sha256
        return self._of_survey(m.AskWeights(), m.WeightsFound)[0].sha256

    def blank(
        self, adapter: Vector, server_round: int, *, clip: float | None, prior: Prior | None
    ) -> Trained:
        """A round without records, in a process that can't read any."""
        size = self.loaded().layout.size
        sigma = self._job.sigma()
        asked = m.AskRound(
            round=server_round, clip=clip, prior=_number(prior), sigma=sigma, blank=True
        )
        given = {"adapter": adapter, **_named(prior)}
        return _trained(*self._of_survey(asked, m.RoundDone, given, most=_most(size)))

    # --- on records ---

    def prepare(self) -> None:
        """Start the trainer, which reads the records."""
        with self._in_use():
            self._ready()

    def round(
        self, adapter: Vector, server_round: int, *, clip: float | None, prior: Prior | None
    ) -> Trained:
        """The steps of a round, within the plan's deadline."""
        sigma = self._job.sigma()
        asked = m.AskRound(
            round=server_round, clip=clip, prior=_number(prior), sigma=sigma, blank=False
        )
        given = {"adapter": adapter, **_named(prior)}
        size = self.loaded().layout.size
        with self._in_use():
            return _trained(*self._work(asked, m.RoundDone, given, most=_most(size)))

    def tables(self, adapter: Vector, *, prior: Prior | None) -> Mapping[str, NDArray[np.float64]]:
        """Counts on the validation units, within the plan's deadline."""
        given = {"adapter": adapter, **_named(prior)}
        with self._in_use():
            _, arrays = self._work(m.AskTables(prior=_number(prior)), m.TablesCounted, given)
        return arrays

    def close(self) -> None:
        """End the processes."""
        with self._lock:
            self._stop_timer()
            for process in (self._survey, self._trainer):
                if process is not None:
                    process.end()
            self._survey = self._trainer = None

    def describe(self) -> dict[str, Any] | None:
        """The trainer's process, as JSON values."""
        process = self._trainer
        if process is None or not process.alive:
            return None
        return {
            "pid": process.pid,
            "memory_mb": round(_memory(process.pid) / 1e6, 1),
            "seconds": round(time.monotonic() - process.started, 1),
            "idle": round(time.monotonic() - process.used, 1),
            "protections": [asdict(layer) for layer in process.protections],
        }

    # --- inside ---

    @property
    def _surveyed(self) -> _Surveyed:
        job = self._job
        key = (job.plan.sha256, job.base, job.rank)
        return self._processes.surveyed.setdefault(key, _Surveyed())

    def _model_loaded(self) -> m.ModelLoaded:
        found = self._surveyed
        if found.loaded is None:
            found.loaded, _ = self._of_survey(m.AskLoaded(), m.ModelLoaded)
        return found.loaded

    def _of_survey(
        self,
        question: m.Said,
        kind: type[_A],
        arrays: Mapping[str, NDArray[Any]] | None = None,
        *,
        most: int = 0,
    ) -> tuple[_A, m.Arrays]:
        with self._in_use():
            if self._survey is None or not self._survey.alive:
                self._survey = self._started(records=False)
            return self._survey.ask(question, kind, arrays, seconds=_LONGEST_LOAD, most=most)

    def _work(
        self,
        question: m.Said,
        kind: type[_A],
        given: Mapping[str, NDArray[Any]],
        most: int = _SMALL,
    ) -> tuple[_A, m.Arrays]:
        seconds = self._job.plan.rounds.deadline
        return self._ready().ask(question, kind, given, seconds=seconds, most=most)

    def _ready(self) -> TrainerProcess:
        """The trainer, started and with the records read."""
        if self._trainer is not None and self._trainer.alive:
            return self._trainer
        counts = self._job.plan.statistics is not None  # which need no model
        expected = None if counts else self._model_loaded()
        if self._survey is not None:
            self._survey.end()
            self._survey = None
        trainer = self._started(records=True)
        try:
            if expected is not None:
                loaded, _ = trainer.ask(m.AskLoaded(), m.ModelLoaded, seconds=_LONGEST_LOAD)
                if loaded != expected:
                    raise TrainerAnswerInvalid("its model is not the one that the site told of")
            read, _ = trainer.ask(
                m.AskPrepared(sigma=self._job.sigma()), m.Prepared, seconds=_LONGEST_LOAD
            )
        except Exception:
            trainer.end()
            raise
        self._trainer = trainer
        self._job.on_records(
            RecordsRead(
                records=read.records,
                rows_left_out=read.rows_left_out,
                left_out=read.left_out,
                fingerprint=read.fingerprint,
            )
        )
        return trainer

    def _started(self, *, records: bool) -> TrainerProcess:
        job, site, chosen = self._job, self._processes.site, self._processes.chosen
        found = self._surveyed.loaded
        begin = m.Begin(
            plan=job.plan.canonical(),
            site=_site_json(job.site, job.plan.data.dataset),
            folder=str(job.site.folder),
            base=job.base,
            rank=job.rank,
            secret=job.secret().hex() if records else "",
            device=found.device if found else chosen["device"],
            dtype=found.dtype if found else chosen["dtype"],
            attention=found.attention if found else chosen["attention"],
            trial=found is None,
            threads=site.resources.threads or 0,
        )
        return TrainerProcess(
            begin,
            launcher=self._processes.launcher,
            model=job.base,
            dataset=job.plan.data.dataset if records else "",
            required=site.isolation.require,
        )

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        """Nobody ends the processes meanwhile; afterwards they are kept for a time."""
        with self._lock:
            self._stop_timer()
            try:
                yield
            finally:
                warm = self._trainer is not None and self._trainer.alive
                seconds = self._processes.site.resources.keep_warm if warm else _SURVEY_SECONDS
                self._timer = _later(seconds, self.close)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _later(seconds: float, call: Callable[[], None]) -> threading.Timer:
    timer = threading.Timer(seconds, call)
    timer.daemon = True
    timer.start()
    return timer


def _layout(text: str) -> Layout:
    try:
        return Layout.from_json(text)
    except AdapterMismatch as exc:
        raise TrainerAnswerInvalid(exc.detail) from exc


def _site_json(site: SiteConfig, name: str) -> str:
    dataset = site.dataset(name)
    told = dataset.model_dump(mode="json", exclude_unset=True, exclude={"budget"})
    if dataset.url is not None:
        told["url"] = "${SILOTUNE_DATABASE_URL}"
    return json.dumps({"name": site.name, "datasets": {name: told}})


def _number(prior: Prior | None) -> int | None:
    return None if prior is None else prior[0]


def _named(prior: Prior | None) -> dict[str, NDArray[Any]]:
    return {} if prior is None else {f"prior:{name}": array for name, array in prior[1].items()}


def _most(size: int) -> int:
    return _ARRAYS * size + _SMALL


def _trained(done: m.RoundDone, arrays: m.Arrays) -> Trained:
    if "flat" not in arrays:
        raise TrainerAnswerInvalid("it has no update")
    kept = {name.removeprefix("kept:"): array for name, array in arrays.items() if name != "flat"}
    return Trained(flat=arrays["flat"], kept=kept, records=done.records)


def _memory(pid: int) -> int:
    """Bytes that a process has in memory; 0 if it is gone."""
    with suppress(OSError, ValueError):
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    return 0
