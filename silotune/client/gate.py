"""The gate: the only door out of a site.

Every field of every reply is one of three things, and says which:

- `Public`: declared in the site's own configuration, fixed by the plan, or part of the protocol;
- `DpRelease`: an output of a mechanism whose privacy event is charged to the ledger with the reply;
- `Unprotected`: raw, and only under a plan whose ``privacy.mode`` is ``'none'``.

Anything else is stopped before it becomes bytes. What a private reply costs is charged before records
are touched for it (`Gate.charge`); its bytes are on the disk before the ledger names them, and returned
after that. A crash leaves a charge without content, whose content may be made anew because none ever
left, or a charged reply that can be sent again.

A reply as plain values, as bytes on the disk, and as Flower records.

Both forms come from the same values by rules without choice: a reply read back from its bytes gives
records of the same content, to the last bit.

The outbox: stored replies, so that a reply asked for again is the same bytes again.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from numpy.typing import NDArray
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

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
from silotune.trust.errors import SealBroken
from silotune.trust.files import create_private_folder, replace_file, require_private
from silotune.trust.vault import Vault

if TYPE_CHECKING:
    from dp_accounting import DpEvent


Scalar = str | int | float | bool | bytes

RELEASED = "released"
"""The record of all scalars. Every array has a record of its own, named like its field."""

FLAT = "flat"
"""The one array of an array's record."""

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
        """Flower's records: one `ArrayRecord` an array, and ``released`` for the scalars.

        ``released`` is a `MetricRecord` if all scalars are numbers, otherwise a `ConfigRecord`.
        """
        records = RecordDict()
        for name in sorted(self.arrays):
            records[name] = ArrayRecord({FLAT: Array(self.arrays[name])})
        scalars = {name: self.scalars[name] for name in sorted(self.scalars)}
        numbers = {
            name: value
            for name, value in scalars.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        if len(numbers) == len(scalars):
            records[RELEASED] = MetricRecord({**numbers})
        else:
            records[RELEASED] = ConfigRecord({**scalars})
        return records


def _plain(value: Scalar) -> object:
    return {"bytes": base64.b64encode(value).decode()} if isinstance(value, bytes) else value


def _unplain(value: Any) -> Scalar:
    return base64.b64decode(value["bytes"]) if isinstance(value, dict) else value


_KEPT_ROUNDS = 3
_KEPT_SECONDS = 30 * 24 * 3600.0


class Outbox:
    """A folder of replies, one private file each, named by run, round, release and content.

    A file is complete and on the disk, or not there. That a file *is* there means nothing yet: what
    was released is for the caller to say (the ledger knows the SHA-256 it charged).

    Parameters
    ----------
    folder : Path
        In the site's state; made if missing.
    run : str
        The run that writes. Files of other runs are removed when they are a month old.
    vault : Vault or None
        Seals the files; without one they are written as they are.
    to_disk : bool
        Force files to the disk; False in simulations only.
    """

    def __init__(
        self, folder: Path, *, run: str, vault: Vault | None = None, to_disk: bool = True
    ) -> None:
        self._folder, self._vault, self._to_disk = folder, vault, to_disk
        # The id comes from the coordinator: its digest is a safe file name, it may not be.
        self._prefix = hashlib.sha256(run.encode()).hexdigest()[:16]
        create_private_folder(folder)
        self._remove_old_runs()

    def store(self, key: ReleaseKey, payload: bytes) -> str:
        """Write a reply to the disk; returns its SHA-256, in hex."""
        digest = hashlib.sha256(payload).hexdigest()
        path = self._path(key, digest)
        content = self._vault.seal(payload, name=path.name) if self._vault else payload
        replace_file(path, content, to_disk=self._to_disk)
        return digest

    def load(self, key: ReleaseKey, digest: str) -> bytes | None:
        """The stored reply with this SHA-256, or None if it is gone or damaged.

        Raises
        ------
        FileExposed
            Other accounts of the machine may read or write it.
        """
        path = self._path(key, digest)
        if not path.exists():
            return None
        require_private(path)
        payload = path.read_bytes()
        if self._vault:
            try:
                payload = self._vault.unseal(payload, name=path.name)
            except SealBroken:
                return None
        return payload if hashlib.sha256(payload).hexdigest() == digest else None

    def discard(self, key: ReleaseKey, digest: str) -> None:
        """Remove a reply that was not released after all."""
        self._path(key, digest).unlink(missing_ok=True)

    def stored(self, key: ReleaseKey) -> list[str]:
        """SHA-256 of every reply stored under `key`."""
        return sorted(
            path.stem.rpartition("-")[2] for path in self._folder.glob(f"{self._stem(key)}-*")
        )

    def prune(self, *, newest_round: int) -> None:
        """Remove this run's replies that are more than a few rounds old."""
        for path in self._folder.glob(f"{self._prefix}-*.safetensors"):
            if int(path.name.split("-")[1]) < newest_round - _KEPT_ROUNDS:
                path.unlink(missing_ok=True)

    def _stem(self, key: ReleaseKey) -> str:
        return f"{self._prefix}-{key.round:08d}-{key.release}"

    def _path(self, key: ReleaseKey, digest: str) -> Path:
        return self._folder / f"{self._stem(key)}-{digest}.safetensors"

    def _remove_old_runs(self) -> None:
        oldest = time.time() - _KEPT_SECONDS
        for path in self._folder.iterdir():
            if not path.name.startswith(self._prefix) and path.stat().st_mtime < oldest:
                path.unlink(missing_ok=True)


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
