"""Wrote the golden files of a site, and of what sites and coordinator sign and send."""

import hashlib
import json
import tomllib
from dataclasses import replace

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.common.serde import recorddict_to_proto

from silotune.client.approvals import Approvals
from silotune.client.daemon.enrolment import Enrolment, Federation, SiteKeys
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
from silotune.events.schema import written
from silotune.plan.plan import Plan
from silotune.plan.voted import vote_tables
from silotune.plan.written import plan_toml
from silotune.privacy.events import gaussian_event, step_event
from silotune.privacy.ledger import Budget, Ledger, ReleaseKey
from silotune.privacy.secagg.coordinator import CoordinatorRound
from silotune.privacy.secagg.site import SiteRound
from silotune.protocol.envelope import seal
from silotune.protocol.http import Proposal
from silotune.release import RELEASE_FILE, Statement, hashes_of, sign
from silotune.release import ReleaseControl as Criterion
from silotune.rounds.secure_rounds import Settled
from silotune.trust.audit import AUDIT_FILE, AuditHead, AuditLog
from silotune.trust.authority import Authority
from silotune.trust.chain import Head
from silotune.trust.identity import (
    Subject,
    certificate_fingerprint,
    chain_pem,
    encode_signing_key,
    make_request,
    new_node_key,
    public_pem,
)
from silotune.trust.invite import Invite
from silotune.trust.roster import Roster, RosterEntry, SignedRoster
from silotune.trust.signed import SignedPlan
from silotune.trust.vault import AtRest, Vault
from tests.golden.material import (
    ADDRESS,
    BARE,
    DATASET,
    DELTA,
    FEDERATION,
    FEDERATION_KEY,
    LAYOUT,
    MEMBERS,
    PASSPHRASE,
    RUN,
    SECURE,
    SITE,
    SITE_KEY,
    UPDATE,
    banded_plan,
    personal_plan,
    plan_of,
    scaffold_plan,
    vector,
)
from tests.golden.read_site import secure_members
from tests.golden.registry import makes
from tests.statistics_sites import PLAN
from tests.vote_sites import TRAINED as VOTED

NOTE = b"What a sealed file says.\n"


# --- the site's books ---


@makes("ledger")
def ledger(folder):
    book = Ledger(folder / "ledger.sqlite")
    plan, other, budget = plan_of(SECURE).sha256, plan_of(BARE).sha256, Budget(9.0, DELTA)
    step, table = step_event(rate=0.05, sigma=1.5, steps=1), gaussian_event(20.0)
    book.reserve(DATASET, RUN, plan, step_event(rate=0.05, sigma=1.5, steps=3), budget=budget)
    book.charge(DATASET, UPDATE, plan, step)
    book.bind(DATASET, UPDATE, "ab" * 32)
    book.charge(DATASET, ReleaseKey(RUN, 2, "update"), plan, step, "cd" * 32)
    book.settle(DATASET, RUN)
    book.reserve(DATASET, "golden-0002", other, gaussian_event(15.0), budget=budget)
    book.charge(DATASET, ReleaseKey("golden-0002", 1, "metrics"), other, table, "ef" * 32)
    book.vouch(DATASET, "golden-0002", Head(4, "12" * 32))
    (missing,) = book.standing(upto=2)[DATASET]
    book.restore(DATASET, "restored-0001", {missing: 2}, budget=budget)
    book.witness(book.head, book.head.sign(FEDERATION_KEY), FEDERATION_KEY.public_key())
    book.close()


@makes("audit_log")
def audit_log(folder):
    log = AuditLog(folder / AUDIT_FILE, owner=SITE)
    log.append("plan_approved", run=RUN, plan_sha256="ab" * 32, by="Ada", reason="süß & <gut>")
    first = log.append("round", round=1, size=0.1, sites=["alpha", "beta"], more={"a": None})
    log.witness(first, first.sign(FEDERATION_KEY), FEDERATION_KEY.public_key())
    theirs = AuditHead("coordinator", 7, "ef" * 32)
    log.counter_signed(theirs, theirs.sign(SITE_KEY), SITE_KEY.public_key())


@makes("vault_key_file")
def vault_key_file(folder):
    Vault(folder).write(folder / "note.sealed", NOTE)


@makes("vault_resealed")
def vault_resealed(folder):
    vault = Vault(folder, AtRest(key_file="vault.key"))
    vault.write(folder / "note.sealed", NOTE)
    (folder / "passphrase").write_text(PASSPHRASE + "\n")
    (folder / "passphrase").chmod(0o600)
    vault.reseal(AtRest(passphrase_file="passphrase"), base=folder)


@makes("outbox")
def outbox(folder):
    arrays = {"update": vector(1, 6), "sums": np.array([3, 4], np.uint32).reshape(1, 2)}
    reply = Reply(arrays, {"seconds": 0.5, "n": 3, "on": True, "word": "ä", "keys": b"\0\xff"})
    for name, vault in (("plain", None), ("sealed", Vault(folder))):
        payload = reply.to_bytes()
        RunFiles(folder, replace(OUTBOX, folder=name), run=RUN, vault=vault).write(
            1, payload, name=f"update-{hashlib.sha256(payload).hexdigest()}"
        )


@makes("memory")
def memory(folder):
    def kept(name):
        files = RunFiles(folder, replace(MEMORY, folder=name), run=RUN, vault=Vault(folder))
        return SealedMemory(files, released=released)

    def released(number):
        return f"{number:x}" * 64

    variates, parts = kept("scaffold"), kept("personal")
    control = ControlVariate(scaffold_plan(), layout=LAYOUT, memory=variates)
    keeping = PersonalParts(personal_plan(), layout=LAYOUT, memory=parts, batch=8.0)
    for number in (1, 2):
        control.learn(vector(number), vector(number) * np.float32(0.25), number)
        variates.promote(number, released(number))
        own = keeping.personal(vector(number), before=number)
        keeping.leave(own, vector(3 * number), number)
        parts.promote(number, released(number))


@makes("correlated")
def correlated(folder):
    """Rounds 2, 3 and 5 of blocks of three: their charges, and noise that later ones take back."""
    plan, budget = banded_plan().sha256, Budget(9.0, DELTA)
    book = Ledger(folder / "ledger.sqlite")
    step = step_event(rate=0.15, sigma=1.5, steps=1)
    book.reserve(DATASET, RUN, plan, step_event(rate=0.15, sigma=1.5, steps=2), budget=budget)
    files = RunFiles(folder, MEMORY, run=RUN, vault=Vault(folder))
    kept = SealedMemory(files, released=lambda number: f"{number:x}" * 64, kept=3)
    for number, block in ((2, 1), (3, 1), (5, 4)):
        key = ReleaseKey(RUN, number, "update")
        book.charge(DATASET, key, plan, step, block=block)
        kept.keep(number, {"noise": (vector(number, 6) * 2.0**41).astype(np.int64)})
        kept.promote(number, f"{number:x}" * 64)
        book.bind(DATASET, key, f"{number:x}" * 64)
    book.close()


# --- who is who ---

_CONFIG = """name = "alpha"
state_dir = "state"
share_certificates = true
allow_attacks = false

[datasets.notes]
format = "csv"
path = "notes.csv"
delimiter = ";"
unit = "patient"
declared_units = 60
max_records_per_unit = 4
labels = ["a", "b"]
max_held_out = 0.4
[datasets.notes.columns]
text = "note"
label = "class"
unit = "patient"
group = "ward"
[datasets.notes.budget]
epsilon = 9.0
delta = 1e-3
colluding_epsilon = 20.0

[datasets.answers]
format = "sql"
url = "postgresql+psycopg://${GOLDEN_USER}@db.example.org/answers"
query = "SELECT question, answer FROM answers"
declared_units = 1000
[datasets.answers.columns]
prompt = "question"
response = "answer"

[policy]
approval = "manual"
max_epsilon = 8.0
max_total_epsilon = 9.0
max_delta = 1e-3
allow_large_delta = false
require_privacy = true
allow_seeded_noise = true
require_secure_aggregation = false
min_cohort = 3
tasks = ["text_classification", "causal_lm"]
target_modules = ["auto"]
strategies = ["fedavg", "fedsa"]
max_rounds = 10
max_upload_mb = 1.5
hours = ["Mon-Fri 20:00-06:00", "Sat-Sun 00:00-24:00"]
[policy.base_models]
"abababababababababababababababababababababababababababababababab" = "models/small"

[resources]
threads = 2
device = "cpu"
memory_mb = 4096
max_rank = 8

[at_rest]
key_file = "site.key"
"""


@makes("site")
def site(folder):
    (folder / "site.toml").write_text(_CONFIG)
    config = SiteConfig.load(folder / "site.toml")
    state = config.state_folder
    vault = Vault(state, config.at_rest, base=config.folder)
    vault.write(state / "signing.key.sealed", SITE_KEY.private_bytes_raw())
    keys, authority = SiteKeys(state, vault), Authority.create(FEDERATION)
    request, subject = make_request(SITE, keys.node), Subject(name=SITE, role="site")
    certificate = authority.issue_client(request, subject=subject)
    member = RosterEntry(
        name=SITE,
        signing_key=encode_signing_key(keys.signing.public_key()),
        node_key=public_pem(keys.node.public_key()),
        certificate=certificate_fingerprint(certificate),
    )
    first = Roster(federation=FEDERATION, version=1, previous="", issued_at=1_700_000_000)
    second = first.successor(members=[member], issued_at=1_700_000_100)
    Enrolment.save(
        state,
        Federation(
            federation=FEDERATION,
            site=SITE,
            url="https://coordinator.example.org:8443",
            key=encode_signing_key(FEDERATION_KEY.public_key()),
        ),
        keys,
        authority=chain_pem([authority.certificate]),
        certificate=chain_pem([certificate]),
        rosters=[
            SignedRoster.sign(first, FEDERATION_KEY),
            SignedRoster.sign(second, FEDERATION_KEY),
        ],
    )
    own_secret(state, vault, new=bytes(range(32)))
    approvals = Approvals(state, own=SITE_KEY.public_key())
    for number, plan in ((1, plan_of(BARE)), (2, plan_of(SECURE))):
        run = f"golden-000{number}"
        proposal = Proposal(
            run=run,
            plan=SignedPlan.sign(plan, FEDERATION_KEY),
            plan_sha256=plan.sha256,
            state="finished" if number == 1 else "running",
            proposed_at=1_700_000_000 + number,
        )
        approvals.take(proposal, FEDERATION_KEY.public_key())
        words = {"reason": f"number {number}", "federation": FEDERATION, "site": SITE}
        approvals.decide(run, "approved", key=SITE_KEY, **words)
    approvals.settle("golden-0001")


@makes("rosters.jsonl")
def rosters(path):
    def member(name, number):
        signing = Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32)
        return RosterEntry(
            name=name,
            signing_key=encode_signing_key(signing.public_key()),
            node_key=public_pem(new_node_key().public_key()),
            certificate=f"{number:02x}" * 32,
        )

    alpha, beta = member("alpha", 1), member("beta", 2)
    first = Roster(federation=FEDERATION, version=1, previous="", issued_at=1_700_000_000)
    second = first.successor(members=[beta, alpha], issued_at=1_700_000_100)
    gone = beta.model_copy(update={"status": "revoked"})
    third = second.successor(members=[alpha, gone], issued_at=1_700_000_200)
    signed = [SignedRoster.sign(version, FEDERATION_KEY) for version in (first, second, third)]
    path.write_text("".join(one.model_dump_json() + "\n" for one in signed))


@makes("invitation.txt")
def invitation(path):
    made = Invite(
        url="https://coordinator.example.org:8443",
        authority="ab" * 20,
        expires=1_700_000_000,
        secret="0123456789abcdef" * 2,
    )
    path.write_text(made.encode() + "\n")


@makes("accounts.json")
def accounts(path):
    found = Accounts(path)
    found.add("ada", "operator", PASSPHRASE)
    found.add("ben", "viewer", PASSPHRASE * 2)


@makes("coordinator.toml")
def coordinator_config(path):
    path.write_text("""[federation]
name = "golden"
[listen]
host = "127.0.0.1"
port = 9443
hosts = ["coordinator.example.org", "10.0.0.1"]
[store]
url = "postgresql+psycopg://silotune@db.example.org/silotune"
[link]
patience = 60.0
[admin]
host = "127.0.0.1"
port = 9444
[dashboard]
host = "127.0.0.2"
port = 9445
hosts = ["pages.example.org"]
metrics_token_file = "token"
[alerts]
webhooks = ["https://hooks.example.org/silotune"]
webhook_secret_file = "hook"
smtp_host = "mail.example.org"
smtp_port = 25
smtp_starttls = false
smtp_user = "silotune"
smtp_password_file = "mail"
mail_from = "silotune@example.org"
mail_to = ["ada@example.org"]
stuck_seconds = 600.0
silent_seconds = 60.0
anomaly = 4.0
[at_rest]
passphrase_env = "GOLDEN_PASSPHRASE"
[logging]
format = "json"
level = "warning"
""")
    path.chmod(0o600)


# --- plans, messages and events ---

_PLANS = {
    "bare": """[plan]
name = "bare"
purpose = "As little as a plan can say."
[model]
base = "x"
task = "text_classification"
labels = ["a", "b"]
[data]
dataset = "notes"
[rounds]
number = 3
[privacy]
mode = "none"
rate = 0.1
""",
    "answers": """[plan]
name = "answers"
purpose = "Füße & <Grüße>"
seed = 3
[model]
base = "x"
task = "causal_lm"
dtype = "bfloat16"
sha256 = "abababababababababababababababababababababababababababababababab"
[lora]
r = 8
alpha = 16.0
target_modules = ["q_proj", "v_proj"]
last_layers = 2
[data]
dataset = "answers"
max_length = 128
split_by = "group"
test_share = 0.25
[rounds]
number = 20
local_steps = 4
min_sites = 5
deadline = 90.0
[aggregation]
strategy = "trimmed_mean"
trim = 0.25
weights = "equal"
[optimizer.server]
name = "none"
[privacy]
mode = "none"
batch = 16
""",
}


def _replaced(text, changes):
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    return text


@makes("plans")
def plans(folder):
    texts = dict(_PLANS)
    for name, plan in (("secure", SECURE),):
        tables = []
        for table, values in plan.items():
            rows = [f"{key} = {_toml(value)}" for key, value in values.items()]
            tables.append("\n".join([f"[{table}]", *rows]))
        texts[name] = "\n".join(tables) + "\n"
    _write_plans(folder, texts)


@makes("plans_of_sites")
def plans_of_sites(folder):
    """With this one and `plans`, every key of a plan is in a text."""
    changes = {
        "number = 3": "number = 3\nlocal_steps = 4",
        'mode = "none"': 'mode = "site"\nepsilon = 8.0\ndelta = 1e-5\nclip = 1.0',
        "rate = 0.1": "batch = 16\nsite = { quantile = 0.5 }",
    }
    text = _PLANS["bare"] + '[aggregation]\nweights = "equal"\n'
    _write_plans(folder, {"whole_site": _replaced(text, changes)})


@makes("plans_that_count")
def plans_that_count(folder):
    """Statistics: with these every key of ``[statistics]`` is in a text."""
    tokens = PLAN.replace('task = "statistics"', 'base = "public/model"\ntask = "statistics"')
    tokens = tokens.replace(
        "edges = [4, 8, 16]", 'counted = "tokens"\nof = "text"\nedges = [4, 8, 16]'
    )
    whole = tokens.replace("[statistics]\n", "[statistics]\nfloor = 50.0\nconfidence = 0.9\n")
    _write_plans(folder, {"words": PLAN, "tokens": whole})


@makes("plans_of_bands")
def plans_of_bands(folder):
    """Noise that is correlated over rounds."""
    changes = {
        "[data]": '[lora]\ntarget_modules = "none"\n[data]',
        "number = 3": "number = 30",
        'mode = "none"': (
            'mode = "record"\nepsilon = 8.0\ndelta = 1e-5\nclip = 1.0\nbands = 3\n'
            "band_weights = [1.0, 0.75, 0.5]"
        ),
        "[privacy]": '[optimizer.server]\nname = "sgd"\n[privacy]',
    }
    _write_plans(folder, {"banded": _replaced(_PLANS["bare"], changes)})


@makes("plans_of_drawn_sites")
def plans_of_drawn_sites(folder):
    """Rounds that ask some of the sites."""
    _write_plans(folder, {"drawn": _PLANS["bare"].replace("number = 3", "number = 3\nsites = 5")})


@makes("plans_of_heads")
def plans_of_heads(folder):
    """Random features under the head, and a mean of adapters at the end."""
    changes = {
        'labels = ["a", "b"]': (
            'labels = ["a", "b"]\ncentre_texts = ["eye", "ear", "hand"]\n'
            'head_features = { kind = "cosines", number = 64, scale = 1.25 }'
        ),
        "[privacy]": (
            '[optimizer.server]\nname = "sgd"\naverage = "ema"\naverage_share = 0.25\n[privacy]'
        ),
    }
    _write_plans(folder, {"cosines": _replaced(_PLANS["bare"], changes)})


@makes("plans_of_tasks")
def plans_of_tasks(folder):
    """The later tasks, an adapter to go on with and weights in few bits: every key of them."""
    labels, generates = 'labels = ["a", "b"]', 'task = "causal_lm"'
    bare = _PLANS["bare"]
    written = bare.replace(f"{labels}\n", "").replace('task = "text_classification"', generates)
    around = 'system = "S: {content}\\n", user = "U: {content}\\n", assistant = "A: {content}\\n"'
    chat = f'system = "Be brief."\nrecords = "prompts"\ntemplate = {{ {around} }}'
    several = f'{labels}\nmulti_label = true\nclass_weights = {{ b = 2.5 }}\nquantization = "nf4"'
    start = f'[lora]\nscaling = "rslora"\nstart = {{ adapter = "earlier", sha256 = "{"ab" * 32}" }}'
    numbers = "target = { lower = 0.0, upper = 90.0, edges = [30.0, 60.0] }"
    texts = {
        "chats": written.replace("[data]", f"[model.chat]\n{chat}\n[data]"),
        "several": bare.replace(labels, several).replace("[data]", f"{start}\n[data]"),
        "numbers": bare.replace(labels, numbers).replace("text_classification", "text_regression"),
        "spans": bare.replace("text_classification", "token_classification").replace(
            'dataset = "notes"', 'dataset = "notes"\nmax_windows = 3'
        ),
    }
    _write_plans(folder, texts)


@makes("plans_of_votes")
def plans_of_votes(folder):
    """A vote on the settings of a plan: every key of ``[vote]``."""
    trained = Plan.from_mapping(tomllib.loads(VOTED))
    candidates = ({}, {"optimizer.site.head_lr": 0.3, "rounds.number": 4})
    tables = vote_tables(trained, candidates, epsilon=0.5, units=900, block_units=40)
    _write_plans(folder, {"rates": plan_toml(Plan.from_mapping(tables))})


def _write_plans(folder, texts):
    for name, text in texts.items():
        (folder / f"{name}.toml").write_text(text)
        signed = SignedPlan.sign(Plan.written_in(folder / f"{name}.toml"), FEDERATION_KEY)
        (folder / f"{name}.signed.json").write_text(signed.model_dump_json() + "\n")


def _toml(value):
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(one)}" for key, one in value.items()) + " }"
    return json.dumps(value)


@makes("message.bin")
def message(path):
    content = RecordDict(
        {
            "adapter": ArrayRecord({"flat": Array(vector(1, 6))}),
            "config": ConfigRecord(
                {"plan": "p", "round": 3, "rate": 0.5, "on": True, "raw": b"\0\1", "list": [1, 2]}
            ),
            "metrics": MetricRecord({"n": 1, "loss": 0.25}),
        }
    )
    sealed = seal(content, address=ADDRESS, key=FEDERATION_KEY)
    path.write_bytes(recorddict_to_proto(sealed).SerializeToString(deterministic=True))


_EVENTS = (
    ("run_proposed", {"plan_sha256": "ab" * 32, "rounds": 3, "sites": ["alpha", "beta"]}),
    ("enrolment_requested", {"site": "gamma", "words": "a-b-c-d-e-f"}),
    ("plan_approved", {"site": "alpha", "reason": "ok"}),
    ("plan_rejected", {"site": "beta", "reason": "no"}),
    ("run_started", {"sites": ["alpha", "beta"], "rounds": 3, "computing": "cpu, float32"}),
    ("worker_ready", {"worker": 0, "sites": ["alpha"], "seconds": 1.5}),
    (
        "site_joined",
        {"site": "alpha", "declared_units": 100, "rate": 0.05, "sigma": 1.5, "dtype": "float32"},
    ),
    ("site_refused", {"site": "beta", "code": "ST-301", "detail": ""}),
    ("round_started", {"round": 1, "phase": "head", "cohort": ["alpha", "beta"]}),
    ("site_phase", {"site": "alpha", "round": 1, "phase": "masked"}),
    ("site_replied", {"site": "alpha", "round": 1, "bytes": 4096, "train_seconds": 0.5}),
    ("site_failed", {"site": "beta", "round": 1, "code": "ST-501", "detail": "", "phase": "open"}),
    ("round_saved", {"round": 1, "sha256": "cd" * 32, "bytes": 3520}),
    (
        "round_finished",
        {
            "round": 1,
            "seconds": 2.5,
            "wait_seconds": 1.5,
            "aggregate_seconds": 0.5,
            "train_seconds": 1.0,
            "bytes_up": 4096,
            "bytes_down": 8192,
            "update_norm": 0.75,
            "epsilon": {"alpha": 1.25},
            "anomaly": {"alpha": None},
            "exchanges": 4,
            "saturated": 0,
        },
    ),
    (
        "evaluated",
        {
            "round": 1,
            "view": "released",
            "split": "validation",
            "pooled": {"macro_f1": 0.5},
            "sites": {"alpha": {"macro_f1": 0.5, "loss": None}},
            "left_out": ["beta"],
        },
    ),
    ("run_paused", {"round": 1}),
    ("run_stopped", {"round": 1}),
    ("run_resumed", {"from_round": 1}),
    ("round_started", {"round": 2}),
    ("round_void", {"round": 2, "code": "ST-502", "detail": "too few"}),
    ("site_silent", {"site": "beta", "seconds": 400.0}),
    ("site_back", {"site": "beta"}),
    ("run_failed", {"code": "ST-503", "detail": "x"}),
    ("operator_action", {"who": "ada", "role": "operator", "action": "stop", "target": RUN}),
    ("alarm", {"kind": "replay", "site": "beta", "detail": "x"}),
    ("baseline_finished", {"title": "Own", "number": 1, "of": 2, "seconds": 3.5}),
    ("run_finished", {"rounds": 3, "seconds": 9.5}),
)


@makes("events.jsonl")
def events(path):
    lines = []
    for number, (kind, fields) in enumerate(_EVENTS, start=1):
        event = written(kind, {"time": 1_700_000_000.5 + number, **fields})
        lines.append(json.dumps({"id": number, **event}, separators=(",", ":")) + "\n")
    path.write_text("".join(lines))


@makes("secure_round")
def secure_round(folder):
    members = secure_members()

    def begun(number):
        sites = {name: SiteRound.begin(member, number) for name, member in members.items()}
        made = CoordinatorRound(threshold=2, largest_cohort=3)
        for name, part in sites.items():
            made.advertise(name, part.advertisement().to_bytes())
        return sites, made

    sites, current = begun(3)
    blob = current.cohort.to_bytes()
    for name, part in sites.items():
        current.add_shares(name, part.share(blob))
    nodes = {name: 100 + number for number, name in enumerate(MEMBERS)}
    settled = Settled(
        current=current, nodes=nodes, survivors=frozenset(MEMBERS), following=begun(4)[1]
    )
    (folder / "settled.bin").write_bytes(settled.to_bytes())
    states = {name: part.dump().hex() for name, part in sites.items()}
    kept = RunFiles(folder, ROUNDS, run=RUN, vault=Vault(folder))
    kept.write(3, json.dumps(states).encode())


# --- what leaves at the end ---


@makes("release")
def release(folder):
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text('{"r": 2}\n')
    (folder / "adapter" / "README.md").write_text("# Golden\n")
    statement = Statement(
        run=RUN,
        plan_sha256="ab" * 32,
        files=hashes_of(folder / "adapter"),
        certificates={SITE: "cd" * 32},
        controls=(
            Criterion(name="adapter", held_by="engineer", passed=True, figures={"files": 2.0}),
            Criterion(name="membership", held_by="consortium", passed=None),
        ),
        person="Ada Example",
        role="output checker",
        code_version="0.1.0",
        time="2026-01-01T00:00:00+00:00",
    )
    sign(statement, folder / RELEASE_FILE, key=FEDERATION_KEY)
