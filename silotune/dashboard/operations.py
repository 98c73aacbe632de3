"""What the pages need of a running coordinator; a simulation has none of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from silotune.trust.identity import Person


class SiteFacts(Protocol):
    """A site of the federation."""

    @property
    def site(self) -> str:
        """Its name."""
        ...

    @property
    def status(self) -> str:
        """``active`` or ``revoked``."""
        ...

    @property
    def online(self) -> bool:
        """Whether its heartbeats are current."""
        ...

    @property
    def last_seen(self) -> float | None:
        """Unix time until which they were."""
        ...

    @property
    def words(self) -> str:
        """Its identity in six words."""
        ...


class RequestFacts(Protocol):
    """A request to be enrolled."""

    @property
    def request(self) -> str:
        """Its id."""
        ...

    @property
    def site(self) -> str:
        """The name it asks for."""
        ...

    @property
    def state(self) -> str:
        """``waiting``, ``approved`` or ``refused``."""
        ...

    @property
    def reason(self) -> str:
        """Why it was refused."""
        ...

    @property
    def requested_at(self) -> float:
        """Unix time."""
        ...

    @property
    def words(self) -> str:
        """The six words to compare."""
        ...


class Desk(Protocol):
    """Questions and actions, each in a person's name; actions refuse viewers themselves."""

    def sites(self) -> Sequence[SiteFacts]:
        """Every site."""
        ...

    def requests(self) -> Sequence[RequestFacts]:
        """Requests to be enrolled, newest first."""
        ...

    def alarms(self) -> Sequence[Mapping[str, Any]]:
        """Events of kind ``alarm``, newest first."""
        ...

    def done(self) -> Sequence[Mapping[str, Any]]:
        """What people did, newest first."""
        ...

    def pause(self, person: Person, run: str) -> None:
        """Hold a run."""
        ...

    def resume(self, person: Person, run: str) -> None:
        """Go on with a run."""
        ...

    def stop(self, person: Person, run: str) -> None:
        """End a run."""
        ...

    def approve(self, person: Person, request: str) -> str:
        """Let a site in."""
        ...

    def refuse(self, person: Person, request: str, *, reason: str) -> str:
        """Turn a site away."""
        ...

    def revoke(self, person: Person, site: str, *, reason: str) -> None:
        """Shut a site out."""
        ...

    def download(self, person: Person, run: str, name: str) -> bytes:
        """A file of a run, noted."""
        ...

    def signed_in(self, person: Person, *, how: str) -> None:
        """Note that somebody came in."""
        ...
