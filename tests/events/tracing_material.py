"""Traces into memory, with OpenTelemetry's own exporter for tests."""

from contextlib import contextmanager

from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from silotune.events import tracing


@contextmanager
def traced():
    """Spans as they end, for as long as the block lasts."""
    exporter = InMemorySpanExporter()
    tracing.start(exporter, service="test", batched=False)
    try:
        yield exporter.get_finished_spans
    finally:
        tracing.stop()
