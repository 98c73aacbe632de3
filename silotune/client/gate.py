"""The gate: the only door out of a site.

Every field of every reply is one of three things, and says which:

- `Public`: declared in the site's own configuration, fixed by the plan, or part of the protocol;
- `DpRelease`: an output of a mechanism whose privacy event is charged to the ledger with the reply;
- `Unprotected`: raw, and only under a plan whose ``privacy.mode`` is ``'none'``.

Anything else is stopped before it becomes bytes. What a private reply costs is charged before records
are touched for it (`Gate.charge`); its bytes are on the disk before the ledger names them, and returned
after that. A crash leaves a charge without content, whose content may be made anew because none ever
left, or a charged reply that can be sent again.
"""

from __future__ import annotations

import hashlib
import logging
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from flwr.app import RecordDict
from numpy.typing import NDArray

from silotune.client.outbox import Outbox
from silotune.client.reply import RELEASED, Reply, Scalar
from silotune.errors import (
    PrivacyError,
    ReleaseConflict,
    SelfCheckFailed,
    SilotuneError,
    ValueUnaccounted,
)
from silotune.events import tracing
from silotune.federation.sealed import Vault
from silotune.plan import Plan
from silotune.privacy.ledger import Ledger, ReleaseKey

if TYPE_CHECKING:
    from dp_accounting import DpEvent

_log = logging.getLogger(__name__)

_SOURCE = re.compile(r"(plan|site\.toml|protocol): \S.*")
_FIELD = re.compile(r"[a-z][a-z0-9_-]{0,63}")
_CODE = re.compile(r"ST-[0-9]{3}")
_INT64 = 2**63
_NOTHING: Mapping[str, DpEvent] = {}


@dataclass(frozen=True)
class Public:
    """A value that is no secret, and where that is laid down.

    Parameters
    ----------
    value : str, int, float, bool or bytes
        Never an array: nothing of that size is declared by hand.
    source : str
        ``"site.toml: …"``, ``"plan: …"`` or ``"protocol: …"``.
    """

    value: Scalar
    source: str


@dataclass(frozen=True)
class DpRelease:
    """An output of a differentially private mechanism.

    Parameters
    ----------
    value : ndarray, float or int
        The noisy value.
    mechanism : str
        Which of the reply's mechanisms made it; several values may be parts of one output.
    """

    value: NDArray[Any] | float | int
    mechanism: str


@dataclass(frozen=True)
class Unprotected:
    """A value without any protection, for plans that ask for none."""

    value: NDArray[Any] | Scalar


Field = Public | DpRelease | Unprotected


class Gate:
    """Builds every reply of one run at one site.

    Parameters
    ----------
    ledger : Ledger or None
        None exactly if the plan is not private.
    dataset : str
        The dataset's key in the ledger.
    plan : Plan
        The approved plan.
    run : str
        The run's id.
    outbox : Path
        Folder for stored replies, in the site's state.
    vault : Vault or None
        Seals the stored replies.
    to_disk : bool
        Force stored replies to the disk; False in simulations only.

    Raises
    ------
    PrivacyError
        A private plan without a ledger, or a ledger that nothing would be charged to.
    """

    def __init__(
        self,
        *,
        ledger: Ledger | None,
        dataset: str,
        plan: Plan,
        run: str,
        outbox: Path,
        vault: Vault | None = None,
        to_disk: bool = True,
    ) -> None:
        if plan.private != (ledger is not None):
            raise PrivacyError("a private plan needs a ledger, and no other plan may have one")
        self._ledger = ledger
        self._dataset = dataset
        self._plan_sha256 = plan.sha256
        self._run = run
        self._outbox = Outbox(outbox, run=run, vault=vault, to_disk=to_disk)

    def recall(self, key: ReleaseKey) -> RecordDict | None:
        """The reply that was released under `key` before, or None if there was none.

        Ask before training: a repeated request is answered with the same bytes, free of charge.
        Replies of public values only are not kept.

        Raises
        ------
        ReleaseConflict
            The key was charged and its stored reply is gone or damaged.
        """
        digest = self.released(key)
        if digest is None:
            return None
        payload = self._outbox.load(key, digest)
        if payload is None:
            raise ReleaseConflict(f"the stored reply of {key} is gone or damaged")
        return Reply.from_bytes(payload).records()

    def released(self, key: ReleaseKey) -> str | None:
        """SHA-256 of the reply that was released under `key`, or None if there was none."""
        self._require_own(key)
        if self._ledger is not None:
            return self._ledger.payload_of(key)
        return next(iter(self._outbox.stored(key)), None)

    def charge(self, key: ReleaseKey, mechanisms: Mapping[str, DpEvent]) -> bool:
        """Charge what a reply will cost, before records are touched for it.

        Returns
        -------
        bool
            False if it was charged before: whoever worked on it died, for nothing was released.

        Raises
        ------
        ReleaseConflict
            The key was charged with other mechanisms.
        BudgetExceeded, ReservationInvalid, LedgerDamaged
            From the ledger. Nothing was charged.
        """
        from dp_accounting import ComposedDpEvent

        self._require_own(key)
        if self._ledger is None:
            raise PrivacyError("there is no ledger to charge anything to")
        events = [mechanisms[name] for name in sorted(mechanisms)]
        event = events[0] if len(events) == 1 else ComposedDpEvent(events)
        return self._ledger.charge(self._dataset, key, self._plan_sha256, event)

    def release(
        self,
        key: ReleaseKey,
        *,
        fields: Mapping[str, Field],
        mechanisms: Mapping[str, DpEvent] = _NOTHING,
        beside: Callable[[str], None] | None = None,
    ) -> RecordDict:
        """Account for every field, charge and store the reply, and only then hand it out.

        Parameters
        ----------
        key : ReleaseKey
            Of this gate's run.
        fields : mapping of name to Public, DpRelease or Unprotected
            All that the reply says.
        mechanisms : mapping of name to DpEvent
            Every mechanism that ran for this reply, with its whole event: charged together, once,
            under `key`. Each must have an output among the fields, and each `DpRelease` names one.
        beside : callable, optional
            Given the SHA-256 of the reply right before it is released: keeps what must be there if,
            and only if, the reply is.

        Returns
        -------
        RecordDict
            See `Reply.records`.

        Raises
        ------
        ValueUnaccounted
            A field or mechanism that is not accounted for. Nothing was stored or charged.
        SelfCheckFailed
            A value is NaN or infinite. Nothing was stored or charged.
        ReleaseConflict
            The key was used for other content.
        BudgetExceeded, ReservationInvalid, LedgerDamaged
            From the ledger. Nothing was released.
        """
        self._require_own(key)
        with tracing.span("release", run=key.run, round=key.round):
            # From here on only these bytes exist, whatever happens to the caller's arrays.
            payload = self._account_for(fields, mechanisms).to_bytes()
            if mechanisms and self._ledger is not None:
                self.charge(key, mechanisms)
                self._bind(self._ledger, key, payload, beside)
            elif any(isinstance(given, Unprotected) for given in fields.values()):
                self._keep(key, payload, beside)
            return Reply.from_bytes(payload).records()

    def _bind(
        self,
        ledger: Ledger,
        key: ReleaseKey,
        payload: bytes,
        beside: Callable[[str], None] | None,
    ) -> None:
        digest = self._outbox.store(key, payload)
        try:
            if beside is not None:
                beside(digest)
            ledger.bind(self._dataset, key, digest)
        except Exception:
            # A failed commit may have reached the disk all the same: the ledger knows.
            if ledger.payload_of(key) != digest:
                self._outbox.discard(key, digest)
            raise
        self._outbox.prune(newest_round=key.round)

    def _keep(self, key: ReleaseKey, payload: bytes, beside: Callable[[str], None] | None) -> None:
        """Without a ledger the stored file itself is what was released."""
        stored = self._outbox.stored(key)
        if beside is not None and not stored:
            beside(hashlib.sha256(payload).hexdigest())
        digest = self._outbox.store(key, payload) if not stored else stored[0]
        if self._outbox.load(key, digest) != payload:
            raise ReleaseConflict(f"{key} was released with other content")
        self._outbox.prune(newest_round=key.round)

    def _require_own(self, key: ReleaseKey) -> None:
        if key.run != self._run:
            raise ValueUnaccounted("a release belongs to another run than its gate")

    def _account_for(self, fields: Mapping[str, Field], mechanisms: Mapping[str, DpEvent]) -> Reply:
        reply = Reply(arrays={}, scalars={})
        for name, given in fields.items():
            if not _FIELD.fullmatch(name):
                raise ValueUnaccounted("a field's name is not a short lower-case word")
            self._require_accounted(name, given, mechanisms)
            value = _checked(name, given.value)
            if not isinstance(value, np.ndarray):
                reply.scalars[name] = value
            elif name == RELEASED:
                raise ValueUnaccounted(f"an array can't be called {RELEASED!r}")
            else:
                reply.arrays[name] = value
        used = {given.mechanism for given in fields.values() if isinstance(given, DpRelease)}
        for name in sorted(mechanisms.keys() - used):
            raise ValueUnaccounted(f"mechanism {name!r} has no output among the fields")
        return reply

    def _require_accounted(
        self, name: str, given: object, mechanisms: Mapping[str, DpEvent]
    ) -> None:
        match given:
            case Public(value=value, source=source):
                if not isinstance(value, Scalar):
                    raise ValueUnaccounted(f"{name!r}: only a scalar can be public")
                if not isinstance(source, str) or not _SOURCE.fullmatch(source):
                    raise ValueUnaccounted(f"{name!r} does not say where it is declared public")
            case DpRelease(mechanism=mechanism):
                if self._ledger is None:
                    raise ValueUnaccounted(f"{name!r}: there is no ledger to charge it to")
                if mechanism not in mechanisms:
                    raise ValueUnaccounted(f"{name!r}: no event is given for its mechanism")
            case Unprotected():
                if self._ledger is not None:
                    raise ValueUnaccounted(f"{name!r} is unprotected, and the plan is private")
            case _:
                raise ValueUnaccounted(f"{name!r} is a bare {type(given).__name__}")


def refusal(error: Exception) -> str:
    """The code of an error, which is all of it that may leave; the rest goes to the local log.

    Returns
    -------
    str
        ``"ST-…"``; ``"ST-000"`` for anything that is not one of silotune's own errors.
    """
    _log.error("refused: %s", error, exc_info=error)
    code = error.code if isinstance(error, SilotuneError) else SilotuneError.code
    return code if _CODE.fullmatch(code) else SilotuneError.code


def _checked(name: str, value: object) -> NDArray[Any] | Scalar:
    """A value of a kind that both the disk and the wire keep exactly, or an error."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "fiu":
            raise ValueUnaccounted(f"{name!r}: an array of {value.dtype} can't leave")
        finite = bool(np.isfinite(value).all())
        value = np.ascontiguousarray(value, dtype=value.dtype.newbyteorder("<"))
    elif isinstance(value, int) and not -_INT64 <= value < _INT64:
        raise ValueUnaccounted(f"{name!r}: an integer beyond 64 bits can't leave")
    elif isinstance(value, Scalar):
        finite = not isinstance(value, float) or math.isfinite(value)
    else:
        raise ValueUnaccounted(f"{name!r}: a {type(value).__name__} can't leave")
    if not finite:
        raise SelfCheckFailed(f"{name!r} holds NaN or infinity")
    return value
