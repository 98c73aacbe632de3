"""How the golden files of a coordinator are read: its folder, databases of older schemas, messages."""

import hashlib
import json
import sqlite3
from contextlib import contextmanager
from itertools import chain
from types import SimpleNamespace

from silotune.flower.link_messages import LinkMessages
from silotune.flower.message_frames import Parts, together
from silotune.flower.messages import LinkRun
from silotune.flower.superlink import LinkState
from silotune.protocol.envelope import COORDINATOR
from silotune.protocol.http import Decision
from silotune.server.books import Books
from silotune.server.config import Home, load_keys
from silotune.server.enrolment import Registrar
from silotune.server.store.database import Store
from silotune.server.store.people import Actions, People
from silotune.server.store.runs import FederationLog, Runs, RunWriter
from silotune.strategies import strategy_for
from silotune.trust.audit import AuditLog
from silotune.trust.identity import encode_signing_key
from silotune.trust.vault import Vault
from tests.golden.material import FEDERATION_KEY, LAYOUT, RUN, vector
from tests.golden.read_site import plain
from tests.golden.registry import given, reads


@contextmanager
def opened(folder):
    """A coordinator's parts over its folder, without a port."""
    home = Home(folder)
    config = home.load()
    vault = Vault(home.keys, config.at_rest, base=home.root)
    keys = load_keys(home, vault, hosts=config.listen.hosts)
    audit = AuditLog(home.audit_path, owner=COORDINATOR)
    store = Store(home.store_url(config), vault=vault)
    link = LinkState(home.link_database, vault=vault)
    parts = {"store": store, "keys": keys, "audit": audit}
    registrar = Registrar(
        federation=config.federation.name, link=link, changed=lambda: None, **parts
    )
    books = Books(registrar=registrar, alarm=lambda *a, **k: None, changed=lambda: None, **parts)
    record = RunWriter(store, RUN, on_event=lambda: None, on_checkpoint=lambda number: None)
    found = SimpleNamespace(registrar=registrar, books=books, link=link, record=record, **parts)
    try:
        yield found
    finally:
        store.close()


@reads("coordinator")
def coordinator(folder):
    with opened(folder) as found:
        return {
            "authority": found.keys.fingerprint,
            "signing_key": encode_signing_key(found.keys.signing.public_key()),
            "audit": [line.kind for line in found.audit.lines()],
            "audit_head": found.audit.verify().hash,
            "roster": found.registrar.roster.sha256,
            "rosters": [
                one.verify(FEDERATION_KEY.public_key()).version
                for one in found.registrar.rosters(after=0)
            ],
            "enrolled": {
                name: [one.node, one.member.words] for name, one in found.registrar.enrolled.items()
            },
            "requests": [
                [row["site"], row["state"], row["reason"]] for row in found.registrar.requests()
            ],
            "books": {
                site: [
                    given(found.books.of(site).known),
                    [given(spent) for spent in found.books.of(site).spent],
                    found.books.of(site).halted,
                    found.books.serves(site),
                ]
                for site in ("alpha", "beta", "gamma")
            },
            "people": [
                [row["name"], row["role"], row["status"]] for row in People(found.store).all()
            ],
            "actions": [
                [row["who"], row["action"], row["target"], row["outcome"]]
                for row in Actions(found.store).newest()
            ],
            **run(found),
            **messages(found),
        }


def run(found):
    """A run in the store: plan, decisions, events, adapter, checkpoint, secure round, certificate."""
    runs = Runs(found.store)
    plan = runs.signed_plan(RUN).verify(FEDERATION_KEY.public_key())
    number, digest, arrays = runs.newest_adapter(RUN)
    checkpoint, state = found.record.load_checkpoint()
    strategy = strategy_for(plan, layout=LAYOUT)
    strategy.restore(checkpoint)
    row = runs.get(RUN)
    return {
        "runs": {one["run"]: [one["state"], one["round"], one["rounds"]] for one in runs.newest()},
        "run": [row[key] for key in ("plan_sha256", "plan_name", "quorum", "link_run", "code")],
        "approved": runs.approved(RUN),
        "decisions": {
            site: [row["reason"], Decision.model_validate_json(row["body"]).decided_at]
            for site, row in runs.decisions(RUN).items()
        },
        "events": [[event.event, event.fields] for event in runs.events(RUN)],
        "federation": [event.event for event in runs.events(None)],
        "adapter": [number, digest, LAYOUT.pack(arrays).tolist()],
        "checkpoint": [state, checkpoint["adapter"].tolist(), sorted(strategy.state())],
        "goes_on_to": strategy.step(checkpoint["adapter"], vector(3), server_round=3).tolist(),
        "secure_round": found.record.load_secure_round(2).decode(),
        "certificates": {
            site: json.loads(text)["certificate"]["epsilon"]
            for site, text in runs.certificates(RUN).items()
        },
        "evaluated": [found.record.was_evaluated(number) for number in (1, 2)],
    }


def asked_in(kept, instruction):
    """What an instruction asks, as its site is given it."""
    stored = kept._all[instruction.message_id].content
    frames = [kept.pieces(instruction.node, instruction.message_id, n) for n in range(stored.count)]
    return together(Parts(stored.head, tuple(chain.from_iterable(frames)))).content


def digest(content):
    return hashlib.sha256(json.dumps(plain(content)).encode()).hexdigest()


@reads("link_messages")
def link_messages(folder):
    """Messages under way without a node or run of Flower's."""
    kept = LinkMessages(
        folder / "link.sqlite", folder=folder / "link.pieces", vault=Vault(folder / "keys")
    )
    run = LinkRun(7, 8)
    asked = kept.instructions(run)
    answers = kept.replies(run, {one.message_id for one in asked})
    return {
        "instructions": [
            [one.message_id, one.node, one.kind, one.group, one.created_at, one.ttl]
            for one in asked
        ],
        "asked": {one.message_id: digest(asked_in(kept, one)) for one in asked},
        "answers": [[to, node, digest(answer.content)] for to, node, answer in answers],
        "waits": [kept.waits_for(node) for node in (1, 2, 3)],
    }


def messages(found):
    """Messages under way: what was sent to a node and not answered, and an answer nobody has read."""
    link, row = found.link, Runs(found.store).get(RUN)
    link_run = link.find_run(int(row["link_run"]))
    asked = link.messages.instructions(link_run)
    answers = link.messages.replies(link_run, {one.message_id for one in asked})
    return {
        "link_run": [link_run.run_id, link_run.task_id],
        "instructions": [[one.message_id, one.node, one.kind, one.group] for one in asked],
        "answers": [[to, node, plain(answer.content)] for to, node, answer in answers],
        "asked": {one.message_id: plain(asked_in(link.messages, one)) for one in asked},
    }


@reads("schemas")
def schemas(folder):
    """Databases of every schema there was, migrated to today's."""
    told = {}
    for path in sorted(folder.glob("*.sql")):
        with sqlite3.connect(path.with_suffix(".sqlite")) as connection:
            connection.executescript(path.read_text())
        connection.close()
        url = f"sqlite:///{path.with_suffix('.sqlite')}"
        store = Store(url, vault=Vault(folder / "keys"))
        runs, log = Runs(store), FederationLog(store, on_event=lambda: None)
        told[path.stem] = {
            "runs": [[row["run"], row["state"], row["round"]] for row in runs.newest()],
            "plan": runs.plan_of(RUN).sha256,
            "approved": runs.approved(RUN),
            "events": [event.as_dict() for event in runs.events(RUN)],
            "people": [row["name"] for row in People(store).all()],
            "actions": [row["action"] for row in Actions(store).newest()],
            "certificates": sorted(runs.certificates(RUN)),
        }
        log.append("alarm", kind="replay")
        told[path.stem]["federation"] = [row["event"] for row in log.newest("alarm")]
        store.close()
    return told
