"""Long polls: a request is held until there is something for it, without a thread of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable

from starlette.types import Receive

HOLD_SECONDS = 20.0
"""Longest that a request is held; clients must wait longer than that for an answer."""


class LongPoll:
    """One waiting request a key; rung from any thread.

    A newer request with the same key releases the older one: its sender has given it up.
    """

    def __init__(self) -> None:
        self._events: dict[Hashable, tuple[asyncio.AbstractEventLoop, asyncio.Event]] = {}
        self._closed = False

    async def wait(
        self, key: Hashable, *, ready: Callable[[], Awaitable[bool]], receive: Receive
    ) -> bool:
        """Hold until `ready`, a wake-up, or the time limit.

        Returns
        -------
        bool
            Whether the client is still there to be answered.
        """
        event = asyncio.Event()
        older = self._events.get(key)
        self._events[key] = (asyncio.get_running_loop(), event)
        if older is not None:
            older[1].set()
        try:
            # Registered before the look: what comes in between rings this very event.
            if self._closed or await ready():
                return True
            return await _first(event, receive)
        finally:
            if self._events.get(key, (None, None))[1] is event:
                del self._events[key]

    def wake(self, key: Hashable) -> None:
        """Release the request that waits under `key`, if any."""
        waiting = self._events.get(key)
        if waiting is not None:
            _set(*waiting)

    def wake_all(self) -> None:
        """Release every waiting request."""
        for waiting in list(self._events.values()):
            _set(*waiting)

    def close(self) -> None:
        """Release everybody and hold nobody any more, so that the server can end."""
        self._closed = True
        self.wake_all()


def _set(loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(event.set)


async def _first(event: asyncio.Event, receive: Receive) -> bool:
    """True when the event came or time is up, False when the client left."""
    rung = asyncio.ensure_future(event.wait())
    gone = asyncio.ensure_future(_until_gone(receive))
    try:
        done, _ = await asyncio.wait(
            {rung, gone}, timeout=HOLD_SECONDS, return_when=asyncio.FIRST_COMPLETED
        )
        return gone not in done
    finally:
        rung.cancel()
        gone.cancel()


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
