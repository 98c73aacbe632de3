"""Looks at something every few seconds, in a thread of its own."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

_log = logging.getLogger(__name__)

_LOOK_SECONDS = 5.0
_LAST_SECONDS = 15.0  # for a look that is under way


class Lookout:
    """Calls `look` until it is stopped; a look that fails is logged, and the next one comes.

    Parameters
    ----------
    look : callable
        One look at everything.
    name : str
        Of the thread, and in the log.
    """

    def __init__(self, look: Callable[[], None], *, name: str) -> None:
        self._look, self._name = look, name
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._main, daemon=True, name=name)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def stop(self) -> None:
        """End."""
        self._ending.set()
        if self._thread.is_alive():
            self._thread.join(timeout=_LAST_SECONDS)

    def _main(self) -> None:
        while not self._ending.wait(_LOOK_SECONDS):
            try:
                self._look()
            except Exception:
                _log.exception("%s could not be looked at", self._name)
