"""Epsilon of each site over the rounds: as the events tell it, else from what the sites declared.

A coordinator is told each site's sampling rate and noise, which are public, and counts the rounds that
arrived; the privacy accountant makes epsilon of it. That takes seconds for a new kind of site, so it is
done in a thread, and a page shows what is known so far.
"""

from __future__ import annotations

import bisect
import threading
from collections.abc import Mapping

from silotune.events.source import RunFacts
from silotune.events.view import RunView

_POINTS = 16

Curve = list[tuple[int, float]]
Key = tuple[float, float, float, int, int]


class Spending:
    """Epsilon for pages and metrics, remembered by kind of site."""

    def __init__(self) -> None:
        self._curves: dict[Key, Curve] = {}
        self._wanted: set[Key] = set()
        self._lock = threading.Lock()

    def curves(self, facts: RunFacts, view: RunView, *, wait: bool = False) -> dict[str, Curve]:
        """Pairs of a round and what is spent after it, by site; call it under the view's lock.

        What is not known yet is left out and worked out in a thread, unless you `wait`.
        """
        if view.epsilon:
            told: dict[str, Curve] = {}
            for number, spent in view.epsilon:
                for who, value in spent.items():
                    told.setdefault(who, []).append((number, value))
            return told
        found: dict[str, Curve] = {}
        for name, site in view.sites.items():
            curve = self._curve(facts, site.mechanism, wait=wait) if site.mechanism else None
            if curve:
                found[name] = self._counted(name, view, curve)
        return {name: points for name, points in found.items() if points}

    def spent(self, facts: RunFacts, view: RunView) -> dict[str, float]:
        """The newest value of each curve."""
        return {site: curve[-1][1] for site, curve in self.curves(facts, view).items()}

    @staticmethod
    def _counted(name: str, view: RunView, curve: Curve) -> Curve:
        """What the rounds that arrived cost; between two points of the curve, the later one."""
        steps, replies, points = [number for number, _ in curve], 0, Curve()
        for found in view.finished_rounds:
            replies += name in found.replied  # also in a void round: what was sent was charged
            if replies:
                place = min(bisect.bisect_left(steps, replies), len(curve) - 1)
                points.append((found.number, curve[place][1]))
        return points

    def _curve(
        self, facts: RunFacts, mechanism: tuple[float, float], *, wait: bool
    ) -> Curve | None:
        delta = (facts.plan.get("privacy") or {}).get("delta")
        if not delta or not facts.rounds:
            return None
        steps = int((facts.plan.get("rounds") or {}).get("local_steps") or 1)
        key = (*mechanism, float(delta), facts.rounds, steps)
        if wait and key not in self._curves:
            self._compute(key)
        with self._lock:
            if key in self._curves:
                return self._curves[key]
            if key not in self._wanted:
                self._wanted.add(key)
                threading.Thread(target=self._compute, args=(key,), daemon=True).start()
        return None

    def _compute(self, key: Key) -> None:
        # Here, because it takes seconds to import.
        from silotune.privacy.accounting import epsilon_curve, step_event

        rate, sigma, delta, rounds, steps = key
        event = step_event(rate=rate, sigma=sigma, steps=steps)
        points = epsilon_curve(event, rounds=rounds, points=_POINTS, delta=delta)
        with self._lock:
            self._curves[key] = list(points)


def left(budget: float | None, spent: Mapping[str, float]) -> dict[str, float]:
    """What each site has above what it spent, of the plan's budget."""
    return {} if budget is None else {s: max(0.0, budget - value) for s, value in spent.items()}
