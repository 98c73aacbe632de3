"""How the golden files of a site, and of what sites and coordinator sign and send, are read."""

import hashlib
import json
from dataclasses import replace

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import RecordDict
from flwr.common.serde import recorddict_from_proto
from flwr.proto.recorddict_pb2 import RecordDict as RecordDictProto

from silotune.client.approvals import Approvals, difference
from silotune.client.daemon.enrolment import Enrolment
from silotune.client.gate import Reply
from silotune.client.run_files import (
    MEMORY,
    OUTBOX,
    ROUNDS,
    ControlVariate,
    PersonalParts,
    RunFiles,
    SealedMemory,
)
from silotune.dashboard.accounts import Accounts
from silotune.data.declared import own_secret
from silotune.data.site import SiteConfig
from silotune.events.schema import parse
from silotune.events.view import RunView
from silotune.plan.plan import Plan
from silotune.privacy.certificate import verify
from silotune.privacy.events import step_event
from silotune.privacy.ledger import Ledger, ReleaseKey
from silotune.privacy.ledger_view import dataset_rows, run_rows
from silotune.privacy.secagg.messages import Member
from silotune.privacy.secagg.site import SiteRound
from silotune.protocol.envelope import address_of, seal, seal_id, take_pieces, unseal
from silotune.release import RELEASE_FILE, hashes_of, read
from silotune.rounds.secure_rounds import Settled
from silotune.server.config import Home
from silotune.trust.audit import AUDIT_FILE, AuditLog
from silotune.trust.identity import certificate_from_pem, fingerprint, six_words, subject_of
from silotune.trust.invite import Invite
from silotune.trust.roster import SignedRoster, follow
from silotune.trust.signed import SignedPlan
from silotune.trust.vault import AtRest, Vault
from tests.golden.material import (
    ADDRESS,
    DATASET,
    DELTA,
    FEDERATION_KEY,
    LAYOUT,
    MEMBERS,
    PASSPHRASE,
    RUN,
    SITE,
    UPDATE,
    banded_plan,
    personal_plan,
    scaffold_plan,
    vector,
)
from tests.golden.registry import given, reads

# --- the site's books ---


@reads("ledger")
def ledger(folder):
    book = Ledger(folder / "ledger.sqlite", create=False)
    head = book.verify(trusted=FEDERATION_KEY.public_key())
    rows = [row.as_dict() for row in book.rows()]
    told = {
        "head": [head.seq, head.hash],
        "witnessed": book.witnessed().seq,
        "kinds": [row["kind"] for row in rows],
        "times": [rows[0]["time"], rows[-1]["time"]],
        "spent": book.spent(DATASET, DELTA),
        "spent_by_run": book.spent(DATASET, DELTA, run=RUN),
        "committed": book.committed(DATASET, DELTA),
        "datasets": dataset_rows(book),
        "runs": run_rows(book),
        "standing": book.standing(),
        "payload": book.payload_of(UPDATE),
        "vouched": list(vars(book.vouched).values()),
        "events": len(book.events(DATASET)),
    }
    again, _ = book.events(DATASET, run=RUN)
    plan_sha256 = run_rows(book)[0]["plan_sha256"]
    told["charged_again"] = book.charge(DATASET, UPDATE, plan_sha256, again)
    book.settle(DATASET, "golden-0002")
    told["goes_on_to"] = book.verify().seq
    book.close()
    return told


@reads("audit_log")
def audit_log(folder):
    log = AuditLog(folder / AUDIT_FILE)
    head = log.verify(trusted=FEDERATION_KEY.public_key())
    told = {
        "owner": log.owner,
        "head": [head.seq, head.hash],
        "lines": [[line.kind, dict(line.fields)] for line in log.lines()],
        "first": log.lines()[0].time,
    }
    told["goes_on_to"] = log.append("round", round=2).seq
    log.verify()
    return told


@reads("vault_key_file")
def vault_key_file(folder):
    vault = Vault(folder)
    return [vault.opened_by, vault.read(folder / "note.sealed").decode()]


@reads("vault_resealed")
def vault_resealed(folder):
    old = Vault(folder, AtRest(key_file="vault.key"))
    new = Vault(folder, AtRest(passphrase_file="passphrase"))
    told = [old.opened_by, new.opened_by, new.read(folder / "note.sealed").decode()]
    return [*told, old.read(folder / "note.sealed").decode(), new.end_previous()]


@reads("outbox")
def outbox(folder):
    told = {}
    for name, vault in (("plain", None), ("sealed", Vault(folder))):
        box = RunFiles(folder, replace(OUTBOX, folder=name), run=RUN, vault=vault)
        (stored,) = box.names(1)
        payload, digest = box.read(1, name=stored), stored.removeprefix("update-")
        assert hashlib.sha256(payload).hexdigest() == digest
        reply = Reply.from_bytes(payload)
        assert reply.to_bytes() == payload
        told[name] = {
            "sha256": digest,
            "arrays": {
                name: [str(array.dtype), array.tolist()] for name, array in reply.arrays.items()
            },
            "scalars": {name: repr(value) for name, value in reply.scalars.items()},
            "records": sorted(reply.records()),
        }
    return told


@reads("correlated")
def correlated(folder):
    """Charges of blocks of rounds, releases that rest on them, and the noise kept with these."""
    book = Ledger(folder / "ledger.sqlite", create=False)
    files = RunFiles(folder, MEMORY, run=RUN, vault=Vault(folder))
    kept = SealedMemory(files, released=lambda n: book.payload_of(ReleaseKey(RUN, n, "update")))
    (account,) = book.runs()
    told = {
        "plan": account.plan_sha256 == banded_plan().sha256,
        "spent": book.spent(DATASET, DELTA),
        "committed": book.committed(DATASET, DELTA),
        "charges": [
            [row.entry.round, row.entry.release, row.entry.event]
            for row in book.rows()
            if row.entry.kind == "charge"
        ],
        "releases": account.charges,
        "noise": {str(n): a["noise"].tolist() for n, a in kept.all(range(1, 7)).items()},
    }
    step = step_event(rate=0.15, sigma=1.5, steps=1)
    key = ReleaseKey(RUN, 6, "update")
    told["goes_on"] = book.charge(DATASET, key, account.plan_sha256, step, block=4)
    told["spent_then"] = book.spent(DATASET, DELTA)
    book.verify()
    book.close()
    return told


@reads("memory")
def memory(folder):
    """What a strategy keeps at a site: control variates, and personal parts with their optimizer."""

    def released(number):
        return f"{number:x}" * 64

    def kept(name):
        files = RunFiles(folder, replace(MEMORY, folder=name), run=RUN, vault=Vault(folder))
        return SealedMemory(files, released=released)

    plan, variates = scaffold_plan(), kept("scaffold")
    control = ControlVariate(plan, layout=LAYOUT, memory=variates)
    parts = kept("personal")
    keeping = PersonalParts(personal_plan(), layout=LAYOUT, memory=parts, batch=8.0)
    return {
        "scaffold": {
            str(number): control.drift(vector(number), number).tolist() for number in (2, 3)
        },
        "personal": {
            str(number): keeping.personal(vector(9), before=number).tolist() for number in (2, 3)
        },
        "kept": {
            name: {key: array.tolist() for key, array in sorted(store.recall(before=3)[1].items())}
            for name, store in (("scaffold", variates), ("personal", parts))
        },
    }


# --- who is who ---


@reads("site")
def site(folder):
    """The folder of a site that has joined: configuration, enrolment, plans and approvals."""
    config = SiteConfig.load(folder / "site.toml")
    state = config.state_folder
    vault = Vault(state, config.at_rest, base=config.folder)
    enrolment = Enrolment.open(config, vault)
    enrolment.require_listed()
    enrolment.tls()
    approvals = Approvals(state, own=enrolment.keys.signing.public_key())
    newest = approvals.entries()[0]
    approved = approvals.require_approved(newest.run, newest.plan.sha256)
    older = approvals.last_approved(but=newest.run)
    return {
        "config": given(config, exclude={"datasets"}),
        "datasets": {name: given(dataset) for name, dataset in config.datasets.items()},
        "facts": enrolment.facts.model_dump(),
        "signing_key": fingerprint(enrolment.keys.signing.public_key()),
        "authority": certificate_from_pem(enrolment.authority).subject.rfc4514_string(),
        "certificate": subject_of(certificate_from_pem(enrolment.certificate)).role,
        "roster": [enrolment.roster.version, enrolment.roster.sha256],
        "words": enrolment.roster.active[SITE].words,
        "signers": sorted(enrolment.signers),
        "split_secret": own_secret(state, vault).hex(),
        "runs": {
            entry.run: [entry.state, entry.settled, entry.plan.sha256]
            for entry in approvals.entries()
        },
        "reason": approved.decision.reason,
        "changed": [list(change) for change in difference(older.plan, newest.plan)],
    }


@reads("rosters.jsonl")
def rosters(path):
    versions = [SignedRoster.model_validate_json(line) for line in path.read_text().splitlines()]
    trusted = FEDERATION_KEY.public_key()
    newest = follow(None, versions, trusted=trusted)
    assert SignedRoster.sign(newest, FEDERATION_KEY) == versions[-1]
    return {
        "versions": [roster.verify(trusted).sha256 for roster in versions],
        "members": {member.name: [member.status, member.words] for member in newest.members},
    }


@reads("invitation.txt")
def invitation(path):
    invite = Invite.decode(path.read_text())
    assert invite.encode() == path.read_text().strip()
    told = {name: getattr(invite, name) for name in ("url", "authority", "expires", "secret")}
    words = six_words(name=SITE, signing_key="signing", node_key="node")
    return {**told, "digest": invite.secret_digest, "words": words}


@reads("accounts.json")
def accounts(path):
    """People who sign in to the pages with a password."""
    found = Accounts(path)
    return {
        "people": {person.name: person.role for person in found.people()},
        "right": found.check("ada", PASSPHRASE) is not None,
        "wrong": found.check("ada", PASSPHRASE + "!") is not None,
    }


@reads("coordinator.toml")
def coordinator_config(path):
    return given(Home(path.parent).load())


# --- plans, messages and events ---


@reads("plans_of_tasks")
@reads("plans_of_votes")
@reads("plans_that_count")
@reads("plans_of_bands")
@reads("plans_of_drawn_sites")
@reads("plans_of_heads")
@reads("plans_of_sites")
@reads("plans")
def plans(folder):
    """Plans as people write them, and as the federation's key signed them.

    What was left out of a file was a constant then, and is in the signed text; today's rules for it
    are those of files that are read today (`Plan.load`).
    """
    told = {}
    for path in sorted(folder.glob("*.toml")):
        plan = Plan.written_in(path)
        signed = SignedPlan.model_validate_json(path.with_suffix(".signed.json").read_bytes())
        assert signed.verify(FEDERATION_KEY.public_key()) == plan
        assert SignedPlan.sign(plan, FEDERATION_KEY) == signed
        told[path.stem] = {"sha256": plan.sha256, "canonical": plan.canonical()}
    return told


def signed_bytes(content):
    """Of a message, however it is cut into pieces."""
    return b"".join(take_pieces(content)[1])


@reads("message.bin")
def message(path):
    content = recorddict_from_proto(RecordDictProto.FromString(path.read_bytes()))
    assert address_of(content) == ADDRESS
    opened = unseal(content, address=ADDRESS, key=FEDERATION_KEY.public_key())
    again = seal(opened, address=ADDRESS, key=FEDERATION_KEY)
    same = seal_id(again) == seal_id(content) and signed_bytes(again) == signed_bytes(content)
    return {"id": seal_id(content), "sealed_again": same, "content": plain(opened)}


def plain(content: RecordDict):
    """Records as JSON data."""
    arrays = {
        name: {key: [array.dtype, array.numpy().tolist()] for key, array in record.items()}
        for name, record in content.array_records.items()
    }
    others = {**content.config_records, **content.metric_records}
    return {
        **arrays,
        **{name: {k: repr(v) for k, v in record.items()} for name, record in others.items()},
    }


@reads("events.jsonl")
def events(path):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [parse(row).as_dict() for row in rows] == rows
    view = RunView(RUN)
    view.extend(rows)
    return {
        "kinds": {
            row["event"]: sorted(set(row) & set(type(parse(row)).model_fields)) for row in rows
        },
        "state": view.state,
        "done": view.done,
        "joined": view.joined,
        "rounds": {str(found.number): [found.replied, found.failed] for found in view.every_round},
        "curve": view.curve("macro_f1", view="released", split="validation"),
        "epsilon": view.epsilon,
        "troubles": len(view.troubles),
        "last_id": view.last_id,
    }


@reads("secure_round")
def secure_round(folder):
    """A secure round that both sides go on with from their disks, behind the sites' shares."""
    journal = (folder / "settled.bin").read_bytes()
    settled = Settled.from_bytes(journal, threshold=2, largest_cohort=3)
    assert settled.to_bytes() == journal
    coordinator, members = settled.current, secure_members()
    kept = RunFiles(folder, ROUNDS, run=RUN, vault=Vault(folder))
    states = json.loads(kept.read(3))
    sites = {
        name: SiteRound.restore(members[name], bytes.fromhex(states[name])) for name in MEMBERS
    }
    told = {
        "nodes": dict(settled.nodes),
        "survivors": sorted(settled.survivors),
        "void": settled.void,
        "following": sorted(settled.following.advertised),
        "cohort": list(coordinator.cohort.names),
        "stages": {name: int(part.stage) for name, part in sites.items()},
        "other_round": kept.read(2),
    }
    for number, (name, part) in enumerate(sites.items(), start=1):
        masked = vector(number, 4).astype("uint32")
        like = masked.copy()
        part.mask(masked, present=list(MEMBERS), sealed=coordinator.sealed_for(name))
        coordinator.add_masked(name, masked, like=like)
    for name, part in sites.items():
        coordinator.add_opening(name, part.open(list(MEMBERS), {}))
    return {**told, "sum": coordinator.unmask().tolist()}


def secure_members():
    """Three sites with keys that never change."""
    keys = {
        name: Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32)
        for number, name in enumerate(MEMBERS, start=1)
    }
    roster = {name: key.public_key().public_bytes_raw() for name, key in keys.items()}
    return {
        name: Member(
            site=name,
            identity=key,
            roster=roster,
            plan_sha256="ab" * 32,
            run=RUN,
            declared_units=100,
            threshold=2,
        )
        for name, key in keys.items()
    }


# --- what leaves at the end ---


@reads("certificate.json")
def certificate(path):
    found = verify(path, key_sha256=fingerprint(FEDERATION_KEY.public_key()))
    return {
        "body": given(found.body),
        "epsilon": found.epsilon,
        "private": found.body.private,
    }


@reads("release")
def release(folder):
    statement, key = read(folder / RELEASE_FILE)
    assert statement.files == hashes_of(folder / "adapter")
    return {"statement": given(statement), "key": key}
