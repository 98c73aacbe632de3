"""The daemon's line to the coordinator: connect, pull, have it answered, push; for ever.

A failed connection is tried again with growing pauses. A new connection tells the coordinator that
whatever it had handed out may be lost; it sends that again, and the gate recalls what was worked out
already. So nothing here has to be remembered across a failure.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from flwr.app import Message

from silotune.client.daemon.enrolment import Enrolment
from silotune.client.daemon.runner import Runner
from silotune.data.site import SiteConfig
from silotune.errors import SilotuneError
from silotune.flower.messages import error_reply
from silotune.flower.site_link import Delivery, Fleet
from silotune.protocol.errors import CoordinatorRefused, MessageRefused, SessionTaken
from silotune.trust.audit import AuditLog

logger = logging.getLogger(__name__)

_SHORTEST, _LONGEST, _LONGEST_REFUSED = 0.25, 30.0, 60.0
_SEND_TRIES = 3
_IDLE_POLL, _LONGEST_POLL = 0.1, 1.0
_GOODBYE_SECONDS = 5.0
_OVERHEAD = 1 << 20
_DOWNLOAD_FACTOR = 4  # a message may be so many times as large as what the policy lets out


def backoff(failures: int, *, longest: float = _LONGEST) -> float:
    """Seconds to wait after so many failures in a row: doubling, and spread by a fifth."""
    seconds = min(_SHORTEST * 2.0 ** min(max(failures - 1, 0), 12), longest)
    return seconds * random.uniform(0.8, 1.2)  # noqa: S311 - so that sites don't come all at once


@dataclass
class Status:
    """How the line is; written by its thread, read by others."""

    link: str = "connecting"
    reason: str = ""
    since: float = field(default_factory=time.time)
    work: str = ""
    answered: int = 0
    refused: int = 0

    def turn(self, link: str, reason: str = "") -> bool:
        """Note a state of the connection; returns whether it is new."""
        if (self.link, self.reason) == (link, reason):
            return False
        self.link, self.reason, self.since = link, reason, time.time()
        return True


class SiteConnection:
    """One site's line.

    Parameters
    ----------
    site, enrolment, runner, audit
        The site's.
    session : str
        Names this process to the coordinator.
    answered : callable
        Told after each answer.

    Attributes
    ----------
    stop, reconnect : threading.Event
        Set them to end, or to connect anew once the work at hand is done.
    working : threading.Lock
        Held while a message is worked on.
    status : Status
        How it is.
    failed : SilotuneError or None
        What ended `serve` for good.
    """

    def __init__(
        self,
        site: SiteConfig,
        *,
        enrolment: Enrolment,
        runner: Runner,
        audit: AuditLog,
        session: str,
        answered: Callable[[], None],
    ) -> None:
        self._site, self._enrolment, self._runner = site, enrolment, runner
        self._audit, self._session, self._answered = audit, session, answered
        self.stop, self.reconnect = threading.Event(), threading.Event()
        self.working = threading.Lock()
        self.status = Status()
        self.failed: SilotuneError | None = None
        self._fleet: Fleet | None = None

    def serve(self) -> None:
        """Until `stop` is set."""
        failures = 0
        while not self.stop.is_set():
            try:
                with self._connected() as fleet:
                    failures = 0
                    self._pull(fleet)
            except SessionTaken as exc:
                self.failed = exc
                self.stop.set()
            except Exception as exc:
                failures += 1
                self._wait(exc, failures)

    def end(self, *, grace: float) -> str:
        """Let the step in progress finish, and say goodbye to the coordinator.

        A release is charged and stored in one transaction, so a step that is abandoned has either
        released nothing, or an answer that is sent when the coordinator asks again.

        Parameters
        ----------
        grace : float
            Seconds that a step is waited for.

        Returns
        -------
        str
            What was abandoned; empty if nothing was.
        """
        ends = time.monotonic() + grace
        if self.status.work:
            logger.info("stopping: %s may take %.0f s to finish", self.status.work, grace)
        while self.status.work and time.monotonic() < ends:
            time.sleep(0.05)
        if self._fleet is not None:
            closing = threading.Thread(target=self._fleet.close, daemon=True)
            closing.start()
            closing.join(_GOODBYE_SECONDS)
        return self.status.work

    # --- parts ---

    @contextmanager
    def _connected(self) -> Iterator[Fleet]:
        self.reconnect.clear()
        fleet = self._fleet = Fleet(
            self._enrolment.facts.url,
            tls=self._enrolment.tls(),
            session=self._session,
        )
        try:
            fleet.connect()
            if self.status.turn("online"):
                logger.info("online at %s", self._enrolment.facts.url)
            yield fleet
        finally:
            fleet.close(goodbye=self.stop.is_set())

    def _pull(self, fleet: Fleet) -> None:
        pause = _IDLE_POLL
        while not self.stop.is_set() and not self.reconnect.is_set():
            asked = time.monotonic()
            delivery = fleet.receive()
            if delivery is not None:
                if self.stop.is_set():
                    return  # it is sent again at the next start
                self._serve(fleet, delivery)
                pause = _IDLE_POLL
            elif time.monotonic() - asked < _LONGEST_POLL:  # the coordinator does not hold polls
                self.stop.wait(pause)
                pause = min(2 * pause, _LONGEST_POLL)

    def _serve(self, fleet: Fleet, delivery: Delivery) -> None:
        """Fetch one message, have it answered, and push the answer."""
        started = time.monotonic()
        self.status.work = kind = delivery.kind[:64]
        try:
            reply, code = self._answer(fleet, delivery)
            seconds = time.monotonic() - started
            logger.info(
                "%s %s after %.1f s", kind, f"refused with {code}" if code else "answered", seconds
            )
            self._send(fleet, reply)
            self.status.answered += not code
            self.status.refused += bool(code)
        finally:
            self.status.work = ""
        self._answered()

    def _answer(self, fleet: Fleet, delivery: Delivery) -> tuple[Message, str]:
        try:
            message = fleet.fetch(delivery, limit=self._limit)
        except MessageRefused as exc:
            self._audit.append("refused", type=delivery.kind[:64], code=exc.code, detail=exc.detail)
            logger.warning("a message is refused: %s", exc)
            return error_reply(delivery.outline, code=exc.code), exc.code
        with self.working:
            content, code = self._runner.answer(message)
        if content is None:
            return error_reply(delivery.outline, code=code), code
        return Message(content, reply_to=message), code

    def _send(self, fleet: Fleet, reply: Message) -> None:
        """Push an answer. One that can't be delivered is recalled when the request comes again."""
        for attempt in range(1, _SEND_TRIES + 1):
            try:
                if not fleet.send(reply):
                    logger.info("the coordinator has withdrawn the request; the answer is dropped")
                return
            except (CoordinatorRefused, SessionTaken):
                raise
            except SilotuneError:
                if attempt == _SEND_TRIES or self.stop.wait(0.5 * attempt):
                    raise

    @property
    def _limit(self) -> int:
        """Bytes that a message may have."""
        policy = self._site.policy
        allowed = (policy.max_upload_mb or 0.0) if policy else 0.0
        return int(_DOWNLOAD_FACTOR * allowed * 1e6) + _OVERHEAD

    def _wait(self, exc: Exception, failures: int) -> None:
        """Wait before the next try, longer each time, and say why."""
        if self.stop.is_set():
            return
        if not isinstance(exc, SilotuneError):
            logger.error("the line to the coordinator failed", exc_info=exc)
        if self.status.turn("waiting", str(exc)):
            logger.warning("waiting for the coordinator: %s", exc)
        refused = isinstance(exc, CoordinatorRefused)
        self.stop.wait(backoff(failures, longest=_LONGEST_REFUSED if refused else _LONGEST))
