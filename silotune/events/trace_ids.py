"""Ids of spans: drawn, unless the next one was laid down. Needs the OpenTelemetry SDK."""

from __future__ import annotations

import threading

from opentelemetry.sdk.trace.id_generator import RandomIdGenerator


class Ids(RandomIdGenerator):
    """Draws ids; `trace` and `span`, if set, are the next ones of this thread, once."""

    def __init__(self) -> None:
        self._own = threading.local()

    @property
    def trace(self) -> int:
        """Id of this thread's next new trace; 0: drawn."""
        return int(getattr(self._own, "trace", 0))

    @trace.setter
    def trace(self, number: int) -> None:
        self._own.trace = number

    @property
    def span(self) -> int:
        """Id of this thread's next span; 0: drawn."""
        return int(getattr(self._own, "span", 0))

    @span.setter
    def span(self, number: int) -> None:
        self._own.span = number

    def is_trace_id_random(self) -> bool:
        """No: some are made of names, and the header's flags must not say otherwise."""
        return False

    def generate_trace_id(self) -> int:
        """The one laid down, or a random one."""
        found, self.trace = self.trace, 0
        return found or super().generate_trace_id()

    def generate_span_id(self) -> int:
        """The one laid down, or a random one."""
        found, self.span = self.span, 0
        return found or super().generate_span_id()
