"""The coordinator's part in one round of secure aggregation: it relays, sums, and removes the masks.

It is trusted with nothing: what it could do wrong, the sites refuse. Each ``add_…`` takes one site's
reply and raises if the reply can't be used; the round goes on without that site.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from numpy.typing import NDArray

from silotune.privacy.errors import (
    CohortTooSmall,
    MessageMalformed,
    ShareInvalid,
    SurvivorsInvalid,
    TooFewSurvivors,
)
from silotune.privacy.secagg.encoding import Mask, Ring, apply_masks
from silotune.privacy.secagg.graph import Topology, neighbours, topology
from silotune.privacy.secagg.keys import (
    Interpolation,
    commitment,
    element,
    pairwise_mask,
    self_mask,
)
from silotune.privacy.secagg.messages import (
    SIGNATURE_BYTES,
    Advertisement,
    Cohort,
    pack,
    pack_named,
    pack_names,
    unpack,
    unpack_named,
    unpack_names,
)


class CoordinatorRound:
    """One round at the coordinator.

    Parameters
    ----------
    threshold : int, optional
        The plan's.
    largest_cohort : int
        The plan's; later advertisements are refused.

    Attributes
    ----------
    present : set of str
        Members that shared their secrets.
    survivors : set of str
        Members whose masked update is in the sum.
    """

    def __init__(self, *, threshold: int | None = None, largest_cohort: int = 1 << 10) -> None:
        self._threshold, self._largest = threshold, largest_cohort
        self._advertised: dict[str, Advertisement] = {}
        self._sealed: dict[str, dict[str, bytes]] = {}  # to -> from -> sealed shares
        self.present: set[str] = set()
        self.survivors: set[str] = set()
        self.signatures: dict[str, bytes] = {}
        self._opened: dict[str, dict[str, bytes]] = {}  # by opener -> of -> share
        self._sum: Ring | None = None

    def dump(self) -> bytes:
        """Cohort, who is present, and the sealed shares: all that may not change once sites masked."""
        sealed = {to: pack_named(held) for to, held in self._sealed.items()}
        cohort = Cohort(tuple(self._advertised[name] for name in sorted(self._advertised)))
        return pack([cohort.to_bytes(), pack_names(self.present), pack_named(sealed)])

    @classmethod
    def restore(
        cls, dumped: bytes, *, threshold: int | None, largest_cohort: int
    ) -> CoordinatorRound:
        """Go on from a `dump`, before any masked update was added."""
        cohort, present, sealed = unpack(dumped, count=3)
        found = cls(threshold=threshold, largest_cohort=largest_cohort)
        found._advertised = {member.site: member for member in Cohort.from_bytes(cohort).members}
        found.present = set(unpack_names(present))
        found._sealed = {to: unpack_named(held) for to, held in unpack_named(sealed).items()}
        return found

    # --- phases ---

    def advertise(self, site: str, message: bytes) -> None:
        """Take a site's keys, before the cohort is looked at."""
        given = Advertisement.from_bytes(message)
        known = next(iter(self._advertised.values()), given)
        if given.site != site:
            raise MessageMalformed(f"site {site} sent the keys of {given.site}")
        if given.context != known.context:
            raise MessageMalformed(f"site {site} is in another round, or has another roster")
        if len(self._advertised) >= self._largest and site not in self._advertised:
            raise CohortTooSmall(f"the plan has room for {self._largest} sites")
        self._advertised[site] = given

    @property
    def advertised(self) -> frozenset[str]:
        """Sites that sent keys."""
        return frozenset(self._advertised)

    @cached_property
    def cohort(self) -> Cohort:
        """The members; fixed once looked at."""
        return Cohort(tuple(self._advertised[name] for name in sorted(self._advertised)))

    @cached_property
    def topology(self) -> Topology:
        """The sizes of the graph. Raises `CohortTooSmall`."""
        return topology(len(self.cohort), threshold=self._threshold)

    @cached_property
    def _graph(self) -> tuple[tuple[int, ...], ...]:
        return neighbours(len(self.cohort), circles=self.topology.circles, seed=self.cohort.digest)

    def add_shares(self, site: str, sealed: Mapping[str, bytes]) -> None:
        """Take what a site sealed for its neighbours."""
        if set(sealed) != self._near(site):
            raise MessageMalformed(f"site {site} did not share with its neighbours")
        for peer, message in sealed.items():
            self._sealed.setdefault(peer, {})[site] = message
        self.present.add(site)

    def sealed_for(self, site: str) -> dict[str, bytes]:
        """What the neighbours that are present sealed for a site."""
        held = self._sealed.get(site, {})
        return {name: held[name] for name in sorted(self._near(site) & self.present)}

    def require_quorum(self, names: set[str]) -> None:
        """Raise `TooFewSurvivors` if the round can't go on with these sites."""
        if len(names) < self.topology.quorum:
            raise TooFewSurvivors(f"{len(names)} sites; the threshold is {self.topology.quorum}")

    def add_masked(self, site: str, vector: Ring, *, like: NDArray[Any]) -> None:
        """Add a masked update to the sum.

        Parameters
        ----------
        like : uint32 or uint16 array
            An array of the type and length that the plan asks for.
        """
        if vector.dtype != like.dtype or vector.shape != like.shape:
            got, wanted = f"{vector.dtype}{[*vector.shape]}", f"{like.dtype}{[*like.shape]}"
            raise MessageMalformed(f"site {site} sent {got}, not {wanted}")
        if site not in self.present or site in self.survivors:
            raise SurvivorsInvalid(f"site {site} is not expected to send an update")
        if self._sum is None:
            self._sum = vector.copy()
        else:
            np.add(self._sum, vector, out=self._sum)
        self.survivors.add(site)

    @property
    def agreement_needed(self) -> bool:
        """Whether the sites must sign the survivor set before they open."""
        return self.survivors != self.present or not self.topology.complete

    def add_signature(self, site: str, signature: bytes) -> None:
        """Take a survivor's signature; the other sites verify it."""
        if site not in self.survivors or len(signature) != SIGNATURE_BYTES:
            raise MessageMalformed(f"site {site} did not sign the survivors")
        self.signatures[site] = signature

    def add_opening(self, site: str, shares: Mapping[str, bytes]) -> None:
        """Take a survivor's shares."""
        expected = (self._near(site) & self.present) | {site}
        if site not in self.survivors or set(shares) != expected:
            raise MessageMalformed(f"site {site} did not open what it was asked to")
        for share in shares.values():
            element(share)
        self._opened[site] = dict(shares)

    def unmask(self) -> Ring:
        """The sum of the survivors' encoded updates. Call it once.

        Raises
        ------
        TooFewSurvivors
            Not enough shares of a secret.
        ShareInvalid
            Shares that do not give the secret its owner committed to.
        """
        if self._sum is None:
            raise TooFewSurvivors("no site sent an update")
        points = {name: place + 1 for name, place in self.cohort.places.items()}
        weights: dict[tuple[str, ...], Interpolation] = {}
        masks = list[Mask]()
        for name in sorted(self.present):
            openers = self._openers(name)
            if openers not in weights:
                weights[openers] = Interpolation([points[opener] for opener in openers])
            shares = {points[opener]: self._opened[opener][name] for opener in openers}
            masks += self._masks_of(name, self._combined(name, weights[openers], shares))
        apply_masks(self._sum, masks)
        return self._sum

    # --- inside ---

    def _near(self, site: str) -> set[str]:
        return {self.cohort.members[j].site for j in self._graph[self.cohort.places[site]]}

    def _openers(self, name: str) -> tuple[str, ...]:
        """The first sites, by name, that hold shares of a site and opened them."""
        holders = sorted((self._near(name) | {name}) & self._opened.keys())
        if len(holders) < self.topology.shares:
            raise TooFewSurvivors(f"{len(holders)} sites opened their share of a secret of {name}")
        return tuple(holders[: self.topology.shares])

    @staticmethod
    def _combined(name: str, weights: Interpolation, shares: Mapping[int, bytes]) -> bytes:
        try:
            return weights.combine(shares)
        except MessageMalformed as exc:
            raise ShareInvalid(f"the shares of {name} do not give a secret") from exc

    def _masks_of(self, name: str, secret: bytes) -> list[Mask]:
        """What takes a member's masks off the sum: its own, or those with all who survived."""
        member = self.cohort[name]
        if name in self.survivors:
            if commitment(member.context, name, secret) != member.commitment:
                raise ShareInvalid(f"the shares of {name} give another seed than it committed to")
            return [self_mask(secret, context=member.context, site=name).inverse()]
        private = X25519PrivateKey.from_private_bytes(secret)
        if private.public_key().public_bytes_raw() != member.mask_public:
            raise ShareInvalid(f"the shares of {name} give another key than it advertised")
        # The survivors' masks with `name` are still in the sum; its own would have cancelled them.
        return [
            pairwise_mask(
                private,
                self.cohort[peer].mask_public,
                context=member.context,
                own=name,
                peer=peer,
            )
            for peer in sorted(self._near(name) & self.survivors)
        ]
