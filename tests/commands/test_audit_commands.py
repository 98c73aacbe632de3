"""`silotune audit` and `silotune site` as their users meet them."""

import json
import math

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from typer.testing import CliRunner

from silotune import cli
from silotune.client.approvals import Approvals
from silotune.client.errors import DaemonAbsent, RunNotProposed
from silotune.commands import site as site_commands
from silotune.data.site import SiteConfig
from silotune.protocol.http import Proposal
from silotune.trust.audit import AuditLog
from silotune.trust.errors import AuditLogDamaged
from silotune.trust.identity import encode_signing_key
from silotune.trust.signed import SignedPlan
from tests.client.site_material import write_site_folder

KEY = Ed25519PrivateKey.generate()
SITE_COMMANDS = [
    "join", "doctor", "start", "status", "pause", "resume", "leave", "plans", "approve", "reject",
]  # fmt: skip


def invoke(*words):
    return CliRunner().invoke(cli.app, [str(word) for word in words])


@pytest.fixture
def logs(tmp_path):
    own = AuditLog(tmp_path / "site" / "audit.jsonl", owner="north")
    other = AuditLog(tmp_path / "coordinator" / "audit.jsonl", owner="coordinator")
    for number in (1, 2):
        head = own.append("answered", run="r1", round=number)
        signature = head.sign(KEY)
        own.witness(head, signature, KEY.public_key())
        other.counter_signed(head, signature, KEY.public_key())
    own.append("approved", run="r2", reason="good [bold]work[/]")
    return own, other


def test_verify_says_what_was_checked(logs, tmp_path):
    own, other = logs
    result = invoke("audit", "verify", tmp_path / "site", "--against", other.path)
    assert result.exit_code == 0
    assert "Intact: 6 lines of north" in result.output
    assert "signed 2 heads of it, and all of them are here" in result.output
    key = encode_signing_key(KEY.public_key())
    found = json.loads(invoke("audit", "verify", own.path, "--key", key, "--json").output)
    assert (found["owner"], found["lines"], found["intact"]) == ("north", 6, True)


@pytest.fixture
def federation_logs(tmp_path):
    """A coordinator and three sites that have signed each other's heads after two rounds."""
    federation = Ed25519PrivateKey.generate()
    keys = {name: Ed25519PrivateKey.generate() for name in ("north", "south", "west")}
    coordinator = AuditLog(tmp_path / "coordinator" / "audit.jsonl", owner="coordinator")
    sites = {name: AuditLog(tmp_path / name / "audit.jsonl", owner=name) for name in keys}
    for number in (1, 2):
        for name, log in sites.items():
            for signer, key, signed in (
                (coordinator, federation, log),
                (log, keys[name], coordinator),
            ):
                head = signed.append("answered", run="r1", round=number)
                signature = head.sign(key)
                signer.counter_signed(head, signature, key.public_key())
                signed.witness(head, signature, key.public_key())
    return coordinator, sites


def test_the_coordinators_log_agrees_with_each_of_three_sites_and_theirs_with_it(federation_logs):
    coordinator, sites = federation_logs
    for log in sites.values():
        for one, other in ((coordinator, log), (log, coordinator)):
            result = invoke("audit", "verify", one.path.parent, "--against", other.path.parent)
            assert result.exit_code == 0, result.exception
            assert "signed 2 heads of it, and all of them are here" in result.output


def test_a_site_that_forgot_a_signature_is_found_among_three(federation_logs, tmp_path):
    coordinator, sites = federation_logs
    forgetful = AuditLog(tmp_path / "forgetful" / "audit.jsonl", owner="west")
    told = [line for line in sites["west"].lines() if line.kind == "counter_signed"]
    forgetful.append("counter_signed", **told[-1].fields)  # the first of the two is gone
    result = invoke("audit", "verify", coordinator.path, "--against", forgetful.path)
    assert isinstance(result.exception, AuditLogDamaged)
    assert "lacks the counter-signature" in result.exception.detail


def test_verify_finds_an_edit_and_a_stranger(logs):
    own, _ = logs
    stranger = encode_signing_key(Ed25519PrivateKey.generate().public_key())
    assert isinstance(
        invoke("audit", "verify", own.path, "--key", stranger).exception, AuditLogDamaged
    )
    content = own.path.read_bytes()
    own.path.write_bytes(content.replace(b'"round":1', b'"round":7'))
    assert isinstance(invoke("audit", "verify", own.path).exception, AuditLogDamaged)


def test_show_selects_and_never_takes_particulars_for_markup(logs):
    own, _ = logs
    shown = invoke("audit", "show", own.path, "--run", "r2").output
    assert "approved" in shown
    assert "[bold]work[/]" in shown.replace("\n", "")
    rows = json.loads(invoke("audit", "show", own.path, "--kind", "answered", "--json").output)
    assert [row["round"] for row in rows] == [1, 2]
    assert len(json.loads(invoke("audit", "show", own.path, "--last", "1", "--json").output)) == 1


def test_export_is_the_log_itself(logs, tmp_path):
    own, _ = logs
    out = tmp_path / "out.jsonl"
    assert invoke("audit", "export", own.path, "--out", out).exit_code == 0
    assert out.read_bytes() == own.path.read_bytes()
    assert out.stat().st_mode & 0o777 == 0o600
    table = invoke("audit", "export", own.path, "--format", "csv", "--run", "r1").output
    assert table.splitlines()[0] == "seq,time,kind,particulars,hash"
    assert len(table.splitlines()) == 3


@pytest.mark.parametrize("command", SITE_COMMANDS)
def test_every_site_command_explains_itself(command):
    result = invoke("site", command, "--help")
    assert result.exit_code == 0
    assert len(result.output) > 300
    assert "--config" in result.output


@pytest.fixture
def proposed(tmp_path, bert_folder):
    made = write_site_folder(tmp_path / "sites", bert_folder)
    site = SiteConfig.load(made.folder / "site.toml")
    plans = {"first": made.plan, "second": made.plan.override({"rounds.number": 4})}
    approvals = Approvals(site.state_folder, own=KEY.public_key())
    for number, (run, plan) in enumerate(plans.items()):
        proposal = Proposal(
            run=run, plan=SignedPlan.sign(plan, KEY), plan_sha256=plan.sha256, state="proposed",
            proposed_at=number,
        )  # fmt: skip
        approvals.take(proposal, KEY.public_key())
    approvals.decide("first", "approved", reason="", federation="f", site="alpha", key=KEY)
    return site.folder / "site.toml", plans


def test_plans_shows_what_a_person_has_to_know(proposed):
    config, plans = proposed
    shown = invoke("site", "plans", "second", "--config", config).output
    for part in (
        "Purpose", "What leaves.", "bytes a round at most", "Epsilon.", "0.000 now", "with this run",
        "max_total_epsilon", "base_models", "changed since first", "rounds.number",
        f"silotune site approve {plans['second'].sha256[:12]}",
    ):  # fmt: skip
        assert part in shown, part
    found = json.loads(invoke("site", "plans", "--config", config, "--json").output)["plans"]
    assert [plan["run"] for plan in found] == ["second", "first"]
    second = found[0]
    assert second["allowed"] is True
    assert second["changes"] == [{"key": "rounds.number", "old": 5, "new": 4}]
    assert second["leaves"]["bytes"] == 4 * sum(
        math.prod(t["shape"]) for t in second["leaves"]["tensors"]
    )
    assert second["spending"]["after"] == pytest.approx(4.0, rel=0.02)
    assert second["spending"]["left"] == pytest.approx(8.25 - 4.0, abs=0.1)


def test_a_plan_that_the_policy_refuses_is_shown_so_and_can_not_be_approved(proposed):
    config, _ = proposed
    config.write_text(config.read_text().replace("max_rounds = 10", "max_rounds = 2"))
    shown = invoke("site", "plans", "second", "--config", config).output
    assert "refuse ST-513" in shown
    assert "silotune site approve" not in shown
    refused = invoke("site", "approve", "second", "--config", config)
    assert refused.exception.code == "ST-513"


def test_a_hash_must_mean_one_open_plan(proposed):
    config, plans = proposed
    assert isinstance(
        invoke("site", "approve", "ab" * 6, "--config", config).exception, RunNotProposed
    )
    for short in ("", plans["first"].sha256[:3]):
        assert isinstance(
            invoke("site", "approve", short, "--config", config).exception, RunNotProposed
        )


def test_decisions_go_to_the_daemon(proposed, monkeypatch):
    config, plans = proposed
    asked = []

    def ask(state, command, **fields):
        asked.append((command, fields))
        return {"run": fields["run"], "verdict": fields["verdict"], "sent": False}

    assert isinstance(
        invoke("site", "approve", "second", "--config", config).exception, DaemonAbsent
    )
    monkeypatch.setattr(site_commands, "ask", ask)
    digest = plans["second"].sha256[:12]
    said = invoke("site", "approve", digest, "--config", config).output
    assert "Run second is approved. The coordinator will be told" in said
    invoke("site", "reject", "first", "--reason", "too long", "--config", config)
    assert asked == [
        ("decide", {"run": "second", "verdict": "approved", "reason": ""}),
        ("decide", {"run": "first", "verdict": "rejected", "reason": "too long"}),
    ]


def test_the_plan_of_one_run_is_shown_with_what_it_makes_of_the_records(proposed):
    config, _ = proposed
    notes = config.parent / "notes.csv"
    notes.write_text(notes.read_text() + "asthma of the left side,perhaps,p\n")
    shown = " ".join(invoke("site", "plans", "second", "--config", config).output.split())
    assert "alpha leaves out column 'chronic': label is not one of model.labels in row 62" in shown
    assert "'perhaps' (1)" in shown
    assert "leaves out" not in invoke("site", "plans", "--config", config).output
    config.write_text(config.read_text().replace("path =", 'labels = ["no", "perhaps"]\npath ='))
    refused = " ".join(invoke("site", "plans", "second", "--config", config).output.split())
    assert "ST-210" in refused
    result = invoke("site", "approve", "second", "--config", config)
    assert "lacks 'perhaps', which labels of [datasets.notes] declares" in str(result.exception)
