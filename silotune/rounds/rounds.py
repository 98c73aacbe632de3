"""The coordinator's Flower ServerApp: join, rounds, checkpoints, resume; in simulation and deployment.

The loop is ours rather than Flower's `Strategy.start`, which begins at round 1 always, collects every
reply before it aggregates, waits for ever for missing nodes and keeps nothing across a crash.

How unlike the others a site's update is, where the coordinator sees updates, is a modified z-score
(Iglewicz and Hoaglin, How to Detect and Handle Outliers, 1993) over logarithms of the updates' norms:
robust, as it uses medians, and free of scale. It finds what is too large or too small; a lie of ordinary
size it can't see, and robust strategies (docs/strategies.md) are for that.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import replace
from statistics import median
from typing import Any, Protocol

import numpy as np
from flwr.app import ArrayRecord, Context, Message
from flwr.serverapp import Grid, ServerApp
from numpy.typing import NDArray

from silotune.errors import QuorumLost, RunDirectoryInvalid, SiteReportedError, UpdateRejected
from silotune.events import tracing
from silotune.flower.grid import exchange
from silotune.models.layout import Layout, Vector
from silotune.models.start import FindStart, in_folder, start_adapter
from silotune.plan.plan import Plan
from silotune.privacy.errors import MessageMalformed
from silotune.protocol.replies import JoinReply, TrainReply, error_code
from silotune.protocol.requests import JoinRequest, TrainRequest, as_arrays
from silotune.rounds import estimates, votes
from silotune.rounds.draw import drawn
from silotune.rounds.secure_rounds import SecureRounds
from silotune.strategies import strategy_for
from silotune.strategies.base import AdapterStrategy, Terms
from silotune.strategies.linear import LinearStrategy
from silotune.strategies.secure import encoding_for
from silotune.strategies.server_optimizer import phase_of
from silotune.strategies.sums import Sums

FEWEST = 4
"""With fewer sites there are no "others" to speak of: no scores."""

_NORMAL = 0.6745  # of a normal distribution, the deviation that half of all values stay within
_FLOOR = 0.05  # norms within some 5 % of each other are alike, however alike the rest are
_SILENT = 1e-30  # an update of zeros has a norm too


def scores(norms: Mapping[str, float]) -> dict[str, float]:
    """Score of each site from the norm of its update; empty with fewer than `FEWEST` sites."""
    if len(norms) < FEWEST:
        return {}
    logs = {site: math.log(max(norm, _SILENT)) for site, norm in norms.items()}
    centre = median(logs.values())
    spread = max(median(abs(value - centre) for value in logs.values()), _FLOOR)
    return {site: _NORMAL * abs(value - centre) / spread for site, value in logs.items()}


_MOST_VOID = 3


class RunStore(Protocol):
    """Where a run's history and state are kept, durably."""

    def append_event(self, kind: Any, **fields: Any) -> Mapping[str, Any]:
        """Record what happened."""
        ...

    def save_adapter(self, number: int, arrays: Mapping[str, NDArray[Any]]) -> object:
        """Keep the adapter after a round."""
        ...

    def save_checkpoint(self, arrays: Mapping[str, NDArray[Any]], state: Mapping[str, Any]) -> None:
        """Replace the state to resume from, atomically."""
        ...

    def load_checkpoint(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]] | None:
        """The last saved state, if any."""
        ...

    def save_secure_round(self, number: int, content: bytes) -> None:
        """Replace what a secure round has settled, durably."""
        ...

    def load_secure_round(self, number: int) -> bytes | None:
        """What is kept of a secure round, if it is the newest."""
        ...

    def was_evaluated(self, number: int) -> bool:
        """Whether the metrics that the sites released after a round are on record."""
        ...


class Observer(Protocol):
    """Somebody who looks at the global adapter between rounds, such as the simulator."""

    def after_round(self, server_round: int, adapter: Vector, *, seconds: float) -> None:
        """Called when a round is finished and saved."""
        ...


class RoundLoop:
    """One run of a plan over a grid.

    Parameters
    ----------
    plan : Plan
        What to train.
    run : str
        The run's name; with round and release it keys every charge at the sites.
    grid : Grid
        Flower's way to the sites.
    store : RunStore
        History and checkpoints. If it holds a checkpoint, the run goes on behind it.
    observer : Observer, optional
        Told of each finished round.
    find_start : callable
        Finds the adapter that ``lora.start`` names.
    """

    def __init__(
        self,
        *,
        plan: Plan,
        run: str,
        grid: Grid,
        store: RunStore,
        observer: Observer | None = None,
        find_start: FindStart = in_folder,
    ) -> None:
        self._plan, self._run, self._grid, self._store = plan, run, grid, store
        self._observer, self._find_start = observer, find_start
        self._text = plan.canonical()
        self._members: list[Terms] = []
        self._secure: SecureRounds | None = None
        self._norms: dict[str, float] = {}  # of this round's updates, by site
        self._void = 0  # secure rounds in a row that came to nothing

    def execute(self) -> Vector:
        """Run to the end and return the final adapter.

        Raises
        ------
        QuorumLost
            Fewer sites than the plan's minimum joined or answered in a round.
        SiteFailed
            No site joined and all gave the same error code.
        """
        started = time.monotonic()
        self._members, layout = self._join()
        strategy = strategy_for(self._plan, layout=layout)
        adapter, done = self._resume(strategy, layout)
        strategy.cohort = self._cohort(max(done, 1))
        if done and not self._store.was_evaluated(done):
            # The process before may have died between a round's checkpoint and its metrics.
            self._evaluate(self._request(done, adapter, strategy), strategy)
        for number in range(done + 1, self._plan.rounds.number + 1):
            with tracing.span("round", run=self._run, round=number):
                adapter = self._round(number, adapter, strategy, layout)
        if isinstance(strategy, Sums):
            self._tell_sums(strategy, adapter)
        self._store.append_event(
            "run_finished", rounds=self._plan.rounds.number, seconds=time.monotonic() - started
        )
        return adapter

    def _tell_sums(self, strategy: Sums, sums: Vector) -> None:
        """Record what the sums say. Raises `QuorumLost` if the one round came to nothing."""
        if not strategy.names:
            raise QuorumLost(
                "the one round came to nothing; what sites charged for it stays charged",
                remedy="Propose the plan again when the sites are there.",
            )
        find = votes.find if self._plan.vote else estimates.find
        found = find(
            self._plan,
            sums,
            variance=strategy.noise_variance,
            sites=strategy.names,
            declared={terms.site: terms.declared_units for terms in strategy.cohort.values()},
        )
        self._store.append_event(self._plan.finds, found=found)

    # --- joining ---

    def _join(self) -> tuple[list[Terms], Layout]:
        request, nodes = JoinRequest(plan=self._text, run=self._run), self._nodes()
        messages = [request.message(node) for node in nodes]
        cohort, layouts, codes = [], dict[str, str](), list[str]()
        for node, reply in exchange(self._grid, messages, deadline=self._plan.rounds.deadline):
            found = _joined(reply)
            if isinstance(found, str):
                codes.append(found)
                self._store.append_event("site_refused", site=str(node), code=found)
                continue
            units = found.declared_units
            terms = Terms(
                node=node,
                site=found.site,
                declared_units=units,
                rank=found.rank,
                sigma=found.sigma,
            )
            cohort.append(terms)
            layouts[found.site] = found.layout
            told = {"rate": found.rate, "sigma": found.sigma, "dtype": found.dtype}
            shown = {key: value for key, value in told.items() if value is not None}
            self._store.append_event("site_joined", site=found.site, declared_units=units, **shown)
        self._require_quorum(len(cohort), len(nodes), codes)
        return sorted(cohort, key=lambda t: t.site), _agreed_layout(layouts, self._plan)

    def _nodes(self) -> list[int]:
        """Nodes that are there, once the plan's minimum of them is."""
        ends = time.monotonic() + self._plan.rounds.deadline
        while True:
            nodes = sorted(self._grid.get_node_ids())
            if len(nodes) >= self._plan.rounds.min_sites or time.monotonic() > ends:
                return nodes
            time.sleep(0.1)

    def _require_quorum(self, present: int, asked: int, codes: list[str]) -> None:
        if present >= self._plan.rounds.min_sites:
            return
        if codes and present == 0 and len(set(codes)) == 1:
            raise SiteReportedError(f"every site refused to join with {codes[0]}")
        reasons = f" ({', '.join(sorted(codes))})" if codes else ""
        raise QuorumLost(
            f"{present} of {asked} sites are in; the plan needs {self._plan.rounds.min_sites}{reasons}"
        )

    # --- rounds ---

    def _cohort(self, number: int) -> dict[int, Terms]:
        """The sites that a round asks, by node."""
        members = [terms.site for terms in self._members]
        asked = drawn(self._plan, run=self._run, server_round=number, sites=members)
        return {terms.node: terms for terms in self._members if terms.site in asked}

    def _round(
        self, number: int, adapter: Vector, strategy: AdapterStrategy, layout: Layout
    ) -> Vector:
        clock = _Clock()
        strategy.cohort = self._cohort(number)
        self._store.append_event(
            "round_started",
            round=number,
            phase=self._phase(number),
            cohort=[terms.site for terms in strategy.cohort.values()],
        )
        asked = self._request(number, adapter, strategy)
        strategy.begin(number, adapter)
        if self._plan.aggregation.secure:
            facts = self._collect_securely(number, strategy, asked.arrays)
        else:
            configured = strategy.configure_train(number, asked.arrays, asked.config(), self._grid)
            messages = list(configured)
            facts = self._collect(number, strategy, messages, clock)
        clock.lap("wait")
        updated = strategy.conclude(
            strategy.finish(adapter, server_round=number), server_round=number
        )
        self._save(number, updated, strategy, layout)
        clock.lap("aggregate")
        self._store.append_event(
            "round_finished",
            round=number,
            seconds=clock.total,
            wait_seconds=clock.laps["wait"],
            aggregate_seconds=clock.laps["aggregate"],
            update_norm=float(np.linalg.norm(updated - adapter)),
            **facts,
        )
        self._evaluate(replace(asked, arrays=as_arrays(updated)), strategy)
        if self._observer:
            self._observer.after_round(number, updated, seconds=clock.total)
        return updated

    def _phase(self, number: int) -> str:
        return self._plan.finds or phase_of(self._plan, number)

    def _request(self, number: int, adapter: Vector, strategy: AdapterStrategy) -> TrainRequest:
        """What a round asks of every site."""
        return TrainRequest(
            plan=self._text,
            run=self._run,
            round=number,
            arrays=as_arrays(adapter),
            **strategy.settings(),
        )

    def _collect(
        self, number: int, strategy: AdapterStrategy, messages: list[Message], clock: _Clock
    ) -> dict[str, Any]:
        """Fold the sites' updates as they come; what the messages came to."""
        sizes, codes = list[int](), list[str]()
        self._norms.clear()
        clock.lap("aggregate")
        for node, reply in exchange(self._grid, messages, deadline=self._plan.rounds.deadline):
            clock.lap("wait")
            found = self._fold(number, strategy, node, reply)
            (codes if isinstance(found, str) else sizes).append(found)  # type: ignore[arg-type]
            clock.lap("aggregate")
        self._require_quorum(len(sizes), len(strategy.cohort), codes)
        facts: dict[str, Any] = {
            "bytes_up": sum(sizes),
            "bytes_down": sum(_bytes_of(m) for m in messages),
        }
        unlike = scores(self._norms)
        return {**facts, "anomaly": unlike} if unlike else facts

    def _collect_securely(
        self, number: int, strategy: AdapterStrategy, arrays: ArrayRecord
    ) -> dict[str, Any]:
        """Fold the one sum over the sites that secure aggregation gives; none if the round is void."""
        assert isinstance(strategy, LinearStrategy)  # validated with the plan
        if self._secure is None:
            self._secure = SecureRounds(
                plan=self._plan,
                run=self._run,
                grid=self._grid,
                log=self._store,
                memory=self._store,
                members=self._members,
            )
        encoding = encoding_for(self._plan, layout=strategy.layout, server_round=number)
        found = self._secure.round(number, arrays, encoding=encoding)
        facts = {"bytes_up": found.bytes_up, "bytes_down": found.bytes_down}
        facts |= {"exchanges": found.exchanges, "saturated": found.saturated}
        if found.total is not None:
            strategy.fold_sum(found.total, mass=found.mass)
            if isinstance(strategy, Sums):
                strategy.note(found.survivors)
            self._void = 0
            return facts
        self._void += 1
        if self._void >= _MOST_VOID:
            listed = ", ".join(sorted(set(found.codes)))
            raise QuorumLost(f"{_MOST_VOID} secure rounds in a row came to nothing ({listed})")
        return {**facts, "void": True}

    def _fold(self, number: int, strategy: AdapterStrategy, node: int, reply: Message) -> str | int:
        """Add one reply to the sum; its size in bytes, or the error's code if it could not be."""
        terms = strategy.cohort[node]
        try:
            if code := error_code(reply):
                self._store.append_event("site_failed", round=number, site=terms.site, code=code)
                return code
            update = TrainReply.read(reply.content).update
            strategy.fold(terms, update)
        except UpdateRejected as exc:
            self._store.append_event(
                "site_failed", round=number, site=terms.site, code=exc.code, detail=exc.detail
            )
            return exc.code
        self._norms[terms.site] = float(np.linalg.norm(update))
        self._store.append_event("site_replied", round=number, site=terms.site, bytes=update.nbytes)
        return int(update.nbytes)

    def _evaluate(self, asked: TrainRequest, strategy: AdapterStrategy) -> None:
        """Ask the sites for the metrics that the plan lets them release, of the same round."""
        number, arrays = asked.round, asked.arrays
        messages = list(strategy.configure_evaluate(number, arrays, asked.config(), self._grid))
        if not messages:
            return
        replies = dict(exchange(self._grid, messages, deadline=self._plan.rounds.deadline))
        metrics = strategy.aggregate_evaluate(number, replies.values())
        if metrics is not None:
            answered = {node for node, reply in replies.items() if reply.has_content()}
            missing = [
                terms.site for node, terms in strategy.cohort.items() if node not in answered
            ]
            self._store.append_event(
                "evaluated",
                round=number,
                view="released",
                split="validation",
                pooled=dict(metrics),
                **({"left_out": missing} if missing else {}),
            )

    # --- durability ---

    def _save(
        self, number: int, adapter: Vector, strategy: AdapterStrategy, layout: Layout
    ) -> None:
        self._store.save_adapter(number, layout.unpack(adapter))
        state = {
            "round": number,
            "plan_sha256": self._plan.sha256,
            "layout": layout.fingerprint,
        }
        arrays = {"adapter": adapter, **strategy.state()}
        self._store.save_checkpoint(arrays, state)

    def _resume(self, strategy: AdapterStrategy, layout: Layout) -> tuple[Vector, int]:
        saved = self._store.load_checkpoint()
        if saved is None:
            return start_adapter(layout, self._plan, find=self._find_start), 0
        arrays, state = saved
        if (state["plan_sha256"], state["layout"]) != (self._plan.sha256, layout.fingerprint):
            raise RunDirectoryInvalid("the checkpoint belongs to another plan or model")
        strategy.restore(arrays)
        self._store.append_event("run_resumed", from_round=int(state["round"]))
        return np.asarray(arrays["adapter"], dtype=np.float32), int(state["round"])


class _Clock:
    """Splits a round's wall time into laps of named kinds."""

    def __init__(self) -> None:
        self._start = self._last = time.monotonic()
        self.laps = {"wait": 0.0, "aggregate": 0.0}

    def lap(self, kind: str) -> None:
        now = time.monotonic()
        self.laps[kind] += now - self._last
        self._last = now

    @property
    def total(self) -> float:
        return self._last - self._start


def _bytes_of(message: Message) -> int:
    """Bytes of the arrays that a message carries."""
    records = message.content.array_records.values()
    arrays = [array for record in records for array in record.values()]
    return sum(math.prod(array.shape) * np.dtype(array.dtype).itemsize for array in arrays)


def _joined(reply: Message) -> JoinReply | str:
    """A site's terms, or the code of why it does not join."""
    try:
        return error_code(reply) or JoinReply.read(reply.content)
    except MessageMalformed as exc:
        return exc.code


def _agreed_layout(layouts: Mapping[str, str], plan: Plan) -> Layout:
    """The layout that all sites derived from plan and model; only ranks may differ, where they may."""
    known = {text: Layout.from_json(text) for text in set(layouts.values())}
    if plan.strategy.ranks:
        known = {text: layout.at_rank(plan.lora.r) for text, layout in known.items()}
    found = {site: known[text] for site, text in layouts.items()}
    if len(set(found.values())) != 1:
        raise SiteReportedError(
            "sites derived different adapter layouts from the plan: "
            + ", ".join(f"{site} {layout.fingerprint[:8]}" for site, layout in found.items()),
            remedy="The sites have different base models or library versions; align them.",
        )
    return next(iter(found.values()))


def build_server_app(
    *,
    plan: Plan,
    run: str,
    store: RunStore,
    observer: Observer | None = None,
    find_start: FindStart = in_folder,
) -> ServerApp:
    """A ServerApp that executes `plan` once and leaves everything in `store`.

    Parameters
    ----------
    plan : Plan
        What to train.
    run : str
        The run's name.
    store : RunStore
        History and checkpoints; with a checkpoint in it the run is resumed.
    observer : Observer, optional
        Told of each finished round.
    find_start : callable
        Finds the adapter that ``lora.start`` names.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        del context  # its run config repeats what is given here
        with tracing.span("run", run=run, begins=True):
            RoundLoop(
                plan=plan, run=run, grid=grid, store=store, observer=observer, find_start=find_start
            ).execute()

    return app
