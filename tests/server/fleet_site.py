"""A site for tests: real TLS, real enrolment, and whatever work the test wants."""

import json
import secrets
import ssl
import tempfile
import threading
import time
from contextlib import suppress

import httpx
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Message

from silotune.flower.message_frames import Parts, apart, frames, outline_of, read_frame, together
from silotune.protocol import http as wire
from silotune.protocol.envelope import address_of, seal, seal_id, unseal
from silotune.trust import identity
from silotune.trust.invite import Invite


class FleetSite:
    """One site. `join` with a code, then `activate`, then `serve` or single calls."""

    def __init__(self, name, code):
        self.name, self.invite = name, Invite.decode(code)
        self.signing, self.node_key = Ed25519PrivateKey.generate(), identity.new_node_key()
        self.certificate = self.federation_key = None
        self.session = secrets.token_hex(16)
        self.node, self.seen, self.broken, self.silent = None, [], [], False
        self._stop, self._thread, self._closers = threading.Event(), None, []

    # --- our own routes ---

    def context(self, *, certificate=True):
        """TLS as a site has it."""
        context = ssl.create_default_context(cadata=self.authority)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        if certificate:
            with tempfile.NamedTemporaryFile() as file:
                file.write(self.certificate.encode() + identity.private_pem(self.node_key))
                file.flush()
                context.load_cert_chain(file.name)
        return context

    def http(self, *, certificate=True):
        client = httpx.Client(
            base_url=self.invite.url,
            verify=self.context(certificate=certificate),
            timeout=40,
            trust_env=False,
        )
        self._closers.append(client.close)
        return client

    def fetch_authority(self):
        with httpx.Client(verify=False, trust_env=False) as client:
            reply = wire.AuthorityReply.model_validate(
                client.get(self.invite.url + wire.AUTHORITY).json()
            )
        certificate = identity.certificate_from_pem(reply.certificate)
        assert self.invite.expects(identity.certificate_fingerprint(certificate))
        self.authority, self.federation = reply.certificate, reply.federation

    def enrol_request(self, **changes):
        fields = {
            "secret": self.invite.secret,
            "federation": self.federation,
            "name": self.name,
            "request": identity.make_request(self.name, self.node_key),
            "signing_key": identity.encode_signing_key(self.signing.public_key()),
            "sent_at": int(time.time()),
        }
        return wire.EnrolRequest.make(self.signing, **{**fields, **changes})

    def ask(self, **changes):
        """Send the enrolment request; returns the HTTP response."""
        self.fetch_authority()
        with self.http(certificate=False) as client:
            response = client.post(
                wire.ENROL, content=self.enrol_request(**changes).model_dump_json()
            )
        if response.is_success:
            self.enrolment = response.json()["enrolment"]
        return response

    def collect(self):
        """Ask how the request stands, and keep the certificate if there is one."""
        query = wire.EnrolmentQuery.make(
            self.signing, enrolment=self.enrolment, sent_at=int(time.time())
        )
        with self.http(certificate=False) as client:
            reply = client.post(wire.ENROLMENT, content=query.model_dump_json()).json()
        found = wire.EnrolmentReply.model_validate_json(json.dumps(reply))
        if found.state == "approved":
            self.certificate = found.certificate
            self.federation_key = identity.decode_signing_key(found.federation_key)
        return found

    def decide(self, run, plan_sha256, verdict="approved", **changes):
        fields = {
            "federation": self.federation,
            "site": self.name,
            "run": run,
            "plan_sha256": plan_sha256,
            "verdict": verdict,
            "decided_at": int(time.time()),
        }
        decision = wire.Decision.make(self.signing, **{**fields, **changes})
        with self.http() as client:
            return client.post(wire.DECISION, content=decision.model_dump_json())

    # --- messages ---

    def line(self, *, session=None):
        """A connection of a session."""
        client = self.http()
        client.headers[wire.SESSION_HEADER] = session or self.session
        return client

    def call(self, path, content=b""):
        """The answer to a request in this session."""
        response = self.client.post(path, content=content)
        response.raise_for_status()
        return response

    def alive(self, **changes):
        body = {"seconds": 10.0, "sent_at": time.time(), **changes}
        return wire.Activation(**body).model_dump_json().encode()

    def activate(self, *, session=None):
        self.client = self.line(session=session)
        self.node = self.call(wire.ACTIVATE, self.alive()).json()["node"]
        threading.Thread(target=self._beat, args=(self.client,), daemon=True).start()
        return self

    def _beat(self, client):
        while not self._stop.wait(5.0) and not self.silent:
            with suppress(httpx.HTTPError, RuntimeError):
                client.post(wire.HEARTBEAT, content=self.alive())

    def pull(self):
        """The next message's first frame; None if there is none."""
        content = self.call(wire.PULL).content
        return read_frame(content) if content else None

    def piece(self, message_id, number):
        query = wire.PieceQuery(message=message_id, number=number)
        return self.call(wire.PIECE, query.model_dump_json().encode()).content

    def get(self, frame):
        """The whole message."""
        message_id = outline_of(frame.head).metadata.message_id
        others = [self.piece(message_id, number) for number in range(1, frame.of)]
        pieces = [bytes(frame.piece)] * bool(frame.of) + others
        return together(Parts(frame.head, tuple(pieces)))

    def reply_to(self, message, content, **changes):
        """A sealed reply, as the protocol wants it; `changes` are of its address."""
        address = address_of(message.content).reply(to=seal_id(message.content))
        address = type(address)(**{**vars(address), **changes})
        return Message(seal(content, address=address, key=self.signing), reply_to=message)

    def send(self, reply):
        """Push a reply; whether the coordinator took it."""
        taken = [
            self.call(wire.PUSH, b"".join(frame)).json()["taken"] for frame in frames(apart(reply))
        ]
        return taken[-1]

    def step(self, work):
        """Pull one message, if any, and answer it with what `work(address, content)` returns."""
        delivery = self.pull()
        if delivery is None:
            return None
        message = self.get(delivery)
        address = address_of(message.content)
        content = unseal(message.content, address=address, key=self.federation_key)
        self.seen.append((address.run, address.round, address.kind))
        answer = work(address, content)
        if answer is not None:
            try:
                self.send(self.reply_to(message, answer))
            except Exception:  # cut off by the other end, or by this one as it hangs up
                self.broken.append(self.seen[-1])  # a site without an outbox: it is asked again
                raise
        return address

    # --- a whole daemon ---

    def serve(self, work):
        """Answer messages from a thread, through interruptions, until `close`."""

        def loop():
            while not self._stop.is_set():
                try:
                    self.step(work)
                except httpx.HTTPStatusError as exc:
                    if (
                        exc.response.status_code in {401, 403, 409}
                        and b"ST-" in exc.response.content
                    ):
                        return
                    # Another refusal can be of an interruption, as a late reply's are: asked again.
                    self._stop.wait(0.2)
                except httpx.HTTPError:
                    self._stop.wait(0.2)
                except RuntimeError:
                    # The client was closed under a request: how `close` ends a long one.
                    if not self._stop.is_set():
                        raise

        self._thread = threading.Thread(target=loop, daemon=True, name=f"site {self.name}")
        self._thread.start()
        return self

    def close(self):
        self.hang_up()
        self.join()

    def hang_up(self):
        self._stop.set()
        for closer in self._closers:
            closer()

    def join(self):
        if self._thread is not None:
            self._thread.join(timeout=30.0)


def approve_all(coordinator, run, sites):
    """Have the sites approve a run."""
    digest = coordinator.run_control.runs.get(run)["plan_sha256"]
    for site in sites:
        assert site.decide(run, digest).status_code == 200


def wait_for(condition, *, seconds=90.0, what="it"):
    """Until `condition()` is true; its value."""
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        value = condition()
        if value:
            return value
        time.sleep(0.02)
    raise AssertionError(f"{what} did not happen within {seconds} s")
