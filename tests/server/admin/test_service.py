"""The admin API: who may do what, and a watcher that misses nothing."""

import json
import subprocess
import sys
import threading
import time

import grpc
import pytest

from silotune.errors import SilotuneError
from silotune.server.admin.client import ControlClient, compiled
from silotune.server.errors import AdminUnreachable
from silotune.server.store.people import People
from silotune.trust.authority import Authority
from silotune.trust.errors import NotPermitted, SignInNeeded
from tests.server.monitored import office, plan_of, tell_round  # noqa: F401 - a fixture

SITES = ["east", "north", "west"]
LOOKING = {
    "ListRuns": {},
    "GetRun": {"run": "demo-1"},
    "ListSites": {},
    "ListEnrolments": {},
    "ListActions": {},
}
ACTING = {
    "SubmitRun": {"plan": "{}"},
    "PauseRun": {"run": "demo-1"},
    "ResumeRun": {"run": "demo-1"},
    "StopRun": {"run": "demo-1"},
    "RevokeSite": {"site": "north", "reason": "x"},
    "ApproveEnrolment": {"request": "0" * 32},
    "RefuseEnrolment": {"request": "0" * 32},
}
STREAMING = {"Watch": {"run": "demo-1"}, "Download": {"run": "demo-1", "file": "plan.json"}}


def request_of(name, fields):
    messages, _ = compiled()
    method = messages.DESCRIPTOR.services_by_name["Control"].methods_by_name[name]
    return getattr(messages, method.input_type.name)(**fields)


def called(client, name, fields):
    request = request_of(name, fields)
    if name == "Watch":
        return next(client.watch(fields["run"]))
    if name == "Download":
        return client.download(fields["run"], fields["file"])
    return client.call(name, request)


def test_every_call_of_the_service_is_among_those_tried_here():
    messages, _ = compiled()
    calls = messages.DESCRIPTOR.services_by_name["Control"].methods_by_name
    assert set(calls) == set(LOOKING) | set(ACTING) | set(STREAMING)


def test_a_viewer_sees_everything_and_changes_nothing(office):  # noqa: F811
    record = office.told_run("demo-1")
    tell_round(record, 1, SITES)
    client = office.client("vera", "viewer")
    for name, fields in {**LOOKING, **STREAMING}.items():
        called(client, name, fields)
    for name, fields in ACTING.items():
        with pytest.raises(NotPermitted):
            called(client, name, fields)
    assert office.coordinator.run_control.runs.get("demo-1")["state"] == "running"
    refused = {
        row["action"]
        for row in called(client, "ListActions", {})["actions"]
        if row["outcome"] == "ST-625"
    }
    assert refused == {"submit", "pause", "resume", "stop", "revoke", "approve", "refuse"}


def test_certificates_that_do_not_count_open_nothing(office):  # noqa: F811
    foreign = office.credentials("mallory", "operator", authority=Authority.create("demo"))
    expired = office.credentials("ed", "operator", days=-0.01)
    site = office.credentials("north", "site", days=1)
    never_listed = office.credentials("nick", "operator", days=1)
    revoked = office.credentials("rita", "operator")
    People(office.coordinator.store).revoke("rita")
    everything = {**LOOKING, **ACTING, **STREAMING}
    for folder, error in (
        (foreign, AdminUnreachable),
        (expired, AdminUnreachable),
        (site, SignInNeeded),
        (never_listed, SignInNeeded),
        (revoked, SignInNeeded),
    ):
        client = ControlClient(folder)
        for name, fields in everything.items():
            if error is AdminUnreachable and name == "Watch":
                continue  # it waits for the connection: that is its purpose
            with pytest.raises(error):
                called(client, name, fields)
        client.close()
    assert office.coordinator.run_control.runs.get("demo-1")["state"] == "running"


def test_without_a_certificate_no_connection_is_made(office):  # noqa: F811
    folder = office.credentials("vera", "viewer")
    secrets = grpc.ssl_channel_credentials((folder / "authority.pem").read_bytes())
    options = (("grpc.ssl_target_name_override", "127.0.0.1"),)
    with grpc.secure_channel(
        office.coordinator.operations.admin_address, secrets, options
    ) as channel:
        stub = compiled()[1].ControlStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.ListRuns(request_of("ListRuns", {}), timeout=5)
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE


def test_an_operator_acts_and_each_action_is_in_the_audit_log_with_the_name(office):  # noqa: F811
    office.told_run("run-4")
    client = office.client("olga", "operator")
    number = office.asks_to_join("south")
    assert called(client, "ApproveEnrolment", {"request": number}) == {"target": "south"}
    assert called(client, "ListSites", {})["sites"][0]["site"] == "south"
    assert called(client, "PauseRun", {"run": "run-4"})["state"] == "paused"
    assert called(client, "StopRun", {"run": "run-4"})["state"] == "stopped"
    lines = [x for x in office.coordinator.audit.lines() if x.fields.get("who") == "olga"]
    assert [(x.fields["who"], x.fields["action"], x.fields["outcome"]) for x in lines] == [
        ("olga", "approve", "done"),
        ("olga", "pause", "done"),
        ("olga", "stop", "done"),
    ]
    office.coordinator.audit.verify()


def test_a_plan_is_submitted_and_a_wrong_one_is_refused_with_its_code(office):  # noqa: F811
    client = office.client("oscar", "operator")
    for site in SITES:
        called(client, "ApproveEnrolment", {"request": office.asks_to_join(site)})
    found = called(client, "SubmitRun", {"plan": plan_of().canonical()})
    assert (found["state"], found["rounds"]) == ("proposed", 3)
    assert {*SITES} <= {site["site"] for site in found["sites"]}
    with pytest.raises(SilotuneError) as caught:
        called(client, "SubmitRun", {"plan": '{"plan": 3}'})
    assert caught.value.code == "ST-102"


def test_the_adapter_that_is_downloaded_is_the_one_that_was_announced(office):  # noqa: F811
    import hashlib

    record = office.told_run("run-6")
    tell_round(record, 1, SITES, size=700_000)  # more than one piece
    client = office.client("vera", "viewer")
    content = client.download("run-6", "adapter.safetensors")
    announced = [
        e
        for e in client_events(client, "run-6", stop="round_finished")
        if e["event"] == "round_saved"
    ]
    assert announced[0]["sha256"] == hashlib.sha256(content).hexdigest()
    assert announced[0]["bytes"] == len(content)


def client_events(client, run, *, stop):
    found = []
    for event in client.watch(run):
        found.append(event)
        if event["event"] == stop:
            return found
    return found


def test_a_watcher_survives_restarts_and_sees_each_event_once_in_order(office):  # noqa: F811
    record = office.told_run("run-7", rounds=9)
    client = office.client("vera", "viewer")
    seen, waits = [], []

    def watch():
        for event in client.watch("run-7", waiting=waits.append):
            seen.append(event)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    for number in range(1, 10):
        tell_round(record, number, SITES)
        if number in {3, 6}:
            office.coordinator.close()
            time.sleep(0.5)
            # No thread performs this run: one is not to be started for it.
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("silotune.server.run_control.RunControl.start", lambda self: None)
                office.start()
            record = office.record("run-7")
    record.append_event("run_finished", rounds=9)
    office.coordinator.run_control.runs.change("run-7", state="finished")
    thread.join(timeout=40)
    assert not thread.is_alive()
    stored = office.coordinator.operations.source.events("run-7")
    assert seen == stored
    assert waits


def test_health_and_reflection_answer(office):  # noqa: F811
    from grpc_health.v1 import health_pb2, health_pb2_grpc
    from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
        ProtoReflectionDescriptorDatabase,
    )

    client = office.client("vera", "viewer")
    health = health_pb2_grpc.HealthStub(client._channel)
    request = health_pb2.HealthCheckRequest(service="silotune.admin.v1.Control")
    assert health.Check(request).status == health_pb2.HealthCheckResponse.SERVING
    found = ProtoReflectionDescriptorDatabase(client._channel).get_services()
    assert "silotune.admin.v1.Control" in found


def test_the_command_line_is_a_client(office):  # noqa: F811
    tell_round(office.told_run("run-9"), 1, SITES)
    folder = office.credentials("valerie", "viewer")

    def run(*arguments):
        code = "from silotune.cli import main; main()"
        command = [sys.executable, "-c", code, "admin", *arguments, "--credentials", str(folder)]
        return subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)

    shown = json.loads(run("show", "run-9", "--json").stdout)
    assert (shown["state"], shown["round"]) == ("running", 1)
    refused = run("stop", "run-9")
    assert refused.returncode == 60
    assert "ST-625" in refused.stderr
    assert "valerie is a viewer" in refused.stderr
