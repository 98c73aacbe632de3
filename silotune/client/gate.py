"""The gate: the only door out of a site.

Every field of every reply is one of three things, and says which:

- `Public`: declared in the site's own configuration, fixed by the plan, or part of the protocol;
- `DpRelease`: an output of a mechanism whose privacy event is charged to the ledger with the reply;
- `Unprotected`: raw, and only under a plan whose ``privacy.mode`` is ``'none'``.

Anything else is stopped before it becomes bytes. What a private reply costs is charged before records
are touched for it (`Gate.charge`); its bytes are on the disk, in the outbox, before the ledger names
them, and returned after that. A crash leaves a charge without content, whose content may be made anew
because none ever left, or a charged reply that can be sent again: one read back from its bytes gives
records of the same content, to the last bit.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from flwr.app import RecordDict
from numpy.typing import NDArray
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from silotune.client.run_files import RunFiles
from silotune.errors import (
    PrivacyError,
    ReleaseConflict,
    SelfCheckFailed,
    SilotuneError,
    ValueUnaccounted,
)
from silotune.events import tracing
from silotune.plan.plan import Plan
from silotune.privacy.ledger import Ledger, ReleaseKey
from silotune.protocol.replies import RELEASED, Scalar, records_of
from silotune.trust.errors import SealBroken

if TYPE_CHECKING:
    from silotune.privacy.events import DpEvent


_SCALARS = "scalars"
_ARRAY = "array:"


@dataclass(frozen=True)
class Reply:
    """What a site says, as named arrays and named scalars."""

    arrays: dict[str, NDArray[Any]]
    scalars: dict[str, Scalar]

    def to_bytes(self) -> bytes:
        """A safetensors file: the arrays, and the scalars as a tensor of JSON text."""
        text = json.dumps(
            {name: _plain(value) for name, value in self.scalars.items()},
            sort_keys=True,
            allow_nan=False,
        )
        tensors = {_ARRAY + name: array for name, array in self.arrays.items()}
        tensors[_SCALARS] = np.frombuffer(text.encode(), dtype=np.uint8)
        return bytes(save_tensors(tensors))

    @classmethod
    def from_bytes(cls, payload: bytes) -> Reply:
        """Read what `to_bytes` wrote."""
        tensors = load_tensors(payload)
        scalars = json.loads(tensors.pop(_SCALARS).tobytes())
        return cls(
            arrays={name.removeprefix(_ARRAY): array for name, array in tensors.items()},
            scalars={name: _unplain(value) for name, value in scalars.items()},
        )

    def records(self) -> RecordDict:
        """The same as Flower's records: `silotune.protocol.replies.records_of`."""
        return records_of(self.arrays, self.scalars)


def _plain(value: Scalar) -> object:
    return {"bytes": base64.b64encode(value).decode()} if isinstance(value, bytes) else value


def _unplain(value: Any) -> Scalar:
    return base64.b64decode(value["bytes"]) if isinstance(value, dict) else value


_KEPT_ROUNDS = 3
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
    outbox : RunFiles
        Stored replies of the run, so that one asked for again is the same bytes again. That one *is*
        there means nothing yet: the ledger knows the SHA-256 of what was released.

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
        outbox: RunFiles,
    ) -> None:
        if plan.private != (ledger is not None):
            raise PrivacyError("a private plan needs a ledger, and no other plan may have one")
        self._ledger = ledger
        self._dataset = dataset
        self._plan, self._plan_sha256 = plan, plan.sha256
        self._outbox = outbox

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
        payload = self._stored(key, digest)
        if payload is None:
            raise ReleaseConflict(f"the stored reply of {key} is gone or damaged")
        return Reply.from_bytes(payload).records()

    def released(self, key: ReleaseKey, *, since_opened: bool = False) -> str | None:
        """SHA-256 of the reply that was released under `key`, or None if there was none.

        `since_opened` is that of `Ledger.payload_of`.
        """
        self._require_own(key)
        if self._ledger is not None:
            return self._ledger.payload_of(key, since_opened=since_opened)
        return next(iter(self._digests(key)), None)

    def charge(self, key: ReleaseKey, mechanisms: Mapping[str, DpEvent]) -> bool:
        """Charge what a reply will cost, before records are touched for it.

        Under correlated noise an update costs what its block of rounds does, and that is charged once:
        the first of the block that is asked for pays for all of them.

        Returns
        -------
        bool
            False if it was charged before: whoever worked on it died, for nothing was released.

        Raises
        ------
        ReleaseConflict
            The key was charged with other mechanisms, or a later round of correlated noise before it.
        BudgetExceeded, ReservationInvalid, LedgerDamaged
            From the ledger. Nothing was charged.
        """
        from silotune.privacy.events import ComposedDpEvent

        self._require_own(key)
        if self._ledger is None:
            raise PrivacyError("there is no ledger to charge anything to")
        events = [mechanisms[name] for name in sorted(mechanisms)]
        event = events[0] if len(events) == 1 else ComposedDpEvent(events)
        together = self._plan.privacy.bands > 1 and key.release == "update"
        block = self._plan.block_of(key.round) if together else None
        return self._ledger.charge(self._dataset, key, self._plan_sha256, event, block=block)

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
            See `silotune.protocol.replies.records_of`.

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
            reply = self._account_for(fields, mechanisms)
            # From here on only these bytes exist, whatever happens to the caller's arrays.
            payload, records = reply.to_bytes(), reply.records()
            if mechanisms and self._ledger is not None:
                self.charge(key, mechanisms)
                self._bind(self._ledger, key, payload, beside)
            elif any(isinstance(given, Unprotected) for given in fields.values()):
                self._keep(key, payload, beside)
            return records

    def _bind(
        self,
        ledger: Ledger,
        key: ReleaseKey,
        payload: bytes,
        beside: Callable[[str], None] | None,
    ) -> None:
        digest = self._store(key, payload)
        try:
            if beside is not None:
                beside(digest)
            ledger.bind(self._dataset, key, digest)
        except Exception:
            # A failed commit may have reached the disk all the same: the ledger knows.
            if ledger.payload_of(key) != digest:
                self._outbox.remove(key.round, name=f"{key.release}-{digest}")
            raise
        self._outbox.prune(below=key.round - _KEPT_ROUNDS)

    def _keep(self, key: ReleaseKey, payload: bytes, beside: Callable[[str], None] | None) -> None:
        """Without a ledger the stored file itself is what was released."""
        stored = self._digests(key)
        if beside is not None and not stored:
            beside(hashlib.sha256(payload).hexdigest())
        digest = self._store(key, payload) if not stored else stored[0]
        if self._stored(key, digest) != payload:
            raise ReleaseConflict(f"{key} was released with other content")
        self._outbox.prune(below=key.round - _KEPT_ROUNDS)

    def _store(self, key: ReleaseKey, payload: bytes) -> str:
        """Write a reply to the disk; returns its SHA-256, in hex."""
        digest = hashlib.sha256(payload).hexdigest()
        self._outbox.write(key.round, payload, name=f"{key.release}-{digest}")
        return digest

    def _stored(self, key: ReleaseKey, digest: str) -> bytes | None:
        """The stored reply with this SHA-256, or None if it is gone or damaged."""
        try:
            payload = self._outbox.read(key.round, name=f"{key.release}-{digest}")
        except SealBroken:
            return None
        sound = payload is not None and hashlib.sha256(payload).hexdigest() == digest
        return payload if sound else None

    def _digests(self, key: ReleaseKey) -> list[str]:
        """SHA-256 of every reply stored under a key."""
        found = [name.rpartition("-") for name in self._outbox.names(key.round)]
        return [digest for release, _, digest in found if release == key.release]

    def _require_own(self, key: ReleaseKey) -> None:
        if key.run != self._outbox.run:
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
