"""Claims about traces: off by default, switched by OpenTelemetry's own variables, and tight-lipped."""

import json
import os
import re
import subprocess
import sys

import pytest
from opentelemetry.trace import StatusCode

from silotune.errors import BudgetExceeded, ExtraMissing
from silotune.events import tracing
from tests.events.tracing_material import traced

REMOTE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"  # the W3C's own example


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    for name in ("OTEL_TRACES_EXPORTER", "OTEL_SDK_DISABLED", "OTEL_EXPORTER_OTLP_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    yield
    tracing.stop()


def test_nothing_is_traced_unless_the_environment_asks():
    tracing.configure("s")
    assert tracing._TracerState.tracer is None
    with tracing.span("x"), tracing.exchange("train", run="r", round=1) as header:
        assert header == ""


@pytest.mark.parametrize("value", ["none", "", " none , "])
def test_none_is_an_exporter_that_traces_nothing(value, monkeypatch):
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", value)
    assert tracing.wanted() == []


def test_an_endpoint_alone_asks_for_otlp_and_the_switch_turns_all_off(monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318")
    assert tracing.wanted() == ["otlp"]
    monkeypatch.setenv("OTEL_SDK_DISABLED", "TRUE")
    assert tracing.wanted() == []


def test_the_environment_switches_a_known_exporter_on():
    code = (
        "from silotune.events import tracing\n"
        "tracing.configure('silotune-site')\n"
        "with tracing.span('train', run='r'): pass\n"
        "tracing.stop()"
    )
    chosen = {"OTEL_TRACES_EXPORTER": "console", "OTEL_SERVICE_NAME": "north"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **chosen},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    span = json.loads(done.stdout)
    assert (span["name"], span["attributes"]) == ("train", {"silotune.run": "r"})
    assert span["resource"]["attributes"]["service.name"] == "north"


def test_an_exporter_that_is_not_installed_is_named_with_the_command(monkeypatch):
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "zipkin-of-ours")
    with pytest.raises(ExtraMissing, match="zipkin-of-ours") as caught:
        tracing.configure("s")
    assert caught.value.remedy == "pip install 'silotune[otel]'"


def test_spans_nest_and_a_remote_parent_is_taken():
    with traced() as spans:
        with tracing.span("train", parent=REMOTE, run="r", round=3), tracing.span("release"):
            pass
        release, train = spans()
    assert f"{train.context.trace_id:032x}" == REMOTE.split("-")[1]
    assert f"{train.parent.span_id:016x}" == REMOTE.split("-")[2]
    assert train.parent.is_remote
    assert release.parent.span_id == train.context.span_id
    assert dict(train.attributes) == {"silotune.run": "r", "silotune.round": 3}


@pytest.mark.parametrize(
    "header",
    ["", "nonsense", REMOTE + "0", REMOTE.upper(), "00-" + "0" * 32 + REMOTE[35:], "é" * 55],
)
def test_a_header_that_is_not_well_formed_begins_a_trace_of_its_own(header):
    with traced() as spans:
        with tracing.span("train", parent=header):
            pass
        (train,) = spans()
    assert train.parent is None
    assert train.context.trace_id


def test_an_exchange_has_the_same_ids_in_every_process():
    headers = []
    for _ in range(2):
        with traced(), tracing.span("run", run="r", begins=True), tracing.span("round", round=1):
            with tracing.exchange("train", run="r", round=1) as first:
                pass
            with tracing.exchange("evaluate", run="r", round=1) as second:
                pass
            headers.append((first, second))
    assert headers[0] == headers[1]
    assert first != second
    assert re.fullmatch(r"00-[0-9a-f]{32}-[0-9a-f]{16}-01", first)
    assert first.split("-")[1] == second.split("-")[1]


def test_an_error_leaves_its_code_and_not_a_word_of_what_it_said():
    with traced() as spans:
        for error in (BudgetExceeded("patient 17 has gout"), ValueError("patient 17 has gout")):
            with pytest.raises(type(error)), tracing.span("train", run="r"):
                raise error
        ours, other = spans()
    assert (ours.status.status_code, ours.status.description) == (
        StatusCode.ERROR,
        BudgetExceeded.code,
    )
    assert other.status.description == "ST-000"
    for found in (ours, other):
        assert not found.events
        assert "gout" not in found.to_json()
