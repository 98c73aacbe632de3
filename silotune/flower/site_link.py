"""A site's line to the coordinator: outward over HTTPS, a request for each message and for each answer.

Messages are Flower's; how they cross the wire is `silotune.flower.message_frames`. No Flower process, no
FAB and no listening port is involved, so nothing that comes from outside is ever run. What comes is
bounded before it is built: the size of every reply, of a message, and of what is read of it before its
signature is.
"""

from __future__ import annotations

import logging
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import httpx
from flwr.app import Message

from silotune.errors import SilotuneError
from silotune.flower.message_frames import (
    MessageFrame,
    Parts,
    apart,
    frames,
    outline_of,
    read_frame,
    together,
)
from silotune.protocol import http
from silotune.protocol.envelope import MOST_PIECE
from silotune.protocol.errors import (
    CoordinatorUnavailable,
    MessageRefused,
    SessionTaken,
    VersionsDiffer,
)
from silotune.protocol.http import SESSION_HEADER
from silotune.protocol.https import connection_errors, failure, https_client
from silotune.trust.errors import BodyInvalid

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 10.0
"""Between two signs of life; a site counts as gone when two of them are missing."""

_SLICE = 1 << 16  # bytes of a body that are handed on at a time

_B = TypeVar("_B", bound=http.Body)


@dataclass(frozen=True)
class Delivery:
    """A message that waits to be fetched: of its content, the first piece has come with it.

    Attributes
    ----------
    outline : Message
        With metadata, without content.
    frame : MessageFrame
        Its first frame.
    """

    outline: Message
    frame: MessageFrame

    @property
    def message_id(self) -> str:
        """The coordinator's id of the message."""
        return str(self.outline.metadata.message_id)

    @property
    def kind(self) -> str:
        """The message type, as claimed."""
        return str(self.outline.metadata.message_type)


class Fleet:
    """A site's connection to the coordinator.

    Parameters
    ----------
    url : str
        ``https://host:port``.
    tls : ssl.SSLContext
        With the site's certificate, by which the coordinator knows it.
    session : str
        Names this process (`silotune.protocol.http.SESSION_HEADER`).
    heartbeat : float
        Seconds between signs of life.

    Attributes
    ----------
    node_id : int
        The number that the coordinator gave; 0 before `connect`.
    """

    def __init__(
        self, url: str, *, tls: ssl.SSLContext, session: str, heartbeat: float = HEARTBEAT_SECONDS
    ) -> None:
        self._url, self._heartbeat = url, heartbeat
        self._client = https_client(url, tls=tls, headers={SESSION_HEADER: session})
        self.node_id = 0
        self._stop, self._closing = threading.Event(), threading.Lock()
        self._beating: threading.Thread | None = None

    def connect(self) -> None:
        """Begin a session, and send signs of life from a thread of their own.

        Raises
        ------
        PortUnreachable, ProxyFailed, ServerUntrusted, CoordinatorUnavailable, VersionsDiffer
            Try again later.
        CoordinatorRefused
            The site is unknown or revoked there.
        """
        self.node_id = self._said(http.ACTIVATE, self._alive(), http.Activated).node
        if self._beating is None:
            self._beating = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
            self._beating.start()

    def receive(self) -> Delivery | None:
        """The next message for this site, or None; may be held by the coordinator for a while.

        Raises
        ------
        MessageRefused
            What came is no message.
        Others
            As `connect`.
        """
        content = self._ask(http.PULL)
        if not content:
            return None
        try:
            frame = read_frame(content)
            return Delivery(outline_of(frame.head), frame)
        except ValueError as exc:
            raise CoordinatorUnavailable("the answer is no message of the protocol") from exc

    def fetch(self, delivery: Delivery, *, limit: int) -> Message:
        """Pull the rest of a message of at most `limit` bytes, and build it.

        Raises
        ------
        MessageRefused
            It is too large, or no message with content, or pieces of it are missing.
        Others
            As `connect`.
        """
        first = delivery.frame
        if first.of // 2 * MOST_PIECE + len(first.head) > limit:  # it has more than that
            raise MessageRefused(f"the message has more than {limit} bytes")
        pieces, total = [bytes(first.piece)] * bool(first.of), len(first.head) + len(first.piece)
        for number in range(1, first.of):
            query = http.PieceQuery(message=delivery.message_id, number=number)
            pieces.append(self._ask(http.PIECE, query.model_dump_json().encode()))
            total += len(pieces[-1])
            if not pieces[-1]:
                raise MessageRefused("a piece of the message is not there")
            if total > limit:
                break
        if total > limit:
            raise MessageRefused(f"the message has more than {limit} bytes")
        message = together(Parts(first.head, tuple(pieces)))
        if not message.has_content():
            raise MessageRefused("what came is something else than a message with content")
        return message

    def send(self, reply: Message) -> bool:
        """Push a reply, piece by piece; the last makes it complete.

        Returns
        -------
        bool
            Whether the coordinator took it; it refuses replies to what it has withdrawn.

        Raises
        ------
        CoordinatorUnavailable
            It has not kept what came before; send all of it again.
        Others
            As `connect`.
        """
        for frame in frames(apart(reply)):
            if not self._read(self._ask(http.PUSH, *frame), http.Pushed).taken:
                return False
        return True

    def close(self, *, goodbye: bool = True) -> None:
        """Stop the signs of life, say goodbye if asked to and if the coordinator listens, and close."""
        with self._closing:
            if self._stop.is_set():
                return
            self._stop.set()
        if self.node_id and goodbye:
            self._quietly(lambda: self._ask(http.GOODBYE), "was not told of the end")
        self._client.close()

    # --- plumbing ---

    def _beat(self) -> None:
        while not self._stop.wait(0.8 * self._heartbeat):
            self._quietly(
                lambda: self._said(http.HEARTBEAT, self._alive(), http.Done),
                "missed a sign of life",
            )

    def _alive(self) -> http.Activation:
        return http.Activation(seconds=self._heartbeat, sent_at=time.time())

    def _quietly(self, call: Callable[[], object], what: str) -> None:
        try:
            call()
        except (SilotuneError, RuntimeError) as exc:  # httpx: the client was closed
            if not self._stop.is_set():
                logger.warning("the coordinator %s: %s", what, exc)

    def _said(self, path: str, asked: http.Body, reply: type[_B]) -> _B:
        return self._read(self._ask(path, asked.model_dump_json().encode()), reply)

    def _read(self, content: bytes, reply: type[_B]) -> _B:
        try:
            return http.parse(reply, content)
        except BodyInvalid as exc:
            raise CoordinatorUnavailable("the answer is none of the protocol") from exc

    def _ask(self, path: str, *content: bytes) -> bytes:
        """One request; every failure becomes one of silotune's errors."""
        headers = {"content-length": str(sum(map(len, content)))}
        with connection_errors(self._url):
            response = self._client.post(
                self._url + path, content=_slices(content), headers=headers
            )
        if response.is_success:
            return response.content
        if response.status_code == httpx.codes.CONFLICT:
            raise SessionTaken
        if response.status_code == httpx.codes.NOT_FOUND:
            raise VersionsDiffer("the coordinator does not know how this site asks for messages")
        raise failure(response)


def _slices(content: tuple[bytes, ...]) -> Iterator[bytes]:
    """A body as it is sent: of a large one, httpx copies what is left at every few kilobytes."""
    for part in content:
        view = memoryview(part)
        for start in range(0, len(view), _SLICE):
            yield bytes(view[start : start + _SLICE])
