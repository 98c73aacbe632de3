"""Ids of spans: drawn, unless the next one was laid down. Needs the OpenTelemetry SDK."""

from __future__ import annotations

import threading

from opentelemetry.sdk.trace.id_generator import RandomIdGenerator


class _Next(threading.local):
    """The ids that come next in this thread; 0: drawn."""

    trace = 0
    span = 0


class Ids(RandomIdGenerator):
    """Draws ids, but first gives those that were laid down in `next`, once each."""

    def __init__(self) -> None:
        self.next = _Next()

    def is_trace_id_random(self) -> bool:
        """No: some are made of names, and the header's flags must not say otherwise."""
        return False

    def generate_trace_id(self) -> int:
        """The one laid down, or a random one."""
        found, self.next.trace = self.next.trace, 0
        return found or super().generate_trace_id()

    def generate_span_id(self) -> int:
        """The one laid down, or a random one."""
        found, self.next.span = self.next.span, 0
        return found or super().generate_span_id()
