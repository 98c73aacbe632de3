"""Who has fallen silent and who is back: told once each, in the federation's log and in the runs.

`Periodic` looks at something every few seconds, in a thread of its own.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Sequence

from silotune.events.source import SiteFacts
from silotune.server.store.runs import FederationLog


class Heartbeats:
    """What became of the sites' heartbeats since the last `look`.

    Parameters
    ----------
    sites : callable
        The sites as they are now.
    log : FederationLog
        Is told ``site_silent`` and ``site_back``.
    runs_of : callable
        A site's running runs, each as a function that takes an event for it.
    silent_seconds : float
        Age of the last heartbeat from which on a site is silent.
    """

    def __init__(
        self,
        sites: Callable[[], Sequence[SiteFacts]],
        *,
        log: FederationLog,
        runs_of: Callable[[str], Iterable[Callable[..., object]]],
        silent_seconds: float,
    ) -> None:
        self._sites, self._log, self._runs_of = sites, log, runs_of
        self._limit = silent_seconds
        self._silent = self._told()

    def look(self, now: float) -> None:
        """One look at everybody, at a Unix time."""
        for site in self._sites():
            name, seen = site.site, site.last_seen
            if site.status != "active":
                self._silent.discard(name)
            elif site.online and name in self._silent:
                self._silent.discard(name)
                self._tell("site_back", site=name)
            elif (
                name not in self._silent and not site.online and 0 < (seen or 0) < now - self._limit
            ):
                self._silent.add(name)
                self._tell("site_silent", site=name, seconds=round(now - (seen or 0.0), 1))

    def _told(self) -> set[str]:
        """Sites whose silence was told by an earlier process, and not their return."""
        found = set[str]()
        for row in self._log.events(""):
            if row["event"] == "site_silent":
                found.add(row["site"])
            elif row["event"] == "site_back":
                found.discard(row["site"])
        return found

    def _tell(self, kind: str, **fields: object) -> None:
        self._log.append(kind, **fields)
        for append in self._runs_of(str(fields["site"])):
            append(kind, **fields)


_log = logging.getLogger(__name__)

_LOOK_SECONDS = 5.0
_LAST_SECONDS = 15.0  # for a look that is under way


class Periodic:
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
