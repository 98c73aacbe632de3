"""Wrote the golden files of a coordinator: its folder, and databases of every schema there was."""

import sqlite3
import tempfile
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from flwr.app import ConfigRecord, RecordDict
from sqlalchemy import create_engine, inspect

from silotune.flower.link_messages import LinkMessages, Outgoing
from silotune.flower.message_frames import apart, frames, read_frame
from silotune.flower.messages import LinkRun, reply
from silotune.privacy.certificate import issue
from silotune.privacy.events import gaussian_event
from silotune.privacy.ledger import Budget, Ledger
from silotune.protocol.http import (
    Decision,
    EnrolRequest,
    HandedIn,
    HeadExchange,
    LedgerHead,
    LogHead,
    Spent,
)
from silotune.server.books import Certificates
from silotune.server.config import FEDERATION_KEY as FEDERATION_KEY_FILE
from silotune.server.config import Home
from silotune.server.coordinator import create
from silotune.server.store.database import METADATA, migrate
from silotune.server.store.people import Actions, People
from silotune.server.store.runs import Runs
from silotune.strategies import strategy_for
from silotune.trust.identity import Person, encode_signing_key, make_request, new_node_key
from silotune.trust.invite import Invite
from silotune.trust.signed import SignedPlan
from silotune.trust.vault import Vault
from tests.golden.material import (
    BARE,
    DATASET,
    DELTA,
    FEDERATION,
    FEDERATION_KEY,
    LAYOUT,
    MEMBERS,
    RUN,
    SCHEMAS,
    SECURE,
    UPDATE,
    plan_of,
    vector,
)
from tests.golden.read_coordinator import opened
from tests.golden.registry import makes

KEYS = {
    name: Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32)
    for number, name in enumerate(MEMBERS, start=1)
}
TEN_YEARS = 3.0e8


@makes("coordinator")
def coordinator(folder):
    home = Home(folder)
    create(home, name=FEDERATION, hosts=["127.0.0.1"], listen="127.0.0.1", port=8443)
    raw = FEDERATION_KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    Vault(home.keys).write(home.keys / FEDERATION_KEY_FILE, raw)
    with opened(folder) as found:
        enrol(found)
        people(found)
        run(found)
        messages(found)


def enrol(found):
    registrar = found.registrar
    for name, key in KEYS.items():
        code = registrar.invite(name, url="https://127.0.0.1:8443")
        asked = EnrolRequest.make(
            key,
            secret=Invite.decode(code).secret,
            federation=FEDERATION,
            name=name,
            request=make_request(name, new_node_key()),
            signing_key=encode_signing_key(key.public_key()),
            sent_at=1_700_000_000,
        )
        registrar.approve(registrar.enrol(asked).enrolment)
    registrar.revoke("gamma", reason="left")
    registrar.invite("delta", url="https://127.0.0.1:8443")
    spent = Spent(dataset=DATASET, mechanism='{"kind":"Gaussian"}', charged=2, held=3)
    heads = {
        "mine": LogHead(owner="alpha", seq=5, hash="ab" * 32),
        "ledger": LedgerHead(seq=3, hash="cd" * 32),
    }
    found.books.exchange("alpha", HeadExchange(**heads, spent=(spent,)))


def people(found):
    made = People(found.store)
    for name, role in (("ada", "operator"), ("ben", "viewer")):
        request = make_request(name, new_node_key())
        made.issue(found.keys.authority, request, name=name, role=role)
    made.revoke("ben")


def run(found):
    plan, runs = plan_of(SECURE), Runs(found.store)
    signed = SignedPlan.sign(plan, FEDERATION_KEY)
    runs.propose(plan, signed, run=RUN, quorum=2)
    runs.propose(
        plan_of(BARE), SignedPlan.sign(plan_of(BARE), FEDERATION_KEY), run="later", quorum=2
    )
    for site, verdict in (("alpha", "approved"), ("beta", "rejected")):
        words = {"federation": FEDERATION, "site": site, "run": RUN, "plan_sha256": plan.sha256}
        words |= {"verdict": verdict, "reason": "seen", "decided_at": 1_700_000_000}
        runs.decide(Decision.make(KEYS[site], **words))
    Actions(found.store).record(Person(name="ada", role="operator"), "start", RUN, outcome="done")
    Actions(found.store).record(Person(name="ben", role="viewer"), "revoke", "beta", outcome="ST-6")
    record, strategy = found.record, strategy_for(plan, layout=LAYOUT)
    adapter = vector(0)
    for number in (1, 2):
        record.append_event("round_started", round=number, cohort=["alpha", "beta"])
        adapter = strategy.step(adapter, vector(number), server_round=number)
        record.save_secure_round(number, f"settled of round {number}".encode())
        record.save_adapter(number, LAYOUT.unpack(adapter))
        state = {"round": number, "plan_sha256": plan.sha256, "layout": LAYOUT.fingerprint}
        record.save_checkpoint({"adapter": adapter, **strategy.state()}, state)
    record.append_event("evaluated", round=1, view="released", split="validation", pooled={})
    runs.change(RUN, state="running", started_at=1_700_000_000.0)
    certificates = Certificates(found.store, found.registrar, found.audit)
    with tempfile.TemporaryDirectory() as scratch:
        ledger, path = Ledger(Path(scratch) / "ledger.sqlite"), Path(scratch) / "certificate.json"
        cost = gaussian_event(15.0)
        ledger.reserve(DATASET, RUN, plan.sha256, cost, budget=Budget(9.0, DELTA))
        ledger.charge(DATASET, UPDATE, plan.sha256, cost, "00" * 32)
        facts = {"ledger": ledger, "dataset": DATASET, "run": RUN, "plan": plan, "site": "alpha"}
        issue(path, **facts, model_sha256="cd" * 32, secure_noise=True, key=KEYS["alpha"])
        certificates.take("alpha", HandedIn(run=RUN, certificate=path.read_text()))


def messages(found):
    nodes = {n: e.node for n, e in found.registrar.enrolled.items()}
    link_run = found.link.new_run()
    Runs(found.store).change(RUN, link_run=str(link_run.run_id))
    for node in nodes.values():
        assert found.link.activate(node, heartbeat=30.0)
    content = RecordDict({"config": ConfigRecord({"round": 3, "adapter": b"\0\1"})})
    outgoing = [asking(node, content) for node in nodes.values()]
    asked = dict(zip(nodes, found.link.push(link_run, outgoing), strict=True))
    answer(found.link.messages, link_run, node=nodes["alpha"], to=asked["alpha"], blob=b"")


def asking(node, content):
    return Outgoing(node=node, kind="train", group="3.train", ttl=TEN_YEARS, content=content)


def answer(kept, link_run, *, node, to, blob):
    update = RecordDict({"update": ConfigRecord({"site": "alpha"})})
    if blob:
        update["bytes.0"] = ConfigRecord({"bytes": blob})
    place = {"node": node, "kind": "train", "group": "3.train"}
    (frame,) = frames(apart(reply(link_run, **place, to=to, content=update)))
    assert kept.take(node, read_frame(b"".join(frame)))


@makes("link_messages")
def link_messages(folder):
    kept = LinkMessages(
        folder / "link.sqlite", folder=folder / "link.pieces", vault=Vault(folder / "keys")
    )
    small = RecordDict(
        {"config": ConfigRecord({"round": 3}), "bytes.0": ConfigRecord({"bytes": b"s"})}
    )
    large = RecordDict({"bytes.0": ConfigRecord({"bytes": b"shared by two nodes" * 2000})})
    run = LinkRun(7, 8)
    asked = kept.send(run, [asking(1, large), asking(2, large), asking(3, small)])
    answer(kept, run, node=2, to=asked[1], blob=b"a large update" * 3000)
    answer(kept, run, node=3, to=asked[2], blob=b"a small one")


_ROWS = {
    "runs": {
        "run": RUN,
        "plan_name": "golden",
        "rounds": 3,
        "quorum": 2,
        "state": "running",
        "round": 1,
        "link_run": "7",
        "proposed_at": 1.7e9,
    },
    "decisions": {
        "run": RUN,
        "site": "alpha",
        "verdict": "approved",
        "reason": "ok",
        "decided_at": 1.7e9,
        "body": "{}",
    },
    "events": {
        "run": RUN,
        "time": 1.7e9,
        "event": "round_started",
        "fields": '{"round":1,"cohort":["alpha"]}',
    },
    "admins": {
        "name": "ada",
        "role": "operator",
        "certificate": "ab" * 32,
        "status": "active",
        "since": 1.7e9,
    },
    "actions": {
        "time": 1.7e9,
        "who": "ada",
        "role": "operator",
        "action": "start",
        "target": RUN,
        "outcome": "done",
    },
    "cursors": {"reader": "alerts", "event": 1},
    "certificates": {"run": RUN, "site": "alpha", "time": 1.7e9, "content": "{}"},
    "site_books": {"site": "alpha", "known": "{}", "spent": "[]", "halted": "", "time": 1.7e9},
    "secure_rounds": {"run": RUN, "round": 1, "content": b"sealed"},
}


@makes("schemas")
def schemas(folder):
    plan = plan_of(SECURE)
    signed = SignedPlan.sign(plan, FEDERATION_KEY).model_dump_json()
    rows = {**_ROWS, "runs": {**_ROWS["runs"], "plan": signed, "plan_sha256": plan.sha256}}
    for revision in SCHEMAS:
        path = folder / f"{revision}.sqlite"
        engine = create_engine(f"sqlite:///{path}")
        with engine.begin() as connection:
            migrate(connection, to=revision)
            there = inspect(connection).get_table_names()
            for name, row in rows.items():
                if name in there:
                    connection.execute(METADATA.tables[name].insert().values(row))
        engine.dispose()
        with sqlite3.connect(path) as database:
            lines = "\n".join(database.iterdump())
        path.with_suffix(".sql").write_text(lines + "\n")
        path.unlink()
