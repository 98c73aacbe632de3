"""A coordinator for tests: speaks the fleet protocol and our routes over TLS, and says what it is told.

It shares no code with the real one but the formats, so it can also say what no honest one would.
"""

import http.server
import json
import ssl
import threading
import time
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.app.message import make_message, remove_content_from_message
from flwr.app.metadata import Metadata
from flwr.common.serde import message_to_proto
from flwr.proto import fleet_pb2, heartbeat_pb2, message_pb2
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

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
        self._objects: dict[str, bytes] = {}
        self._uploads: dict[str, bytes] = {}
        self._roots: dict[str, object] = {}
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
        if path.startswith("/v1/fleet/"):
            return getattr(self, "_fleet_" + path.rsplit("/", 1)[1].replace("-", "_"))(
                body
            ).SerializeToString()
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

    # --- fleet ---

    def _fleet_activate_node(self, body):
        self.activations.append(time.monotonic())
        return fleet_pb2.ActivateNodeResponse(node_id=NODE)

    def _fleet_deactivate_node(self, body):
        return fleet_pb2.DeactivateNodeResponse()

    def _fleet_send_node_heartbeat(self, body):
        self.heartbeats.append(time.monotonic())
        return heartbeat_pb2.SendNodeHeartbeatResponse(success=True)

    def _fleet_pull_messages(self, body):
        with self._bell:
            before = self._hung_up
            self._bell.wait_for(
                lambda: self._waiting or self._hung_up != before, timeout=_LONG_POLL
            )
            if not self._waiting:
                return fleet_pb2.PullMessagesResponse()
            proto, tree = self._waiting.pop(0)
        return fleet_pb2.PullMessagesResponse(messages_list=[proto], message_object_trees=[tree])

    def _fleet_pull_object(self, body):
        wanted = message_pb2.PullObjectRequest.FromString(body).object_id
        content = self._objects.get(wanted)
        return message_pb2.PullObjectResponse(
            object_found=content is not None, object_available=True, object_content=content or b""
        )

    def _fleet_confirm_message_received(self, body):
        return message_pb2.ConfirmMessageReceivedResponse()

    def _fleet_push_messages(self, body):
        request = fleet_pb2.PushMessagesRequest.FromString(body)
        tree = request.message_object_trees[0]
        self._roots[tree.object_id] = tree
        ids = {part.object_id for part in iterate_object_tree(tree)}
        return fleet_pb2.PushMessagesResponse(objects_to_push=sorted(ids), session_id="s")

    def _fleet_push_object(self, body):
        request = message_pb2.PushObjectRequest.FromString(body)
        self._uploads[request.object_id] = request.object_content
        if request.object_id in self._roots:
            contents = dict(self._uploads)
            found = inflate_object_from_contents(request.object_id, contents)
            with self._bell:
                self.replies.append(found)
                self._bell.notify_all()
        return message_pb2.PushObjectResponse(stored=True)

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
        """Hand a message to the site; `tamper(proto, tree, objects)` may change what it is told."""
        with no_object_id_recompute():
            message.metadata.__dict__["_message_id"] = message.object_id
            tree, nested = get_object_tree(message), get_all_nested_objects(message)
            objects = {key: value.deflate() for key, value in nested.items()}
            proto = message_to_proto(remove_content_from_message(message))
        if tamper:
            proto, tree, objects = tamper(proto, tree, objects)
        with self._bell:
            self._objects.update(objects)
            self._waiting.append((proto, tree))
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
