"""A site's part in the secure rounds of a run: the protocol's state machine between disk and gate.

The update is encoded, masked, charged and stored before a byte of it leaves, as any other; whether the
round comes to a sum or is void makes no difference to the ledger. The state of a round is on the disk,
encrypted, before each answer. A site that is restarted goes on from there, except in the moment between
masking and charging: then it drops out, and masks nothing again in that round.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import RecordDict
from numpy.typing import NDArray

from silotune.client.gate import DpRelease, Field, Gate, Public, Unprotected
from silotune.client.run_files import RunFiles, SealedMemory, keep_row, rows_before
from silotune.client.terms import missing_noise
from silotune.models.layout import Layout, Span
from silotune.plan.bands import growth
from silotune.plan.plan import Plan
from silotune.privacy.bands import taken_back
from silotune.privacy.errors import RoundUsed, SignerUnknown
from silotune.privacy.ledger import ReleaseKey
from silotune.privacy.noise import NoiseSource
from silotune.privacy.secagg.encoding import Encoding, Ring
from silotune.privacy.secagg.keys import digest
from silotune.privacy.secagg.messages import Member, pack_named
from silotune.privacy.secagg.site import SiteRound, Stage
from silotune.protocol.replies import (
    CheckReply,
    KeysReply,
    MaskedReply,
    OpenReply,
    ShareReply,
)
from silotune.strategies import method_of
from silotune.strategies.base import weight_in
from silotune.strategies.secure import encoding_for

if TYPE_CHECKING:
    from silotune.client.training.base import RoundUpdate

_log = logging.getLogger(__name__)

_PROTOCOL = "protocol: secure aggregation"


def member_of(
    plan: Plan,
    *,
    run: str,
    site: str,
    declared_units: int,
    identity: Ed25519PrivateKey,
    roster: Mapping[str, bytes] | None,
    min_cohort: int | None = None,
) -> Member:
    """The site as a member of the run's cohorts.

    The plan's ``rounds.min_sites`` and the policy's `min_cohort` hold for the cohort that the
    coordinator really shows, and for the sites that the sum is really over.

    Raises
    ------
    SignerUnknown
        There is no roster, or it has another key for this site.
    """
    if not roster or roster.get(site) != identity.public_key().public_bytes_raw():
        raise SignerUnknown("this site is not enrolled with the identity key it has")
    cohort = plan.aggregation.cohort
    assert cohort is not None  # validated with the plan
    least = max(plan.rounds.min_sites, min_cohort or 0)
    return Member(
        site=site,
        identity=identity,
        roster=roster,
        plan_sha256=plan.sha256,
        run=run,
        declared_units=declared_units,
        threshold=plan.aggregation.threshold,
        largest_cohort=cohort,
        smallest_cohort=max(least, Member.smallest_cohort),
        smallest_sum=max(least, Member.smallest_sum),
    )


class _HeldRound(NamedTuple):
    """A round in memory, and the version of its file that it is."""

    part: SiteRound
    version: tuple[int, int] | None


class SecurePart:
    """Answers the messages of secure rounds at one site.

    Parameters
    ----------
    plan : Plan
        The run's plan, with ``aggregation.secure``.
    member : Member
        This site.
    layout : Layout
        Of the adapter.
    gate : Gate
        The only door out.
    files : RunFiles
        Of kind `ROUNDS`: keep the state of rounds, with its keys and shares, over a restart.
    memory : callable
        Gives what is kept between rounds: asked only if later rounds take back a part of the noise.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        member: Member,
        layout: Layout,
        gate: Gate,
        files: RunFiles,
        memory: Callable[[], SealedMemory],
    ) -> None:
        self._plan, self._member, self._layout, self._gate = plan, member, layout, gate
        self._files, self._memory = files, memory
        self._rounds: dict[int, _HeldRound] = {}
        self._method = method_of(plan)

    def require_fine_enough(self, *, sigma: float) -> None:
        """Check before the first round that the ring can carry this site's share of the noise.

        Raises
        ------
        CalibrationImpossible
            It is too coarse, or too small.
        """
        for number in (1, self._plan.rounds.number):
            encoding, spans = self._encoding(number), self._spans(number)
            stds = missing_noise(self._plan, [span.part for span in spans], sigma=sigma)
            if stds and self._plan.privacy.noise == "shared":
                encoding.require_room([self._growth * stds[span.part] for span in spans])

    # --- what the coordinator may ask ---

    def keys(self, number: int) -> RecordDict:
        """Public keys of this site for a round."""
        return self._answer(number, "keys", KeysReply.fields(keys=self._advertised(number)))

    def share(self, number: int, cohort: bytes) -> RecordDict:
        """The secrets of a round, shared among the cohort."""
        return self._answer(
            number, "shares", ShareReply.fields(shares=self._shared(number, cohort))
        )

    def masked(
        self,
        number: int,
        *,
        present: Sequence[str],
        sealed: Mapping[str, bytes],
        charge: Callable[[], object],
        train: Callable[[], RoundUpdate],
        noise: NoiseSource,
        beside: Callable[[str], None] | None = None,
    ) -> RecordDict:
        """The masked update of a round, and keys for the next round.

        Parameters
        ----------
        present : sequence of str
            Members that shared their secrets.
        sealed : mapping of site to bytes
            What they sealed for this site.
        charge : callable
            Charges the round; called once all that the coordinator sent is in order.
        train : callable
            Gives the round's update; called after that.
        noise : NoiseSource
            For rounding, and for this site's share of the noise.
        beside : callable, optional
            As for `Gate.release`.

        Raises
        ------
        SecureAggregationError
            A refusal: nothing was trained, charged or sent.
        """
        key = ReleaseKey(self._member.run, number, "update")
        part = self._part(number)
        asked = digest(part.cohort.digest, *(name.encode() for name in sorted(present)))
        if (again := self._masked_before(key, asked)) is not None:
            return again
        vector = self._encoding(number).zeros()
        part.mask(vector, present=present, sealed=sealed)
        charge()
        update = train()
        vector += self._encoded(part, update, noise)
        self._keep(part)
        fields = self._masked_fields(
            number, vector, request=asked, private=update.event is not None
        )
        mechanisms = {"steps": update.event} if update.event is not None else {}
        return self._gate.release(key, fields=fields, mechanisms=mechanisms, beside=beside)

    def check(self, number: int, survivors: Sequence[str]) -> RecordDict:
        """Sign the survivors of a round, once."""
        part = self._part(number)
        signature = part.sign(survivors)
        self._keep(part)
        return self._answer(
            number, "check", CheckReply.fields(signature=Public(signature, _PROTOCOL))
        )

    def opened(
        self,
        number: int,
        *,
        survivors: Sequence[str],
        signatures: Mapping[str, bytes],
        next_cohort: bytes,
    ) -> RecordDict:
        """Shares that take the masks off the sum; and this site's secrets of the next round, shared."""
        part = self._part(number)
        shares = pack_named(part.open(survivors, signatures))
        self._keep(part)
        more = {"shares": self._shared(number + 1, next_cohort)} if next_cohort else {}
        fields = OpenReply.fields(opened=Public(shares, _PROTOCOL), **more)
        return self._answer(number, "open", fields)

    # --- inside ---

    def _answer(self, number: int, release: str, fields: Mapping[str, Field]) -> RecordDict:
        return self._gate.release(ReleaseKey(self._member.run, number, release), fields=fields)

    def _masked_fields(
        self, number: int, vector: Ring, *, request: bytes, private: bool
    ) -> Mapping[str, Field]:
        last = number == self._plan.rounds.number
        more: dict[str, Field] = {} if last else {"keys": self._advertised(number + 1)}
        return MaskedReply.fields(
            request=Public(request, _PROTOCOL),
            update=DpRelease(vector, "steps") if private else Unprotected(vector),
            **more,
        )

    def _masked_before(self, key: ReleaseKey, asked: bytes) -> RecordDict | None:
        again = self._gate.recall(key)
        if again is not None and MaskedReply.read(again).request != asked:
            raise RoundUsed("this site masked its update of the round for another cohort")
        return again

    def _encoding(self, number: int) -> Encoding:
        return encoding_for(self._plan, layout=self._layout, server_round=number)

    def _spans(self, number: int) -> tuple[Span, ...]:
        """Where the parts that are sent lie, in the order of the encoding's own spans."""
        return self._layout.spans(self._method.sent(self._plan, number))

    def _part(self, number: int) -> SiteRound:
        """The round's state: as it is on the disk, where other processes may have answered last.

        Ray gives a site's next message to whichever of its actors is free.
        """
        version, held = self._files.version(number), self._rounds.get(number)
        if held is not None and held.version == version:
            return held.part
        dumped = self._files.read(number)
        if dumped is None:
            raise RoundUsed(f"this site has no keys for round {number}; it was not in it")
        part = SiteRound.restore(self._member, dumped)
        self._rounds[number] = _HeldRound(part, version)
        return part

    def _keep(self, part: SiteRound) -> None:
        self._files.write(part.number, part.dump())
        self._rounds[part.number] = _HeldRound(part, self._files.version(part.number))

    def _advertised(self, number: int) -> Public:
        """Keys of a round: those that are out, or fresh ones if a cohort with them came to nothing."""
        key = ReleaseKey(self._member.run, number, "update")
        try:
            part = self._part(number)
            fresh = part.stage is Stage.SHARED
        except RoundUsed:
            part, fresh = None, True
        if (part and part.stage > Stage.SHARED) or self._gate.recall(key) is not None:
            raise RoundUsed(f"this site's update of round {number} is out")
        if part is None or fresh:
            part = SiteRound.begin(self._member, number)
            self._keep(part)
        self._forget(number)
        return Public(part.advertisement().to_bytes(), _PROTOCOL)

    def _shared(self, number: int, cohort: bytes) -> Public:
        try:
            before = self._part(number - 1)
        except RoundUsed:
            before = None
        seen = before.cohort.keys if before and before.stage > Stage.ADVERTISED else frozenset()
        part = self._part(number)
        sealed = part.share(cohort, seen=seen)
        self._keep(part)
        return Public(pack_named(sealed), _PROTOCOL)

    def _forget(self, number: int) -> None:
        """Only a round and the one before it are ever asked about."""
        self._files.prune(below=number - 1)
        self._rounds = {n: part for n, part in self._rounds.items() if n >= number - 1}

    def _encoded(self, part: SiteRound, update: RoundUpdate, noise: NoiseSource) -> Ring:
        """The update times its weight, with this site's share of the noise if it is shared."""
        members = part.cohort.members
        weight = weight_in(
            self._plan,
            declared_units=self._member.declared_units,
            largest=max(member.declared_units for member in members),
        )
        values = np.multiply(update.flat, weight.factor, dtype=np.float64)
        encoding = self._encoding(part.number)
        if update.missing_noise:
            stds = [update.missing_noise[span.part] for span in self._spans(part.number)]
            ring, cut = self._with_share(part.number, encoding, values, stds=stds, noise=noise)
        else:
            ring, cut = encoding.encode(values, noise)
        if cut:
            _log.warning("round %d: %d numbers of the update passed its bound", part.number, cut)
        return ring

    @property
    def _growth(self) -> float:
        """Standard deviation of a round's noise over that of what is fresh in it, at most."""
        return growth(self._plan.privacy.column, self._plan.rounds.number)

    def _with_share(
        self,
        number: int,
        encoding: Encoding,
        values: NDArray[np.float64],
        *,
        stds: Sequence[float],
        noise: NoiseSource,
    ) -> tuple[Ring, int]:
        """Encoded values with this site's share of the noise, and how many numbers were cut."""
        bands, column = self._plan.privacy.bands, self._plan.privacy.column
        if bands == 1:
            return encoding.encode_with_noise(values, stds, noise)
        memory = self._memory()
        earlier = rows_before(memory, number, bands=bands)
        back = taken_back(earlier, column=column, size=len(values))
        ring, cut, row = encoding.encode_with_row(
            values, stds, noise, back=back, growth=self._growth
        )
        keep_row(memory, number, row)
        return ring, cut
