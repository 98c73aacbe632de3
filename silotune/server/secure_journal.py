"""What a secure round has settled, on the disk before a site is asked to act on it.

A site masks one update a round, for one cohort, and opens for one survivor set. A coordinator that is
killed must ask for the very same again, or it gets nothing. So it writes down whom it asks to mask and
with which sealed shares, before it asks; and the survivors, before any site signs or opens for them. The
next process goes on from there. Masked updates are not written here: the message store has those that
arrived, and a site gives its own again, the same bytes for the same request and uncharged.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from silotune.privacy.secagg.coordinator import CoordinatorRound
from silotune.privacy.secagg.messages import pack, unpack


class RoundMemory(Protocol):
    """Keeps the newest secure round of a run."""

    def save_secure_round(self, number: int, content: bytes) -> None:
        """Replace what is kept, durably."""
        ...

    def load_secure_round(self, number: int) -> bytes | None:
        """What is kept of a round, if it is the newest."""
        ...


@dataclass(frozen=True, kw_only=True)
class Settled:
    """A secure round as far as it may not be changed any more.

    Attributes
    ----------
    current : CoordinatorRound
        Its cohort, who is present, and the sealed shares.
    nodes : mapping of site to int
        Where the cohort's sites are.
    survivors : frozenset of str
        Whom sites may have signed or opened for; empty as long as nobody was asked.
    following : CoordinatorRound or None
        The next round's cohort, which sites share with in the same breath.
    void : bool
        The round has come to nothing, and nothing more may be opened in it.
    """

    current: CoordinatorRound
    nodes: Mapping[str, int]
    survivors: frozenset[str] = frozenset()
    following: CoordinatorRound | None = None
    void: bool = False

    def to_bytes(self) -> bytes:
        """For the disk; it holds no secrets, shares are sealed between the sites."""
        facts = {"nodes": dict(self.nodes), "survivors": sorted(self.survivors), "void": self.void}
        following = self.following.dump() if self.following is not None else b""
        return pack([json.dumps(facts).encode(), self.current.dump(), following])

    @classmethod
    def from_bytes(cls, blob: bytes, *, threshold: int | None, largest_cohort: int) -> Settled:
        """Read what `to_bytes` wrote."""
        text, current, following = unpack(blob, count=3)
        facts = json.loads(text)

        def restored(dumped: bytes) -> CoordinatorRound:
            return CoordinatorRound.restore(
                dumped, threshold=threshold, largest_cohort=largest_cohort
            )

        return cls(
            current=restored(current),
            nodes=facts["nodes"],
            survivors=frozenset(facts["survivors"]),
            following=restored(following) if following else None,
            void=facts["void"],
        )
