"""What a release did, as data: the event kinds that silotune uses, and their canonical JSON.

The classes are those of dp-accounting (google/differential-privacy). They say what was done, never
what it cost, so that a cost can be recomputed by anybody and with any accountant.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from dp_accounting import (
    ComposedDpEvent,
    DpEvent,
    GaussianDpEvent,
    NoOpDpEvent,
    PoissonSampledDpEvent,
    SelfComposedDpEvent,
)

from silotune.errors import EventInvalid

_SIGMA_RANGE = (1e-3, 1e9)
_RATE_RANGE = (1e-9, 1.0)
_MAX_USES = 10**9
_MAX_TEXT = 1 << 20


def step_event(*, rate: float, sigma: float, steps: int) -> DpEvent:
    """`steps` training steps: Gaussian noise on the clipped sum of a Poisson sample.

    Parameters
    ----------
    rate : float
        Poisson sampling rate q of a unit, from 1e-9 to 1.
    sigma : float
        Noise multiplier: standard deviation over the clipping norm; from 1e-3 to 1e9.
    steps : int
        At least 1.

    Raises
    ------
    EventInvalid
        A number is out of its range.
    """
    once = PoissonSampledDpEvent(float(rate), GaussianDpEvent(float(sigma)))
    return _checked(SelfComposedDpEvent(once, steps))


def gaussian_event(sigma: float) -> DpEvent:
    """One Gaussian release over all units, e.g. of metrics. Raises `EventInvalid`."""
    return _checked(GaussianDpEvent(float(sigma)))


def to_json(event: DpEvent) -> str:
    """Canonical JSON of an event: equal events, equal text.

    Raises
    ------
    EventInvalid
        A kind of event that silotune does not use, or a number out of its range.
    """
    return json.dumps(_plain(event), sort_keys=True, separators=(",", ":"), allow_nan=False)


def from_json(text: str) -> DpEvent:
    """Read back exactly what `to_json` wrote.

    Raises
    ------
    EventInvalid
        Anything else, be it only a space more.
    """
    try:
        if len(text) > _MAX_TEXT:
            raise EventInvalid("an event of more than a million characters")
        event = _event(json.loads(text))
        canonical = to_json(event)
    except (ValueError, RecursionError) as exc:
        raise EventInvalid("an event that is not JSON") from exc
    if canonical != text:
        raise EventInvalid("an event that is not in its canonical form")
    return event


def uses_of(events: Iterable[DpEvent]) -> Counter[tuple[float, float]]:
    """How often each (rate, sigma) is used in all events; a rate of 1 means no sampling.

    Raises
    ------
    EventInvalid
        An event that can't be accounted for.
    """
    found: Counter[tuple[float, float]] = Counter()
    for event in events:
        _count(_plain(event), 1, found)
    if any(uses > _MAX_USES for uses in found.values()):
        raise EventInvalid(f"a mechanism used more than {_MAX_USES} times")
    return found


def _checked(event: DpEvent) -> DpEvent:
    _plain(event)
    return event


def _plain(event: DpEvent) -> dict[str, Any]:
    """An event as plain data; this is where every event is checked."""
    kind = type(event)
    if kind is NoOpDpEvent:
        return {"kind": "NoOp"}
    if kind is GaussianDpEvent:
        sigma = _number(event.noise_multiplier, *_SIGMA_RANGE, "noise multiplier")
        return {"kind": "Gaussian", "noise_multiplier": sigma}
    if kind is PoissonSampledDpEvent:
        rate = _number(event.sampling_probability, *_RATE_RANGE, "sampling probability")
        if type(event.event) is not GaussianDpEvent:
            raise EventInvalid("only a Gaussian can be run on a Poisson sample")
        return {
            "kind": "PoissonSampled",
            "sampling_probability": rate,
            "event": _plain(event.event),
        }
    if kind is SelfComposedDpEvent:
        if type(event.count) is not int or not 1 <= event.count <= _MAX_USES:
            raise EventInvalid(f"a count is a whole number from 1 to {_MAX_USES}")
        return {"kind": "SelfComposed", "count": event.count, "event": _plain(event.event)}
    if kind is ComposedDpEvent:
        return {"kind": "Composed", "events": [_plain(part) for part in event.events]}
    raise EventInvalid(f"{kind.__name__} is not an event that silotune accounts for")


def _number(value: object, least: float, most: float, name: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value <= most:
        raise EventInvalid(f"the {name} of an event must be a number from {least:g} to {most:g}")
    return float(value)


def _event(plain: object) -> DpEvent:
    match plain:
        case {"kind": "NoOp"}:
            return NoOpDpEvent()
        case {"kind": "Gaussian", "noise_multiplier": sigma}:
            return GaussianDpEvent(sigma)
        case {"kind": "PoissonSampled", "sampling_probability": rate, "event": inner}:
            return PoissonSampledDpEvent(rate, _event(inner))
        case {"kind": "SelfComposed", "count": count, "event": inner}:
            return SelfComposedDpEvent(_event(inner), count)
        case {"kind": "Composed", "events": [*parts]}:
            return ComposedDpEvent([_event(part) for part in parts])
    raise EventInvalid("an event of unknown kind, or with other fields than its kind has")


def _count(plain: Mapping[str, Any], uses: int, found: Counter[tuple[float, float]]) -> None:
    match plain["kind"]:
        case "Gaussian":
            found[1.0, plain["noise_multiplier"]] += uses
        case "PoissonSampled":
            sigma = plain["event"]["noise_multiplier"]
            found[plain["sampling_probability"], sigma] += uses
        case "SelfComposed":
            _count(plain["event"], uses * plain["count"], found)
        case "Composed":
            for part in plain["events"]:
                _count(part, uses, found)
