"""The site's own page: read-only unless asked for otherwise, and true to the site's files."""

import re
import time

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from starlette.testclient import TestClient

from silotune.client.approvals import Approvals
from silotune.client.daemon.page import build
from silotune.client.daemon.socket import ControlSocket
from silotune.dashboard.page_guard import Access, OwnerLink
from silotune.data.site import SiteConfig
from silotune.privacy.events import step_event
from silotune.privacy.ledger import LEDGER_FILE, Budget, Ledger, ReleaseKey
from silotune.privacy.ledger_view import dataset_rows
from silotune.protocol.http import Proposal
from silotune.trust.audit import AUDIT_FILE, AuditLog
from silotune.trust.identity import Person
from silotune.trust.signed import SignedPlan
from tests.client.site_material import write_site_folder

EVIL = "<script>alert(1)</script>"
HTML = {"accept": "text/html"}


@pytest.fixture
def site(tmp_path, bert_folder):
    made = write_site_folder(tmp_path, bert_folder)
    site = SiteConfig.load(made.folder / "site.toml")
    federation = Ed25519PrivateKey.generate()
    proposal = Proposal(
        run="demo-1",
        plan=SignedPlan.sign(made.plan, federation),
        plan_sha256=made.plan.sha256,
        state="proposed",
        proposed_at=int(time.time()),
    )
    state = site.state_folder
    AuditLog(state / AUDIT_FILE, owner=site.name).append("plan_proposed", reason=EVIL)
    Approvals(state).take(proposal, federation.public_key())
    return site


def browser(site, role):
    access = Access(hosts=frozenset({"127.0.0.1"}), link=OwnerLink(Person(name="you", role=role)))
    client = TestClient(build(site, access), base_url="http://127.0.0.1", follow_redirects=False)
    assert client.get("/").status_code == 401
    assert client.get("/signin", params={"link": access.link.secret}).status_code == 303
    text = client.get("/", headers=HTML).text
    client.token = re.search(r'name="token" value="([^"]+)"', text)[1]
    return client


def test_the_page_shows_the_plan_the_verdict_and_what_would_leave(site):
    text = browser(site, "viewer").get("/", headers=HTML).text
    assert "demo-1" in text
    assert "Your policy lets it pass." in text
    assert "Leaves each round" in text
    assert "The daemon does not answer" in text
    assert "plan_proposed" in text
    assert "<script>alert" not in text


def test_it_is_read_only_by_default(site):
    client = browser(site, "viewer")
    assert "Approve this very plan" not in client.get("/", headers=HTML).text
    for verdict in ("approve", "reject"):
        answer = client.post(f"/plans/demo-1/{verdict}", data={"token": client.token})
        assert answer.status_code == 403
    assert Approvals(site.state_folder).find("demo-1").decision is None


def test_a_decision_goes_to_the_daemon_as_from_the_command_line(site):
    heard = []

    def handle(request, uid):
        heard.append(dict(request))
        if request["command"] == "status":
            return {
                "link": "online",
                "reason": "",
                "work": "",
                "paused": False,
                "answered": 0,
                "refused": 0,
                "federation": "demo",
                "coordinator": "https://x",
            }
        return {"sent": True}

    socket = ControlSocket(site.state_folder, handle)
    try:
        client = browser(site, "operator")
        form = {"token": client.token, "reason": "too much"}
        assert client.post("/plans/demo-1/approve", data=form).status_code == 303
        assert client.post("/plans/demo-1/reject", data=form).status_code == 303
    finally:
        socket.close()
    decided = [request for request in heard if request["command"] == "decide"]
    assert [fields["verdict"] for fields in decided] == ["approved", "rejected"]
    assert decided[1]["reason"] == "too much"


def test_what_was_spent_is_what_the_ledger_says(site):
    ledger = Ledger(site.state_folder / LEDGER_FILE)
    event = step_event(rate=0.1, sigma=1.0, steps=1)
    budget = Budget(epsilon=8.0, delta=1e-5)
    ledger.reserve("notes", "demo-0", "0" * 64, event, budget=budget)
    key = ReleaseKey(run="demo-0", round=1, release="update")
    ledger.charge("notes", key, "0" * 64, event, "f" * 64)
    text = browser(site, "viewer").get("/", headers=HTML).text
    spent = dataset_rows(ledger)[0]["epsilon_spent"]
    assert f'<td data-label="ε spent">{spent:.2f}</td>' in text
    assert "run by run" in text
