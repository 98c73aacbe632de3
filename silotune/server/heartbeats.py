"""Who has fallen silent and who is back: told once each, in the federation's log and in the runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from silotune.server.federation_log import FederationLog
from silotune.server.operations import SiteRow


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
        sites: Callable[[], Sequence[SiteRow]],
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
