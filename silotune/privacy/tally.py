"""Privacy events as a multiset: how often each mechanism ran.

Composition under add/remove adjacency doesn't depend on the order of independent mechanisms, so a
sequence of events is worth exactly its tally. Comparing tallies is how a charge is recognised as a
part of what its run reserved, without computing any epsilon.

`LiveEpsilon` says what each site of a run has spent so far, cheaply enough for every round.
"""

from __future__ import annotations

import bisect
import functools
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from silotune.privacy.events import DpEvent

Tally = Counter[str]
"""Canonical JSON of an event that is not a composition -> how often it happened."""


def tally_of(event: DpEvent) -> Tally:
    """Take an event's compositions apart.

    ``ComposedDpEvent`` and ``SelfComposedDpEvent`` add up, ``NoOpDpEvent`` is nothing, everything
    else, whatever is nested in it, is one thing.

    Raises
    ------
    Exception
        Whatever `silotune.privacy.events.to_json` raises for an event it doesn't account for.
    """
    from silotune.privacy.events import (
        ComposedDpEvent,
        NoOpDpEvent,
        SelfComposedDpEvent,
        to_json,
    )

    if isinstance(event, NoOpDpEvent):
        return Counter()
    if isinstance(event, ComposedDpEvent):
        return total(tally_of(part) for part in event.events)
    if isinstance(event, SelfComposedDpEvent):
        once = tally_of(event.event)
        return Counter({leaf: n * event.count for leaf, n in once.items()})
    return Counter({to_json(event): 1})


@functools.lru_cache(maxsize=1024)
def tally_of_text(text: str) -> Mapping[str, int]:
    """The tally of an event in JSON; most rows of a ledger share a few texts. Not to be changed."""
    from silotune.privacy.events import from_json

    return tally_of(from_json(text))


def total(tallies: Iterable[Mapping[str, int]]) -> Tally:
    """Sum of tallies."""
    found: Tally = Counter()
    for tally in tallies:
        found.update(tally)
    return found


def fits(part: Mapping[str, int], whole: Mapping[str, int]) -> bool:
    """Whether every mechanism of `part` is in `whole`, as often at least."""
    return all(n <= whole.get(leaf, 0) for leaf, n in part.items())


def epsilon_of(tally: Mapping[str, int], *, delta: float, colluding: int = 0) -> float:
    """Tight upper bound on epsilon at `delta` for everything in the tally; 0 for an empty one.

    With `colluding` sites on the coordinator's side, noise that sites share counts without theirs.
    """
    from silotune.privacy import costs

    events = _events(tally)
    return costs.epsilon(events, delta=delta, colluding=colluding) if events else 0.0


def epsilon_at_two_sites(tally: Mapping[str, int], *, delta: float) -> float:
    """Epsilon of a person with a unit at two sites that each released what is in the tally."""
    from silotune.privacy import costs

    return costs.epsilon_at_two_sites(_events(tally), delta=delta)


def epsilon_of_two_units(tally: Mapping[str, int], *, delta: float) -> float:
    """Epsilon of two units at once, whatever the mechanisms: by way of the data with one of them.

    Two releases that are each (e, d)-indistinguishable in turn are (2 e, (1 + exp(e)) d) together. It
    is more than `epsilon_at_two_sites`, which needs noise that no later round takes back.
    """
    one = epsilon_of(tally, delta=delta)
    while math.isfinite(one):
        shared = delta / (1.0 + math.exp(min(one, 700.0)))
        found = epsilon_of(tally, delta=shared)
        if found <= one:
            return 2.0 * one
        one = found * (1.0 + 1e-3)
    return one


def _events(tally: Mapping[str, int]) -> list[DpEvent]:
    from silotune.privacy.events import SelfComposedDpEvent, from_json

    return [
        SelfComposedDpEvent(event=from_json(leaf), count=n)
        for leaf, n in sorted(tally.items())
        if n
    ]


_POINTS = 16

_Mechanism = tuple[float, float]


class LiveEpsilon:
    """Epsilon of each site after the rounds it replied in.

    Certified points of the run's curve are computed once for each kind of site; between two of them
    the later one is given, so the number shown is never below the truth and always within the curve.

    Parameters
    ----------
    delta : float
        The plan's.
    rounds : int
        Rounds of the whole run.
    local_steps : int
        Noisy steps that a site takes in a round.
    bands : int
        Rounds that are charged once, together.
    """

    def __init__(self, *, delta: float, rounds: int, local_steps: int, bands: int = 1) -> None:
        self._delta, self._local_steps, self._bands = delta, local_steps, bands
        self._rounds = -(-rounds // bands)
        self._mechanism: dict[str, _Mechanism] = {}
        self._charged: dict[str, set[int]] = {}
        self._curves: dict[_Mechanism, list[tuple[int, float]]] = {}

    def joined(self, site: str, *, rate: float, sigma: float) -> None:
        """A site takes part with this sampling rate and noise multiplier."""
        self._mechanism[site] = (rate, sigma)

    def replied(self, site: str, server_round: int) -> None:
        """A site released the update of a round (from 1)."""
        self._charged.setdefault(site, set()).add((server_round - 1) // self._bands)

    def spent(self, sites: Iterable[str] | None = None) -> dict[str, float]:
        """An upper bound of epsilon, by site, of all or of these that released something."""
        return {
            site: self._after(self._mechanism[site], len(self._charged[site]))
            for site in (self._mechanism if sites is None else sites)
            if site in self._mechanism and site in self._charged
        }

    def _after(self, mechanism: _Mechanism, rounds: int) -> float:
        if mechanism not in self._curves:
            # Here, because it takes seconds to import and a finished run's report needs none of it.
            from silotune.privacy.accounting import epsilon_curve
            from silotune.privacy.events import step_event

            rate, sigma = mechanism
            self._curves[mechanism] = epsilon_curve(
                step_event(rate=rate, sigma=sigma, steps=self._local_steps),
                rounds=self._rounds,
                points=_POINTS,
                delta=self._delta,
            )
        curve = self._curves[mechanism]
        place = bisect.bisect_left([number for number, _ in curve], rounds)
        return curve[min(place, len(curve) - 1)][1]
