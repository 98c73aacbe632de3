"""Traces of rounds across coordinator and sites, for OpenTelemetry; off unless the environment asks.

The standard variables decide: ``OTEL_TRACES_EXPORTER`` or an OTLP endpoint switches traces on, and where
they go is each house's own business: the coordinator's spans go where its environment says, a site's
where the site's says. What joins them is a W3C ``traceparent`` (https://www.w3.org/TR/trace-context/) in
the sealed message to the site. Nothing of a trace is ever in a site's answer.

A span has a name, times, and the run, round and kind of message: `span` takes nothing else, and what an
exception says is not recorded, only its code.

The ids of a run's trace and of its exchanges are made of the run's name, the round and the kind, not
drawn: a coordinator that starts anew sends the same message again, byte for byte.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, cast

from silotune.errors import ExtraMissing, SilotuneError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span, Tracer

TRACEPARENT = "traceparent"
"""Key of the header among a message's settings."""

INSTALL = "pip install 'silotune[otel]'"
_HEADER = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


class _Ids(threading.local):
    """An OpenTelemetry generator of ids: gives those laid down in this thread, once each, else draws."""

    trace = 0
    span = 0

    def is_trace_id_random(self) -> bool:
        """No: some are made of names, and the header's flags must not say otherwise."""
        return False

    def generate_trace_id(self) -> int:
        """The one laid down, or a random one."""
        found, self.trace = self.trace, 0
        return found or secrets.randbits(128) or 1

    def generate_span_id(self) -> int:
        """The one laid down, or a random one."""
        found, self.span = self.span, 0
        return found or secrets.randbits(64) or 1


class _TracerState:
    """The process's tracer; None while nothing is traced."""

    tracer: Tracer | None = None
    provider: Any = None
    ids = _Ids()


def wanted() -> list[str]:
    """Exporters that the environment asks for, by OpenTelemetry's names; none: no traces."""
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return []
    implied = "otlp" if any(os.environ.get(name) for name in _ENDPOINTS) else ""
    listed = os.environ.get("OTEL_TRACES_EXPORTER", "") or implied
    return [
        name for name in (part.strip() for part in listed.split(",")) if name not in ("", "none")
    ]


def configure(service: str) -> None:
    """Trace this process if the environment asks for it.

    Parameters
    ----------
    service : str
        The service's name unless ``OTEL_SERVICE_NAME`` says another.

    Raises
    ------
    ExtraMissing
        The SDK or an exporter that is asked for is not installed.
    """
    names = wanted()
    if not names:
        return
    known = {found.name: found for found in entry_points(group="opentelemetry_traces_exporter")}
    known |= {"otlp": known["otlp_proto_http"]} if "otlp_proto_http" in known else {}
    for name in names:
        if name not in known:
            raise ExtraMissing(f"there is no exporter {name[:40]!r} for traces", remedy=INSTALL)
    start(*(known[name].load()() for name in names), service=service)


def start(*exporters: SpanExporter, service: str, batched: bool = True) -> None:
    """Trace this process; `configure` calls it. Raises `ExtraMissing`."""
    try:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
    except ImportError as exc:
        raise ExtraMissing("the OpenTelemetry SDK is not installed", remedy=INSTALL) from exc
    named = os.environ.get("OTEL_SERVICE_NAME") or service
    provider = TracerProvider(
        resource=Resource.create({"service.name": named}), id_generator=cast(Any, _TracerState.ids)
    )
    for exporter in exporters:
        processor = BatchSpanProcessor if batched else SimpleSpanProcessor
        provider.add_span_processor(processor(exporter))
    _TracerState.provider, _TracerState.tracer = provider, provider.get_tracer("silotune")


def stop() -> None:
    """Deliver what is left, and trace no longer."""
    if _TracerState.provider is not None:
        _TracerState.provider.shutdown()
    _TracerState.provider = _TracerState.tracer = None


@contextmanager
def span(
    name: str, *, run: str = "", round: int = 0, parent: str | None = None, begins: bool = False
) -> Iterator[None]:
    """A span around a block, within the one that is open; nothing while tracing is off.

    Parameters
    ----------
    name : str
        One of ours; never made of data.
    run, round
        What it belongs to.
    parent : str, optional
        A ``traceparent`` from elsewhere; one that is not well formed is passed over.
    begins : bool
        Begin the run's own trace.
    """
    tracer = _TracerState.tracer
    if tracer is None:
        yield
        return
    from opentelemetry import trace

    if begins:
        _TracerState.ids.trace = _hashed(16, run)
    made = tracer.start_span(
        name,
        context=_context(parent, begins=begins),
        attributes=_attributes(run, round),
        record_exception=False,
        set_status_on_exception=False,
    )
    with (
        trace.use_span(
            made, end_on_exit=True, record_exception=False, set_status_on_exception=False
        ),
        _outcome(made),
    ):
        yield


@contextmanager
def exchange(kind: str, *, run: str, round: int) -> Iterator[str]:
    """A span of one exchange with the sites, and the ``traceparent`` for its messages; "" if off.

    It does not become the current span: the block may be left and entered again, as a generator is.
    """
    tracer = _TracerState.tracer
    if tracer is None:
        yield ""
        return
    _TracerState.ids.trace = _hashed(16, run)
    _TracerState.ids.span = _hashed(8, run, str(round), kind)
    made = tracer.start_span(
        f"exchange {kind}",
        attributes=_attributes(run, round),
        record_exception=False,
        set_status_on_exception=False,
    )
    about = made.get_span_context()
    try:
        with _outcome(made):
            yield f"00-{about.trace_id:032x}-{about.span_id:016x}-{about.trace_flags:02x}"
    finally:
        made.end()


@contextmanager
def _outcome(made: Span) -> Iterator[None]:
    """Note the code of an error that ends the block; what it says may be private."""
    try:
        yield
    except Exception as exc:
        from opentelemetry.trace import Status, StatusCode

        code = exc.code if isinstance(exc, SilotuneError) else SilotuneError.code
        made.set_status(Status(StatusCode.ERROR, code))
        raise


def _attributes(run: str, round: int) -> dict[str, str | int]:
    return {"silotune.run": run, "silotune.round": round} if round else {"silotune.run": run}


def _context(parent: str | None, *, begins: bool) -> Any:
    """What the span is within: None is the current one."""
    from opentelemetry import context, trace

    found = _HEADER.fullmatch(parent or "")
    if begins:
        return context.Context()
    if found is None:
        return None
    number, name, flags = (int(part, 16) for part in found.groups())
    about = trace.SpanContext(
        trace_id=number, span_id=name, is_remote=True, trace_flags=trace.TraceFlags(flags)
    )
    return trace.set_span_in_context(trace.NonRecordingSpan(about), context.Context())


def _hashed(size: int, *words: str) -> int:
    """A number of so many bytes that is never 0, the same for the same words."""
    text = "\0".join(("silotune", *words)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:size], "big") or 1
