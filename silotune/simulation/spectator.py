"""The simulator looking on: events with what only it can know, and its own scores of each adapter."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from silotune.events.view import RunView
from silotune.models.tasks import get_task
from silotune.plan.plan import Plan
from silotune.privacy.spent import LiveEpsilon
from silotune.rounds.run_directory import RunDirectory, spare
from silotune.simulation.grid import Receipt
from silotune.strategies.base import Vector

Counts = NDArray[np.float64]
Inspect = Callable[..., dict[str, tuple[dict[str, Any], dict[str, NDArray[Any]]]]]


class LoggedStore:
    """A run directory as the server's store; every event also goes to a listener.

    Parameters
    ----------
    directory : RunDirectory
        Where everything is kept.
    plan : Plan
        The run's plan.
    names : sequence of str
        The sites in node order, for events of a site that never told its name.
    listener : callable
        Given each event as it was written.

    Attributes
    ----------
    names : tuple of str
        Every site of the run.
    """

    def __init__(
        self,
        directory: RunDirectory,
        *,
        plan: Plan,
        names: Sequence[str],
        listener: Callable[[Mapping[str, Any]], None],
    ) -> None:
        self.directory, self._listener, self.names = directory, listener, tuple(names)
        self._told, self._rounds = RunView(directory.name), plan.rounds.number
        self._told.extend(directory.events)  # of a run that goes on, also what happened before
        self._names = {str(node): name for node, name in enumerate(names, start=1)}
        self._live = LiveEpsilon(
            delta=plan.privacy.delta or 0.0,
            rounds=plan.rounds.number,
            local_steps=plan.releases_a_round,
        )
        for found in self._told.every_round:
            for site in found.replied:
                self._live.replied(site)
        self._seconds: dict[str, dict[str, float]] = defaultdict(dict)
        self.save_checkpoint = directory.save_checkpoint
        self.load_checkpoint = directory.load_checkpoint
        self.save_secure_round = directory.save_secure_round
        self.load_secure_round = directory.load_secure_round
        self.was_evaluated = directory.was_evaluated

    @property
    def joined(self) -> list[str]:
        """Sites that are in the run, since this process asked them."""
        joined = set(self._told.joined)
        return [name for name in self.names if name in joined]

    def save_adapter(self, number: int, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Keep the adapter after a round; of those before only what `kept_adapters` says."""
        self.directory.save_adapter(number, arrays)
        have = self.directory.adapter_rounds()
        for old in spare(self._told, have, newest=number, rounds=self._rounds):
            self.directory.adapter_of_round(old).unlink(missing_ok=True)

    @property
    def done(self) -> int:
        """The last finished round."""
        return self._told.done

    def on_receipt(self, receipt: Receipt) -> None:
        """Note how long a site's app took, which the server never learns."""
        if receipt.message_type in {"train", "train.masked"}:
            self._seconds[receipt.group_id][receipt.site] = receipt.seconds

    def append_event(self, kind: Any, **fields: Any) -> Mapping[str, Any]:
        """Write an event, with the seconds that only the simulator knows."""
        known = self._seconds.get(str(fields.get("round")), {})
        site = fields.get("site")
        if kind == "site_refused":
            fields["site"] = self._names.get(str(site), site)
        elif kind == "site_joined" and "sigma" in fields:
            self._live.joined(str(site), rate=fields["rate"], sigma=fields["sigma"])
        elif kind == "site_replied":
            self._live.replied(str(site))
            if site in known:
                fields["train_seconds"] = known[site]
        elif kind == "round_finished":
            if known:
                fields["train_seconds"] = sum(known.values())
            if spent := self._live.spent():
                fields["epsilon"] = spent
        event = self.directory.append_event(kind, **fields)
        self._told.extend([event])
        self._listener(event)
        return event


class View:
    """Typed requests to the simulated sites."""

    def __init__(self, inspect: Inspect) -> None:
        self._inspect = inspect

    def score(
        self, adapter: Vector, *, split: str, frozen: bool, server_round: int, sites: Sequence[str]
    ) -> dict[str, dict[str, Counts]]:
        """Counts on each of these sites' own records of a split, by site, of one or two models.

        ``counts`` are those of the adapter itself; where the strategy keeps parts at the sites,
        ``personal`` are those of the adapter with the site's own parts as of a round. A site
        without a record in the split is left out.
        """
        request = {"op": "score", "split": split, "frozen": frozen, "round": server_round}
        found = self._inspect(request, {"flat": adapter}, sites=sites)
        return {site: arrays for site, (_, arrays) in found.items() if arrays}

    def finish(self, sites: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Settle these sites' ledgers and collect certificates and timings."""
        found = self._inspect({"op": "finish"}, {}, sites=sites)
        return {site: answer for site, (answer, _) in found.items()}

    def save(self, adapter: Vector, folder: Path, *, site: str) -> dict[str, Any]:
        """Have one site write the adapter in PEFT's format; what model it is for."""
        request = {"op": "save", "folder": str(folder)}
        answer, _ = self._inspect(request, {"flat": adapter}, sites=[site])[site]
        return answer


class Spectator:
    """Scores the global adapter between rounds, on held-out data that no site released.

    Parameters
    ----------
    plan : Plan
        Says how often: every ``rounds.evaluate_every`` rounds, and after the last.
    store : LoggedStore
        Gets the events and the lines of ``metrics.jsonl``.
    view : View
        The simulator's way to the sites.

    Attributes
    ----------
    final_counts : mapping of site to counts
        Test counts of the last round's adapter.
    seconds : float
        Time spent looking, which is not part of any round.
    """

    def __init__(self, plan: Plan, *, store: LoggedStore, view: View) -> None:
        self._plan, self._store, self._view = plan, store, view
        self.final_counts: dict[str, Counts] = {}
        self.seconds = 0.0

    def after_round(self, server_round: int, adapter: Vector, *, seconds: float) -> None:
        """Score a finished round's adapter when it is due."""
        started = time.monotonic()
        last = server_round == self._plan.rounds.number
        every = self._plan.rounds.evaluate_every
        line: dict[str, Any] = {"round": server_round, "seconds": seconds}
        if self._plan.data.validation_share and (last or (every and server_round % every == 0)):
            line["validation"] = self._look(server_round, adapter, split="validation")
        if last and self._plan.data.test_share:
            line["test"] = self._look(server_round, adapter, split="test")
        self._store.directory.metrics.append(line)
        self.seconds += time.monotonic() - started

    def look_at_final(self, adapter: Vector) -> None:
        """Score the final adapter on test data, unless that was done after the last round."""
        if self._plan.data.test_share and not self.final_counts:
            self._look(self._plan.rounds.number, adapter, split="test")

    def base_counts(self, size: int) -> dict[str, Counts]:
        """Test counts of a language model before any round: an adapter of zeros adds nothing."""
        if self._plan.model.task != "causal_lm" or not self._plan.data.test_share:
            return {}
        nothing = np.zeros(size, dtype=np.float32)
        found = self._view.score(
            nothing, split="test", frozen=False, server_round=0, sites=self._store.joined
        )
        return {site: arrays["counts"] for site, arrays in found.items()}

    def _look(self, server_round: int, adapter: Vector, *, split: str) -> dict[str, float]:
        frozen = server_round <= self._plan.optimizer.site.head_rounds
        found = self._view.score(
            adapter, split=split, frozen=frozen, server_round=server_round, sites=self._store.joined
        )
        counts = {site: arrays["counts"] for site, arrays in found.items()}
        if split == "test":
            self.final_counts = counts
        shown = self._shown(counts)
        own = {site: arrays["personal"] for site, arrays in found.items() if "personal" in arrays}
        if own:
            shown["personal"] = self._shown(own)
        self._store.append_event(
            "evaluated", round=server_round, view="simulator", split=split, **shown
        )
        return dict(shown["pooled"])

    def _shown(self, counts: Mapping[str, Counts]) -> dict[str, Any]:
        """Metrics over all sites' records, and of each site."""
        sites = {
            site: {**metrics_of(self._plan, each), "n": size_of(self._plan, each)}
            for site, each in counts.items()
        }
        shown = {"pooled": pooled_metrics(self._plan, counts), "sites": sites}
        left_out = [site for site in self._store.names if site not in counts]
        return {**shown, "left_out": left_out} if left_out else shown


def metrics_of(plan: Plan, counts: Counts) -> dict[str, float]:
    """The task's metrics from additive counts."""
    return dict(get_task(plan.model.task).metrics(np.asarray(counts)))


def pooled_metrics(plan: Plan, counts: Mapping[str, Counts]) -> dict[str, float]:
    """The task's metrics over all these sites' records; none without any site."""
    return metrics_of(plan, np.sum([*counts.values()], axis=0)) if counts else {}


def size_of(plan: Plan, counts: Counts) -> int:
    """Number of examples behind counts."""
    return int(counts.sum() if plan.model.task == "text_classification" else counts[-1])
