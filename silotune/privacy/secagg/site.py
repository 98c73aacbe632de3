"""A site's part in one round of secure aggregation, as a state machine without input or output.

Stages, each entered once: keys advertised, secrets shared, update masked, masks opened. A request that
comes again with the same content gets the same answer; with other content it is refused. Every refusal
leaves the state as it was.

Why two exchanges can do. A round in which nobody drops out after sharing needs no separate consistency
check: the site then opens the seeds of *all* members and no mask key, and from then on neither signs
another survivor set nor opens one. To rebuild a mask key as well, the coordinator would need `quorum`
signatures on a smaller set, from sites that did not open: with c sites on its side, quorum - c honest
ones of each kind, more than there are as long as ``2 quorum > n + c``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import IntEnum
from functools import cached_property
from typing import Any

from silotune.privacy.errors import (
    CohortTooSmall,
    MessageMalformed,
    RoundUsed,
    SignerUnknown,
    SurvivorsInvalid,
    TooFewSurvivors,
    TranscriptMismatch,
)
from silotune.privacy.secagg.encoding import Mask, Ring, apply_masks
from silotune.privacy.secagg.graph import Topology, neighbours, topology
from silotune.privacy.secagg.keys import (
    SHARE_BYTES,
    RoundSecrets,
    commitment,
    digest,
    open_sealed,
    pairwise_mask,
    seal,
    self_mask,
    split,
)
from silotune.privacy.secagg.messages import (
    Advertisement,
    Cohort,
    Member,
    require_signature,
    signed,
)


class Stage(IntEnum):
    """How far a round has come at a site."""

    ADVERTISED = 0
    SHARED = 1
    MASKED = 2
    OPENED = 3


@dataclass
class _RoundState:
    """Everything a restarted site must know of a round; secrets among it."""

    number: int
    secrets: RoundSecrets
    stage: int = Stage.ADVERTISED
    cohort: bytes = b""
    present: list[str] = field(default_factory=list)
    held: dict[str, bytes] = field(default_factory=dict)  # from -> mask key share, seed share
    signed_for: bytes = b""
    opened_for: bytes = b""


class SiteRound:
    """One round at one site. Make it with `SiteRound.begin`, or from `dump` after a restart."""

    def __init__(self, member: Member, state: _RoundState) -> None:
        self._member, self._state = member, state
        self._context = member.context(state.number)

    # --- life ---

    @classmethod
    def begin(cls, member: Member, number: int) -> SiteRound:
        """Fresh keys for a round."""
        return cls(member, _RoundState(number, RoundSecrets.fresh()))

    def dump(self) -> bytes:
        """The whole state; it holds secrets, so it must be encrypted where it is kept."""
        return json.dumps(_plain(asdict(self._state))).encode()

    @classmethod
    def restore(cls, member: Member, dumped: bytes) -> SiteRound:
        """Go on from a `dump`."""
        raw = json.loads(dumped)
        secrets = RoundSecrets(**{k: bytes.fromhex(v) for k, v in raw.pop("secrets").items()})
        raw["held"] = {name: bytes.fromhex(part) for name, part in raw["held"].items()}
        for name in ("cohort", "signed_for", "opened_for"):
            raw[name] = bytes.fromhex(raw[name])
        return cls(member, _RoundState(secrets=secrets, **raw))

    @property
    def number(self) -> int:
        """The round's number."""
        return self._state.number

    @property
    def stage(self) -> Stage:
        """How far it has come."""
        return Stage(self._state.stage)

    # --- phases ---

    def advertisement(self) -> Advertisement:
        """The signed public keys of this site; always the same ones."""
        secrets, member = self._state.secrets, self._member
        mask_public, share_public = secrets.masking.public_key(), secrets.sharing.public_key()
        return signed(
            Advertisement(
                site=member.site,
                context=self._context,
                mask_public=mask_public.public_bytes_raw(),
                share_public=share_public.public_bytes_raw(),
                commitment=commitment(self._context, member.site, secrets.seed),
                declared_units=member.declared_units,
            ),
            member.identity,
        )

    def share(self, cohort: bytes, *, seen: frozenset[bytes] = frozenset()) -> dict[str, bytes]:
        """Take the cohort's keys; this site's sealed shares for each of its neighbours.

        Parameters
        ----------
        cohort : bytes
            Of a `Cohort`.
        seen : frozenset of bytes
            Public keys of the round before.

        Raises
        ------
        SignerUnknown, KeyReused, CohortTooSmall, MessageMalformed, RoundUsed
        """
        if self._state.cohort not in (b"", cohort):
            raise RoundUsed("this site shared its secrets with another cohort before")
        members = Cohort.from_bytes(cohort)
        self._require_size(len(members))
        members.require_sound(context=self._context, roster=self._member.roster, seen=seen)
        if self._own not in members or members[self._own] != self.advertisement():
            raise TranscriptMismatch("the cohort has other keys for this site than it advertised")
        self._state.cohort = cohort
        self.__dict__.pop("_cohort", None)
        self._state.stage = max(self._state.stage, Stage.SHARED)
        shares = self._own_shares()
        return {
            name: seal(
                self._state.secrets.sharing,
                self._cohort[name].share_public,
                both,
                bound=self._cohort.digest,
                own=self._own,
                peer=name,
            )
            for name, both in shares.items()
            if name != self._own
        }

    def mask(self, vector: Ring, *, present: Sequence[str], sealed: Mapping[str, bytes]) -> None:
        """Mask an encoded update, in place. Once.

        Parameters
        ----------
        vector : uint32 or uint16 array
            The encoded update.
        present : sequence of str
            Members that shared their secrets: whose masks go on.
        sealed : mapping of site to bytes
            What this site's neighbours among them sealed for it.

        Raises
        ------
        RoundUsed
            Masked before.
        TooFewSurvivors, SurvivorsInvalid, TranscriptMismatch, MessageMalformed
        """
        self._require_stage(Stage.SHARED)
        self._require_part(present)
        if len(present) < max(self._topology.quorum, self._member.smallest_cohort):
            raise CohortTooSmall(f"{len(present)} sites shared their secrets")
        near = self._near(self._own) & set(present)
        if set(sealed) != near:
            raise MessageMalformed("the sealed shares are not those of this site's neighbours")
        held = {name: self._opened(name, sealed[name]) for name in sorted(near)}
        held[self._own] = self._own_shares()[self._own]
        self._state.held, self._state.present = held, sorted(present)
        apply_masks(vector, self._masks(near))
        self._state.stage = Stage.MASKED

    def sign(self, survivors: Sequence[str]) -> bytes:
        """Sign the one survivor set that this site will ever open in this round.

        Raises
        ------
        RoundUsed
            Another set was signed or opened before.
        SurvivorsInvalid, TooFewSurvivors
        """
        self._require_stage(Stage.MASKED, Stage.OPENED)
        message = self._survivors_digest(survivors)
        if {self._state.signed_for, self._state.opened_for} - {b"", message}:
            raise RoundUsed("this site agreed to another survivor set before")
        self._state.signed_for = message
        return self._member.identity.sign(message)

    def open(
        self, survivors: Sequence[str], signatures: Mapping[str, bytes] | None = None
    ) -> dict[str, bytes]:
        """Shares of the survivors' seeds and of the others' mask keys.

        Parameters
        ----------
        survivors : sequence of str
            Members whose masked update the coordinator has.
        signatures : mapping of site to bytes, optional
            `sign` of enough sites. Not needed if nobody dropped out and the graph is complete.

        Raises
        ------
        RoundUsed
            Another set was signed or opened before.
        SignerUnknown, TranscriptMismatch, SurvivorsInvalid, TooFewSurvivors
        """
        self._require_stage(Stage.MASKED, Stage.OPENED)
        message = self._survivors_digest(survivors)
        if {self._state.signed_for, self._state.opened_for} - {b"", message}:
            raise RoundUsed("this site agreed to another survivor set before")
        if sorted(survivors) != self._state.present or not self._topology.complete:
            self._require_agreement(survivors, signatures or {}, message)
        self._state.opened_for, self._state.stage = message, Stage.OPENED
        alive = set(survivors)
        return {
            name: both[SHARE_BYTES:] if name in alive else both[:SHARE_BYTES]
            for name, both in self._state.held.items()
        }

    # --- inside ---

    @property
    def _own(self) -> str:
        return self._member.site

    @cached_property
    def _cohort(self) -> Cohort:
        return Cohort.from_bytes(self._state.cohort)

    @property
    def cohort(self) -> Cohort:
        """The members, once they are known."""
        return self._cohort

    @property
    def _topology(self) -> Topology:
        return topology(len(self._cohort), threshold=self._member.threshold)

    @cached_property
    def _graph(self) -> tuple[tuple[int, ...], ...]:
        return neighbours(
            len(self._cohort), circles=self._topology.circles, seed=self._cohort.digest
        )

    def _near(self, site: str) -> set[str]:
        return {self._cohort.members[j].site for j in self._graph[self._cohort.places[site]]}

    def _require_stage(self, *allowed: Stage) -> None:
        if self._state.stage not in allowed:
            raise RoundUsed(
                f"round {self.number} has come to stage '{self.stage.name.lower()}' at this site"
            )

    def _require_size(self, members: int) -> None:
        own, most = self._member.smallest_cohort, self._member.largest_cohort
        if not own <= members <= most:
            raise CohortTooSmall(
                f"{members} members; this site's minimum is {own}, the most {most}"
            )
        topology(members, threshold=self._member.threshold)

    def _require_part(self, names: Sequence[str]) -> None:
        if len(set(names)) != len(names) or self._own not in names:
            raise SurvivorsInvalid("a site is listed twice, or this one is missing")
        if any(name not in self._cohort for name in names):
            raise SurvivorsInvalid("a site is listed that is not in the cohort")

    def _own_shares(self) -> dict[str, bytes]:
        """Shares of the mask key and of the seed, joined, by holder; this site is one of them."""
        holders = sorted({self._own, *self._near(self._own)})
        points = [self._cohort.places[name] + 1 for name in holders]
        secrets, t = self._state.secrets, self._topology.shares
        key = digest(b"mask key", secrets.polynomials)
        of_mask = split(secrets.mask_key, threshold=t, points=points, key=key)
        key = digest(b"seed", secrets.polynomials)
        of_seed = split(secrets.seed, threshold=t, points=points, key=key)
        return {name: a + b for name, a, b in zip(holders, of_mask, of_seed, strict=True)}

    def _opened(self, name: str, sealed: bytes) -> bytes:
        both = open_sealed(
            self._state.secrets.sharing,
            self._cohort[name].share_public,
            sealed,
            bound=self._cohort.digest,
            own=self._own,
            peer=name,
        )
        if len(both) != 2 * SHARE_BYTES:
            raise MessageMalformed(f"the shares of {name} have a wrong length")
        return both

    def _masks(self, near: set[str]) -> list[Mask]:
        """One mask a neighbour, and this site's own."""
        pairs = [
            pairwise_mask(
                self._state.secrets.masking,
                self._cohort[name].mask_public,
                context=self._context,
                own=self._own,
                peer=name,
            )
            for name in sorted(near)
        ]
        return [self_mask(self._state.secrets.seed, context=self._context, site=self._own), *pairs]

    def _survivors_digest(self, survivors: Sequence[str]) -> bytes:
        """Check a survivor set; what a signature on it covers, the whole transcript included."""
        self._require_part(survivors)
        if not set(survivors) <= set(self._state.present):
            raise SurvivorsInvalid("a survivor never shared its secrets")
        least = max(self._topology.quorum, self._member.smallest_sum)
        if len(survivors) < least:
            raise TooFewSurvivors(f"{len(survivors)} survivors; the threshold here is {least}")
        if not self._topology.complete:
            self._require_neighbours(set(survivors))
        return survivors_digest(self._cohort, self._state.present, survivors, self._context)

    def _require_neighbours(self, survivors: set[str]) -> None:
        """In a sparse graph nobody may be cut off from the other survivors."""
        places, least = self._cohort.places, self._topology.retained
        alive = {places[name] for name in survivors}
        for name in survivors:
            if len(alive.intersection(self._graph[places[name]])) < least:
                raise TooFewSurvivors(f"{name} has too few neighbours left")

    def _require_agreement(
        self, survivors: Sequence[str], signatures: Mapping[str, bytes], message: bytes
    ) -> None:
        if self._state.signed_for != message:
            raise RoundUsed("this site was not asked to sign these survivors")
        if not set(signatures) <= set(survivors):
            raise SurvivorsInvalid("a signature is of a site that did not survive")
        if len(signatures) < self._topology.quorum:
            raise TooFewSurvivors(f"{len(signatures)} sites agreed on the survivors")
        for name, signature in signatures.items():
            try:
                require_signature(name, signature, message, self._member.roster)
            except SignerUnknown as exc:
                raise TranscriptMismatch(f"{name} did not sign what this site saw") from exc


def survivors_digest(
    cohort: Cohort, present: Sequence[str], survivors: Sequence[str], context: bytes
) -> bytes:
    """What a site signs: the round, its cohort with all keys, who shared and who survived."""
    shared = digest(*(name.encode() for name in sorted(present)))
    alive = digest(*(name.encode() for name in sorted(survivors)))
    return digest(b"survivors", context, cohort.digest, shared, alive)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return value.hex() if isinstance(value, bytes) else value
