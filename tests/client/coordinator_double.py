"""A coordinator for tests: speaks our routes over TLS, and says what it is told.

It shares no code with the real one but the formats, so it can also say what no honest one would.
"""

import http.server
import json
import secrets
import ssl
import threading
import time
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.app.message import make_message
from flwr.app.metadata import Metadata

from silotune.flower.message_frames import Parts, apart, prefix, read_frame, runs, together
from silotune.plan.plan import Plan
from silotune.protocol import http as wire
from silotune.protocol.envelope import COORDINATOR, MessagePlace, seal
from silotune.trust.audit import AuditHead
from silotune.trust.authority import Authority
from silotune.trust.chain import Head
from silotune.trust.identity import (
    Subject,
    certificate_fingerprint,
    chain_pem,
    encode_signing_key,
    new_node_key,
    private_pem,
    public_pem,
    read_request,
    six_words,
)
from silotune.trust.invite import Invite
from silotune.trust.roster import Roster, RosterEntry, SignedRoster
from silotune.trust.signed import SignedPlan

NODE, RUN_ID = 77, 5
_LONG_POLL = 0.5


class CoordinatorDouble:
    """One server for one site. `with` it: it serves from a thread until the block is left."""

    def __init__(self, folder: Path, *, port: int = 0, federation: str = "consortium"):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.federation = folder, federation
        self.authority = Authority.create(federation)
        self.key = Ed25519PrivateKey.generate()
        self.roster = Roster(federation=federation, version=1, previous="", issued_at=0)
        self.signed_rosters = [SignedRoster.sign(self.roster, self.key)]
        self.member = None
        self.proposals: dict[str, wire.Proposal] = {}
        self.decisions: list[wire.Decision] = []
        self.replies: list[Message] = []
        self.activations: list[str] = []
        self.heartbeats: list[float] = []
        self.heads: list[wire.HeadExchange] = []
        self.known, self.spent = wire.Known(), ()
        self.certificates: list[wire.HandedIn] = []
        self.left: list[wire.Leave] = []
        self.plans_version = 1
        self.hook = None  # (path, request bytes) -> (status, body, headers) or None
        self._waiting: list[tuple] = []
        self._pieces: dict[str, list[bytes]] = {}
        self._uploads: list[bytes] = []
        self._enrolled: dict[str, wire.EnrolRequest] = {}
        self._bell = threading.Condition()
        self._hung_up = 0
        self._answers: dict[str, int] = {}
        self._start(port)

    # --- serving ---

    def _start(self, port):
        key = new_node_key()
        certificate = self.authority.issue_server(key.public_key(), hosts=["127.0.0.1"])
        self.pem = self.folder / "server.pem"
        self.pem.write_bytes(private_pem(key) + chain_pem([certificate]).encode())
        double = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                double._serve(self, b"")

            def do_POST(self):
                double._serve(self, self.rfile.read(int(self.headers["content-length"])))

            def log_message(self, *args):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *_: None  # killed sites break connections
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_cert_chain(self.pem)
        context.load_verify_locations(cadata=chain_pem([self.authority.certificate]))
        context.verify_mode = ssl.CERT_OPTIONAL
        self.server.socket = context.wrap_socket(
            self.server.socket, server_side=True, do_handshake_on_connect=False
        )
        self.port = self.server.server_address[1]
        self.url = f"https://127.0.0.1:{self.port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def _serve(self, handler, body):
        path = urlsplit(handler.path).path
        forced = self.hook(path, body) if self.hook else None
        status, content, headers = forced or (200, self._answer(path, handler.path, body), {})
        if callable(content):
            content(handler)
            return
        (handler.send_response_only if "date" in headers else handler.send_response)(status)
        for name, value in {"content-length": len(content), **headers}.items():
            handler.send_header(name, str(value))
        handler.end_headers()
        handler.wfile.write(content)

    def _answer(self, path, target, body):
        if path in wire.LINK_PATHS:
            return getattr(self, "_link_" + path.rsplit("/", 1)[1])(body)
        name = path.removeprefix(wire.PREFIX + "/")
        return getattr(self, f"_route_{name}")(parse_qs(urlsplit(target).query), body).encode()

    # --- our routes ---

    def _route_authority(self, query, body):
        pem = chain_pem([self.authority.certificate])
        return wire.AuthorityReply(federation=self.federation, certificate=pem).model_dump_json()

    def _route_enrol(self, query, body):
        request = wire.EnrolRequest.model_validate_json(body)
        node_key = public_pem(read_request(request.request, name=request.name))
        self._enrolled["0" * 32] = request
        words = six_words(name=request.name, signing_key=request.signing_key, node_key=node_key)
        return wire.EnrolReply(enrolment="0" * 32, words=words).model_dump_json()

    def _route_enrolment(self, query, body):
        request = self._enrolled[wire.EnrolmentQuery.model_validate_json(body).enrolment]
        certificate = self.authority.issue_client(
            request.request, subject=Subject(name=request.name, role="site")
        )
        if self.member is None:
            self.member = RosterEntry(
                name=request.name,
                signing_key=request.signing_key,
                node_key=public_pem(read_request(request.request, name=request.name)),
                certificate=certificate_fingerprint(certificate),
            )
            self.change_roster([self.member])
        return wire.EnrolmentReply(
            state="approved",
            certificate=chain_pem([certificate]),
            federation_key=encode_signing_key(self.key.public_key()),
            rosters=tuple(self.signed_rosters),
        ).model_dump_json()

    def _route_news(self, query, body):
        known = int(query["roster"][0]), int(query["plans"][0])
        with self._bell:
            self._bell.wait_for(
                lambda: known != (self.roster.version, self.plans_version), timeout=_LONG_POLL
            )
        return wire.NewsReply(
            roster=self.roster.version, plans=self.plans_version
        ).model_dump_json()

    def _route_roster(self, query, body):
        after = int(query["after"][0])
        return wire.RosterReply(rosters=tuple(self.signed_rosters[after:])).model_dump_json()

    def _route_plans(self, query, body):
        found = tuple(self.proposals.values())
        return wire.PlansReply(plans=self.plans_version, proposals=found).model_dump_json()

    def _route_decision(self, query, body):
        self.decisions.append(wire.Decision.model_validate_json(body))
        return wire.Done(status="done").model_dump_json()

    def _route_renew(self, query, body):
        request = wire.RenewRequest.model_validate_json(body)
        certificate = self.authority.issue_client(
            request.request, subject=Subject(name=request.name, role="site")
        )
        return wire.RenewReply(certificate=chain_pem([certificate])).model_dump_json()

    def _route_certificate(self, query, body):
        self.certificates.append(wire.HandedIn.model_validate_json(body))
        return wire.Done(status="done").model_dump_json()

    def _route_leave(self, query, body):
        self.left.append(wire.Leave.model_validate_json(body))
        return wire.Done(status="done").model_dump_json()

    def _route_heads(self, query, body):
        facts = {"federation": self.federation, "site": self.member.name}
        return wire.SignedHeads.make(
            self.key, **facts, known=self.known, spent=self.spent
        ).model_dump_json()

    def _route_audit(self, query, body):
        import base64

        theirs = wire.HeadExchange.model_validate_json(body)
        self.heads.append(theirs)
        self.known, self.spent = wire.Known(log=theirs.mine, ledger=theirs.ledger), theirs.spent
        signature = AuditHead(**theirs.mine.model_dump()).sign(self.key)
        ledger = None
        if theirs.ledger:
            signed = Head(theirs.ledger.seq, theirs.ledger.hash).sign(self.key)
            ledger = wire.LedgerSignature(
                **theirs.ledger.model_dump(), signature=base64.b64encode(signed).decode()
            )
        return wire.HeadExchange(
            mine=wire.LogHead(owner="coordinator", seq=len(self.heads), hash="ab" * 32),
            yours=wire.CounterSignature(
                **theirs.mine.model_dump(), signature=base64.b64encode(signature).decode()
            ),
            ledger_signed=ledger,
        ).model_dump_json()

    # --- messages ---

    def _link_activate(self, body):
        self.activations.append(time.monotonic())
        return wire.Activated(node=NODE).model_dump_json().encode()

    def _link_goodbye(self, body):
        return wire.Done(status="done").model_dump_json().encode()

    def _link_heartbeat(self, body):
        self.heartbeats.append(time.monotonic())
        return wire.Done(status="done").model_dump_json().encode()

    def _link_pull(self, body):
        with self._bell:
            before = self._hung_up
            self._bell.wait_for(
                lambda: self._waiting or self._hung_up != before, timeout=_LONG_POLL
            )
            return self._waiting.pop(0) if self._waiting else b""

    def _link_piece(self, body):
        asked = wire.PieceQuery.model_validate_json(body)
        pieces = self._pieces.get(asked.message, [])
        return pieces[asked.number] if asked.number < len(pieces) else b""

    def _link_push(self, body):
        frame = read_frame(body)
        self._uploads = [*self._uploads[: frame.number], bytes(frame.piece)]
        if frame.number + 1 >= frame.of:
            found = together(Parts(frame.head, tuple(self._uploads[: frame.of])))
            with self._bell:
                self.replies.append(found)
                self._bell.notify_all()
        return wire.Pushed(taken=True).model_dump_json().encode()

    # --- what the test tells it ---

    def invitation(self):
        fingerprint = certificate_fingerprint(self.authority.certificate)
        return Invite.new(url=self.url, authority_fingerprint=fingerprint, lifetime=60).encode()

    def change_roster(self, members, *, key=None):
        self.roster = self.roster.successor(members=members, issued_at=0)
        self.signed_rosters.append(SignedRoster.sign(self.roster, key or self.key))
        self.ring()

    def propose(self, run, plan: Plan, *, state="proposed", key=None):
        self.proposals[run] = wire.Proposal(
            run=run,
            plan=SignedPlan.sign(plan, key or self.key),
            plan_sha256=plan.sha256,
            state=state,
            proposed_at=int(time.time()),
        )
        self.ring()

    def ring(self):
        with self._bell:
            self.plans_version += 1
            self._bell.notify_all()

    def hang_up(self):
        """Answer who waits for a message that there is none."""
        with self._bell:
            self._hung_up += 1
            self._bell.notify_all()

    def content(self, run, plan, *, server_round=0, **records):
        config = {"plan": plan.canonical(), "run": run}
        if server_round:
            config["round"] = server_round
        return RecordDict({"config": ConfigRecord(config), **records})

    def address(self, run, kind, server_round=0, **changes):
        fields = {
            "federation": self.federation,
            "run": run,
            "round": server_round,
            "kind": kind,
            "sender": COORDINATOR,
            "receiver": self.member.name,
        }
        return MessagePlace(**{**fields, **changes})

    def sealed(self, content, *, address, key=None):
        return seal(content, address=address, key=key or self.key)

    def message(self, content, kind, *, group="g"):
        metadata = Metadata(RUN_ID, "", 1, NODE, "", group, time.time(), 3600.0, kind)
        return make_message(metadata, content)

    def send(self, message, *, tamper=None, answers=1):
        """Hand a message to the site; `tamper(head, pieces)` may give another first frame for it."""
        message_id = secrets.token_hex(32)
        message.metadata.__dict__["_message_id"] = message_id
        head, parts = apart(message)
        pieces = [b"".join(run) for run in runs(parts)]
        frame = prefix(head, number=0, of=len(pieces)) + (pieces[0] if pieces else b"")
        with self._bell:
            self._pieces[message_id] = pieces
            self._waiting.append(tamper(head, pieces) if tamper else frame)
            self._bell.notify_all()

    def wait_for_replies(self, count, *, seconds=60.0):
        with self._bell:
            done = self._bell.wait_for(lambda: len(self.replies) >= count, timeout=seconds)
        assert done, f"{len(self.replies)} of {count} replies"
        return self.replies[:count]

    def exchange(self, content, kind, *, seconds=60.0, **options):
        """Send and wait for one answer."""
        before = len(self.replies)
        self.send(self.message(content, kind), **options)
        return self.wait_for_replies(before + 1, seconds=seconds)[-1]


def json_lines(path: Path):
    return [json.loads(line) for line in path.read_text().splitlines()]
