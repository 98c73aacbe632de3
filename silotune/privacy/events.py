"""What a release did, as data: the event kinds that silotune uses, and their canonical JSON.

The classes are those of dp-accounting (google/differential-privacy). They say what was done, never
what it cost, so that a cost can be recomputed by anybody and with any accountant.
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from silotune.errors import EventInvalid
from silotune.plan.document import canonical_json

_MODULE = "dp_accounting.dp_event"


def _load_alone() -> None:
    """Load the module of the event classes without its package, which would load SciPy: 90 MB.

    It stands under its own name: whoever imports the package later gets these very classes.
    """
    package = find_spec("dp_accounting")
    if _MODULE in sys.modules or package is None or not package.submodule_search_locations:
        return
    path = Path(package.submodule_search_locations[0], "dp_event.py")
    spec = spec_from_file_location(_MODULE, path)
    if spec is None or spec.loader is None:
        return
    sys.modules[_MODULE] = module = module_from_spec(spec)
    spec.loader.exec_module(module)


_load_alone()
from dp_accounting.dp_event import (  # noqa: E402
    ComposedDpEvent,
    DpEvent,
    GaussianDpEvent,
    NoOpDpEvent,
    PoissonSampledDpEvent,
    SelfComposedDpEvent,
)

__all__ = [
    "ComposedDpEvent",
    "DpEvent",
    "GaussianDpEvent",
    "NoOpDpEvent",
    "PoissonSampledDpEvent",
    "SelfComposedDpEvent",
]


@dataclass(frozen=True)
class SharedGaussianDpEvent(DpEvent):  # type: ignore[misc]
    """Gaussian noise that several sites added to one sum, each a share of it.

    Under secure aggregation only the sum is seen, and the sum's noise is what counts. To somebody who
    colludes with c of the sites, and so knows their shares, it is a Gaussian with less noise.

    Attributes
    ----------
    noise_multiplier : float
        Of the noise that `sharers` honest shares sum to.
    sharers : int
        Each site's share has ``1 / sharers`` of that variance.
    tolerated : int
        Sites that may collude with the coordinator without breaking the aggregation. If more do,
        nothing but a site's own share counts.
    """

    noise_multiplier: float
    sharers: int
    tolerated: int

    def seen_with(self, colluding: int) -> GaussianDpEvent:
        """The mechanism, to somebody who colludes with so many other sites."""
        honest = self.sharers - colluding if colluding <= self.tolerated else 1
        return GaussianDpEvent(self.noise_multiplier * math.sqrt(max(honest, 1) / self.sharers))


_SIGMA_RANGE = (1e-3, 1e9)
_RATE_RANGE = (1e-9, 1.0)
_MAX_USES = 10**9
_MAX_TEXT = 1 << 20
_MAX_SHARERS = 10_000


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


def shared_step_event(
    *, rate: float, sigma: float, steps: int, sharers: int, tolerated: int
) -> DpEvent:
    """Like `step_event`, for noise that the sites share: see `SharedGaussianDpEvent`.

    Raises
    ------
    EventInvalid
        A number is out of its range.
    """
    once = PoissonSampledDpEvent(
        float(rate), SharedGaussianDpEvent(float(sigma), sharers, tolerated)
    )
    return _checked(SelfComposedDpEvent(once, steps))


def gaussian_event(sigma: float) -> DpEvent:
    """One Gaussian release over all units, e.g. of metrics. Raises `EventInvalid`."""
    return _checked(GaussianDpEvent(float(sigma)))


def is_shared(event: DpEvent) -> bool:
    """Whether the noise of an event, repeated or sampled, is the sum of several sites' shares."""
    while isinstance(event, SelfComposedDpEvent | PoissonSampledDpEvent):
        event = event.event
    return isinstance(event, SharedGaussianDpEvent)


def to_json(event: DpEvent) -> str:
    """Canonical JSON of an event: equal events, equal text.

    Raises
    ------
    EventInvalid
        A kind of event that silotune does not use, or a number out of its range.
    """
    return canonical_json(_plain(event))


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


def uses_of(events: Iterable[DpEvent], *, colluding: int = 0) -> Counter[tuple[float, float]]:
    """How often each (rate, sigma) is used in all events; a rate of 1 means no sampling.

    Parameters
    ----------
    events : iterable of DpEvent
        What was released.
    colluding : int
        Other sites that collude with the coordinator: shared noise counts without theirs.

    Raises
    ------
    EventInvalid
        An event that can't be accounted for.
    """
    found: Counter[tuple[float, float]] = Counter()
    for event in events:
        _count(_plain(event), 1, found, colluding)
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
    if kind is SharedGaussianDpEvent:
        return _plain_shared(event)
    if kind is PoissonSampledDpEvent:
        rate = _number(event.sampling_probability, *_RATE_RANGE, "sampling probability")
        if type(event.event) not in {GaussianDpEvent, SharedGaussianDpEvent}:
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


def _plain_shared(event: SharedGaussianDpEvent) -> dict[str, Any]:
    sharers, tolerated = event.sharers, event.tolerated
    if type(sharers) is not int or not 1 <= sharers <= _MAX_SHARERS:
        raise EventInvalid(f"noise is shared by 1 to {_MAX_SHARERS} sites")
    if type(tolerated) is not int or not 0 <= tolerated < sharers:
        raise EventInvalid("fewer sites may collude than share the noise")
    sigma = _number(event.noise_multiplier, *_SIGMA_RANGE, "noise multiplier")
    return {
        "kind": "SharedGaussian",
        "noise_multiplier": sigma,
        "sharers": sharers,
        "tolerated": tolerated,
    }


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
        case {
            "kind": "SharedGaussian",
            "noise_multiplier": sigma,
            "sharers": sharers,
            "tolerated": tolerated,
        }:
            return SharedGaussianDpEvent(sigma, sharers, tolerated)
        case {"kind": "PoissonSampled", "sampling_probability": rate, "event": inner}:
            return PoissonSampledDpEvent(rate, _event(inner))
        case {"kind": "SelfComposed", "count": count, "event": inner}:
            return SelfComposedDpEvent(_event(inner), count)
        case {"kind": "Composed", "events": [*parts]}:
            return ComposedDpEvent([_event(part) for part in parts])
    raise EventInvalid("an event of unknown kind, or with other fields than its kind has")


def _count(
    plain: Mapping[str, Any], uses: int, found: Counter[tuple[float, float]], colluding: int
) -> None:
    match plain["kind"]:
        case "Gaussian" | "SharedGaussian":
            found[1.0, _sigma(plain, colluding)] += uses
        case "PoissonSampled":
            found[plain["sampling_probability"], _sigma(plain["event"], colluding)] += uses
        case "SelfComposed":
            _count(plain["event"], uses * plain["count"], found, colluding)
        case "Composed":
            for part in plain["events"]:
                _count(part, uses, found, colluding)


def _sigma(plain: Mapping[str, Any], colluding: int) -> float:
    """Noise multiplier of a Gaussian, shared or not, to the coordinator and so many sites."""
    if plain["kind"] == "Gaussian":
        return float(plain["noise_multiplier"])
    return float(_event(plain).seen_with(colluding).noise_multiplier)
