"""A coordinator in this process whose runs are told by hand, and people with certificates."""

import socket
import time
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from silotune.plan.plan import Plan
from silotune.protocol.http import EnrolRequest
from silotune.server import listener
from silotune.server.admin.client import AdminAddress, ControlClient, save_credentials
from silotune.server.config import Home
from silotune.server.coordinator import create
from silotune.server.store.people import People
from silotune.trust import identity
from silotune.trust.invite import Invite
from silotune.trust.signed import SignedPlan
from tests.server.opening import open_coordinator


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def plan_of(name="demo", rounds=3, purpose="to test"):
    return Plan.from_mapping(
        {
            "plan": {"name": name, "purpose": purpose},
            "model": {"base": "x", "task": "text_classification", "labels": ["a", "b"]},
            "data": {"dataset": "d"},
            "rounds": {"number": rounds, "min_sites": 2, "deadline": 30.0},
            "privacy": {
                **{"mode": "record", "epsilon": 8.0, "delta": 1e-5},
                **{"clip": {"head": 1.0, "adapter": 1.0}, "rate": 0.1},
            },
        }
    )


class Office:
    """A coordinator that can be restarted on its ports, its people, and runs told by hand."""

    def __init__(self, folder):
        self.folder, self.home = folder, Home(folder / "coordinator")
        create(self.home, name="demo", hosts=["127.0.0.1"], listen="127.0.0.1", port=free_port())
        text = self.home.config_path.read_text()
        for port in ("8444", "8445"):
            text = text.replace(f"# port = {port}", f"port = {free_port()}")
        self.home.config_path.write_text(text)
        self.start()

    def start(self):
        self.coordinator = open_coordinator(self.home)
        with patch.object(listener, "_SHUTDOWN_SECONDS", 0.5):  # browsers leave connections open
            self.coordinator.start()

    def restart(self):
        self.coordinator.close()
        self.start()

    def credentials(self, name, role, *, days=None, authority=None) -> Path:
        """A folder as `silotune coordinator people add` makes it."""
        folder = self.folder / f"person-{name}"
        key = identity.new_node_key()
        request = identity.make_request(name, key)
        keys = self.coordinator.keys
        signer = authority or keys.authority
        if days is None and authority is None:
            people = People(self.coordinator.store)
            certificate = people.issue(signer, request, name=name, role=role)
        else:
            subject = identity.Subject(name=name, role=role)
            certificate = signer.issue_client(request, subject=subject, days=days or 1)
        save_credentials(
            folder,
            address=AdminAddress(
                address=self.coordinator.operations.admin_address, server_name="127.0.0.1"
            ),
            key=identity.private_pem(key),
            certificate=identity.chain_pem([certificate]),
            authority=identity.chain_pem([keys.authority.certificate]),
        )
        return folder

    def client(self, name, role, **how):
        return ControlClient(self.credentials(name, role, **how))

    def asks_to_join(self, site):
        """A site's request to be enrolled; its id."""
        registrar = self.coordinator.registrar
        code = Invite.decode(registrar.invite(site, url=self.coordinator.url))
        signing = Ed25519PrivateKey.generate()
        request = EnrolRequest.make(
            signing,
            secret=code.secret,
            federation="demo",
            name=site,
            request=identity.make_request(site, identity.new_node_key()),
            signing_key=identity.encode_signing_key(signing.public_key()),
            sent_at=int(time.time()),
        )
        return registrar.enrol(request).enrolment

    def told_run(self, run="demo-1", *, state="running", rounds=3, plan=None, **settings):
        """A run in the store that no thread performs; what happens in it is told by `record`."""
        run_control = self.coordinator.run_control
        plan = plan or plan_of(rounds=rounds, **settings)
        signed = SignedPlan.sign(plan, self.coordinator.keys.signing)
        run_control.runs.propose(plan, signed, run=run, quorum=2)
        run_control.runs.change(run, state=state, started_at=time.time())
        return self.record(run)

    def record(self, run):
        return self.coordinator.run_control._parts.record(run)

    def close(self):
        self.coordinator.close()


def tell_round(record, number, sites, *, failed=(), size=64):
    """One round as the round loop tells it, with an adapter of `size` numbers."""
    record.append_event("round_started", round=number, phase="adapter", cohort=list(sites))
    for site in sites:
        if site in failed:
            record.append_event("site_failed", round=number, site=site, code="ST-603")
        else:
            record.append_event("site_replied", round=number, site=site, bytes=4 * size)
    arrays = {"flat": np.full(size, number, dtype=np.float32)}
    record.save_adapter(number, arrays)
    record.save_checkpoint(arrays, {"round": number, "plan_sha256": "", "layout": ""})
    record.append_event(
        "round_finished",
        round=number,
        seconds=1.5,
        wait_seconds=1.2,
        aggregate_seconds=0.1,
        bytes_up=4 * size * len(sites),
        bytes_down=4 * size * len(sites),
    )


@pytest.fixture(scope="module")
def office(tmp_path_factory):
    """One for a module: tests keep apart by the names of their runs, people and sites."""
    made = Office(tmp_path_factory.mktemp("office"))
    yield made
    made.close()
