"""Faults around the coordinator, with real processes: what happens is stated, nothing is lost."""

import json
import sys
import time

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from silotune.protocol.envelope import address_of, seal, unseal
from silotune.trust import identity
from silotune.trust.authority import Authority
from silotune.trust.vault import Vault
from tests.e2e.cable import Cable
from tests.e2e.harness import CoordinatorProcess, as_toml, cli, wait_for
from tests.server.coordinator_material import scripted, small_plan
from tests.server.fleet_site import FleetSite

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROUNDS = 6
SKEWED = """
import sys, time
shift = float(sys.argv.pop(1))
real = time.time
time.time = lambda: real() + shift
import silotune.client.daemon.__main__ as daemon
sys.exit(daemon.main([sys.argv[sys.argv.index("--config") + 1], "text", "debug", "30"]))
"""


@pytest.fixture
def cabled(federation):
    """A federation whose sites reach the coordinator over a cable, in its third round."""
    made = federation(rounds__number=ROUNDS)
    cable = Cable(made.coordinator.port)
    made.proxied_port = cable.port
    try:
        made.up()
        run = made.propose()
        made.coordinator.wait_round(run, 3)
        yield made, cable, run
    finally:
        cable.close()


def finished(made, run, out):
    """The run ends as if nothing had happened: the same adapter, every round charged once."""
    made.coordinator.wait_finished(run, seconds=400)
    assert made.as_simulated(run, out)
    assert made.charges(run) == {name: list(range(1, ROUNDS + 1)) for name in made.sites}


def rounds_done(made, run):
    return len(made.coordinator.events(run, "round_finished"))


def test_all_killed_in_a_round_go_on_together(federation, tmp_path):
    made = federation(rounds__number=ROUNDS).up()
    run = made.propose()
    made.coordinator.wait_round(run, 3)
    for daemon in (made.coordinator, *made.sites.values()):
        daemon.kill()
    for site in made.sites.values():
        site.start()
    time.sleep(3.0)  # the sites are back first, and find nobody
    made.coordinator.up()
    finished(made, run, tmp_path / "adapter")


@pytest.mark.parametrize("seconds", [8.0, 60.0])
def test_a_network_that_is_cut_and_mended_delays_a_run_and_nothing_else(cabled, tmp_path, seconds):
    made, cable, run = cabled
    cable.cut()
    time.sleep(seconds)
    before = rounds_done(made, run)
    assert before < ROUNDS
    time.sleep(1.0)
    assert rounds_done(made, run) == before  # it waits
    assert made.coordinator.state(run)["state"] == "running"
    cable.mend()
    finished(made, run, tmp_path / "adapter")


def test_half_open_connections_are_given_up_and_the_run_goes_on(cabled, tmp_path):
    """Every byte of the connections is lost from now on, as if a firewall had forgotten them."""
    made, cable, run = cabled
    assert cable.freeze() >= len(made.sites)
    finished(made, run, tmp_path / "adapter")


def test_bytes_that_are_changed_under_way_reach_nobody(cabled, tmp_path):
    made, cable, run = cabled
    cable.spoil()
    wait_for(lambda: cable.spoilt > 20, what="tampering")
    before = rounds_done(made, run)
    assert before < ROUNDS
    time.sleep(2.0)
    assert rounds_done(made, run) == before
    cable.mend()
    finished(made, run, tmp_path / "adapter")
    assert made.coordinator.events(run, "site_failed") == []  # no layer above TLS saw any of it


@pytest.mark.parametrize("seconds", [600, -600])
def test_a_site_whose_clock_is_ten_minutes_off_is_kept_out_and_told_so(federation, seconds):
    made = federation(rounds__number=3).up()
    alpha = made.sites["alpha"]
    assert alpha.terminate() == 0
    before = len(alpha.output)
    words = ["site", "start", "--config", str(alpha.config), "--log-level", "debug"]
    alpha.start(command=[sys.executable, "-c", SKEWED, str(seconds), *words])
    wait_for(lambda: "ST-745" in alpha.output[before:], what="the site's word on its clock")
    time.sleep(2.0)
    assert "online at" not in alpha.output[before:]
    rows = {row["site"]: row for row in made.coordinator.admin.get("/sites")}
    assert not rows["alpha"]["online"]
    assert rows["alpha"]["status"] == "active"
    alpha.kill()
    alpha.start()
    made.wait_online()


def test_a_coordinator_of_another_authority_gets_no_site(federation):
    made = federation(rounds__number=3).up()
    made.coordinator.kill()
    keys = made.coordinator.folder / "keys"
    server = identity.new_node_key()
    foreign = Authority.create("demo").issue_server(
        server.public_key(), hosts=["127.0.0.1", "localhost"]
    )
    (keys / "server.pem").write_text(identity.chain_pem([foreign]))
    Vault(keys).write(keys / "server.key", identity.private_pem(server))
    made.coordinator.up()
    for site in made.sites.values():
        before = len(site.output)
        wait_for(lambda s=site, n=before: "ST-743" in s.output[n:], what="the refusal")
        assert site.running  # it keeps trying, and says why
        assert "online at" not in site.output[before:]


def test_a_revoked_site_is_out_and_the_round_goes_on_without_it(federation):
    made = federation(rounds__number=ROUNDS, rounds__min_sites=2).up()
    run = made.propose()
    made.coordinator.wait_round(run, 2)
    started = time.monotonic()
    made.coordinator.cli("sites", "revoke", "gamma", "--reason", "test")
    made.coordinator.wait_finished(run, seconds=300)
    assert time.monotonic() - started < 100.0  # nobody waits for it, as for one that is offline
    replied = made.coordinator.events(run, "site_replied")
    last = {event["site"] for event in replied if event["round"] == ROUNDS}
    assert last == {"alpha", "beta"}
    assert made.coordinator.audit("site_revoked")[0]["site"] == "gamma"
    gamma = made.sites["gamma"]
    wait_for(lambda: "403 Forbidden" in gamma.output, what="the refusal at the site")
    assert not {r["site"]: r for r in made.coordinator.admin.get("/sites")}["gamma"]["online"]


def test_a_taken_port_or_folder_is_said_so(federation):
    made = federation(rounds__number=3)
    made.coordinator.up()
    second = cli("coordinator", "start", "--dir", made.coordinator.folder, check=False)
    assert second.returncode == 70
    assert "ST-722" in second.stderr
    other = made.folder / "other"
    words = ["--name", "other", "--host", "127.0.0.1", "--listen", "127.0.0.1"]
    cli("coordinator", "init", "--dir", other, *words, "--port", made.coordinator.port)
    taken = cli("coordinator", "start", "--dir", other, check=False)
    assert taken.returncode == 70
    assert "ST-724" in taken.stderr
    assert made.coordinator.admin.get("/status")["federation"] == "demo"


class Dishonest(FleetSite):
    """Sends its answer of round 1 again in round 2, and in round 3 one under somebody else's key."""

    def send(self, reply):
        address = address_of(reply.content)
        if address.kind == "train":
            if address.round == 1:
                self.kept = reply.content
            elif address.round == 2:
                reply.content = self.kept
            elif address.round == 3:
                forged = unseal(reply.content, address=address, key=self.signing.public_key())
                reply.content = seal(forged, address=address, key=Ed25519PrivateKey.generate())
        return super().send(reply)


def test_a_replayed_and_a_forged_reply_count_for_nothing_and_raise_alarms(tmp_path):
    coordinator = CoordinatorProcess(tmp_path / "coordinator").up()
    sites = []
    try:
        for name, kind in (("alpha", FleetSite), ("beta", FleetSite), ("gamma", Dishonest)):
            site = kind(name, coordinator.invite(name))
            sites.append(site)
            assert site.ask().status_code == 200
            coordinator.admin.post(f"/requests/{site.enrolment}/approve")
            assert site.collect().state == "approved"
            site.activate().serve(scripted(name))
        path = tmp_path / "plan.toml"
        path.write_text(as_toml(json.loads(small_plan(**{"rounds.number": 4}).canonical())))
        run = coordinator.cli("run", path)["run"]
        digest = coordinator.state(run)["plan_sha256"]
        assert all(site.decide(run, digest).status_code == 200 for site in sites)
        assert coordinator.wait_over(run)["state"] == "finished"
        failed = [
            (e["round"], e["site"], e["code"]) for e in coordinator.events(run, "site_failed")
        ]
        assert failed == [(2, "gamma", "ST-804"), (3, "gamma", "ST-804")]
        replied = {(e["round"], e["site"]) for e in coordinator.events(run, "site_replied")}
        honest = {(number, name) for number in range(1, 5) for name in ("alpha", "beta")}
        assert replied == honest | {(1, "gamma"), (4, "gamma")}
        alarms = [
            line for line in coordinator.audit("alarm") if line["what"] == "reply_not_trusted"
        ]
        assert [line["site"] for line in alarms][:1] == ["gamma"]
    finally:
        for site in sites:
            site.close()
        coordinator.close()
