"""Who takes part in secure aggregation: a site, its identity, and its own limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from silotune.privacy.secagg.messages import round_context


@dataclass(frozen=True, kw_only=True)
class Member:
    """A site as a member of a run's cohorts.

    Attributes
    ----------
    site : str
    identity : Ed25519PrivateKey
        What it was enrolled with.
    roster : mapping of site to bytes
        Raw Ed25519 public keys of all enrolled sites, from enrolment and never from a round.
    plan_sha256, run : str
    declared_units : int
        Public size.
    threshold : int or None
        The plan's; more than two thirds of a cohort when None.
    largest_cohort : int
        The plan's: what the encoding has room for.
    smallest_cohort : int
        The site's own minimum of members that share their secrets.
    smallest_sum : int
        The site's own floor under the plan's threshold: survivors that the sum must be over.
    """

    site: str
    identity: Ed25519PrivateKey = field(repr=False)
    roster: Mapping[str, bytes]
    plan_sha256: str
    run: str
    declared_units: int
    threshold: int | None = None
    largest_cohort: int = 1 << 10
    smallest_cohort: int = 3
    smallest_sum: int = 2

    def context(self, number: int) -> bytes:
        """See `silotune.privacy.secagg.messages.round_context`."""
        return round_context(
            plan_sha256=self.plan_sha256, run=self.run, number=number, roster=self.roster
        )
