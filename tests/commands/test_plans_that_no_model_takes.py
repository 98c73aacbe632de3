"""A plan that the base model can't be trained by is refused before anybody waits for it.

The same three plans at every place where a person looks: `plan check`, `coordinator run`, the site's
doctor and the site's list of plans.
"""

import json
import time

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from typer.testing import CliRunner

from silotune import cli
from silotune.client.approvals import Approvals
from silotune.client.daemon.doctor import SiteDoctor
from silotune.data.site import SiteConfig
from silotune.models import base
from silotune.plan.plan import Plan
from silotune.protocol.http import Proposal
from silotune.trust.signed import SignedPlan
from tests.client.site_material import write_site_folder

BAD = {
    "length": ({"data.max_length": 65}, "ST-306", "is 65, the model takes 64 tokens"),
    "layers": ({"lora.last_layers": 4}, "ST-300", "is 4, the model has 3 numbered layers"),
    "targets": (
        {"lora.target_modules": ["qeury"], "lora.last_layers": None},
        "ST-304",
        "did you mean query?",
    ),
}


@pytest.fixture
def site(tmp_path, bert_folder):
    return write_site_folder(tmp_path, bert_folder)


def plan_of(site, kind, **more) -> tuple[Plan, str, str]:
    changes, code, words = BAD[kind]
    return site.plan.override({**changes, **more}), code, words


def written(site, plan):
    """The plan as a TOML file of its own folder."""
    path = site.folder / "tried" / "plan.toml"
    path.parent.mkdir()
    lines = []
    for section, table in plan.model_dump(mode="json", exclude_none=True).items():
        lines.append(f"[{section}]")
        plain = {k: v for k, v in table.items() if not isinstance(v, dict)}
        lines += [f"{key} = {json.dumps(value)}" for key, value in plain.items()]
        for name, inner in table.items():
            if isinstance(inner, dict):
                lines.append(f"[{section}.{name}]")
                lines += [f"{key} = {json.dumps(value)}" for key, value in inner.items()]
    path.write_text("\n".join(lines))
    return path


def proposed(site, plan) -> SiteConfig:
    config = SiteConfig.load(site.folder / "site.toml")
    key = Ed25519PrivateKey.generate()
    proposal = Proposal(
        run="r-1",
        plan=SignedPlan.sign(plan, key),
        plan_sha256=plan.sha256,
        state="proposed",
        proposed_at=int(time.time()),
    )
    Approvals(config.state_folder).take(proposal, key.public_key())
    return config


@pytest.mark.parametrize("kind", BAD)
def test_plan_check_refuses_it(site, kind, bert_folder):
    plan, code, words = plan_of(site, kind, **{"model.base": str(bert_folder)})
    result = CliRunner().invoke(cli.app, ["plan", "check", str(written(site, plan))])
    assert result.exception.code == code
    assert words in result.exception.detail


@pytest.mark.parametrize("kind", BAD)
def test_the_coordinator_does_not_propose_it(site, kind, bert_folder, monkeypatch):
    def post(*args, **kwargs):
        pytest.fail("it was proposed")

    client = type("Client", (), {"post": post})
    monkeypatch.setattr("silotune.commands.coordinator.client_of", lambda folder: client())
    plan, code, words = plan_of(site, kind, **{"model.base": str(bert_folder)})
    result = CliRunner().invoke(cli.app, ["coordinator", "run", str(written(site, plan))])
    assert result.exception.code == code
    assert words in result.exception.detail


def test_a_coordinator_without_the_base_model_says_what_it_did_not_look_at(site, monkeypatch):
    answer = {"run": "r-1", "plan_sha256": "ab" * 32, "decisions": []}
    client = type("Client", (), {"post": lambda *args, **kwargs: answer})
    monkeypatch.setattr("silotune.commands.coordinator.client_of", lambda folder: client())
    plan = site.plan.override({"model.base": "someone/elsewhere"})
    result = CliRunner().invoke(cli.app, ["coordinator", "run", str(written(site, plan))])
    assert result.exit_code == 0, result.output
    assert "Not tried on the base model" in result.output
    assert "someone/elsewhere" in result.output


@pytest.mark.parametrize("kind", BAD)
def test_the_sites_doctor_and_its_list_of_plans_tell_it(site, kind):
    plan, code, words = plan_of(site, kind)
    config = proposed(site, plan)
    finding = {found.check: found for found in SiteDoctor(config).examine()}["plan of r-1"]
    assert (finding.state, finding.code) == ("failed", code)
    assert words in finding.detail
    path = str(site.folder / "site.toml")
    listed = CliRunner().invoke(cli.app, ["site", "plans", "--config", path, "--json"])
    (found,) = json.loads(listed.output)["plans"]
    assert found["problem"].startswith(code)
    assert words in found["problem"]
    assert not found["allowed"]
    refused = CliRunner().invoke(cli.app, ["site", "approve", plan.sha256[:12], "--config", path])
    assert refused.exception.code == code


def test_a_plan_that_the_model_takes_is_tried_once_and_passes(site, monkeypatch):
    monkeypatch.setattr(base, "_ANSWERS", {})
    config = proposed(site, site.plan)
    for _ in range(2):
        finding = {found.check: found for found in SiteDoctor(config).examine()}["plan of r-1"]
        assert finding.state == "ok", finding.detail
    assert len(base._ANSWERS) == 1
