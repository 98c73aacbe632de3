"""A hash chain and its head file: the rules, whatever the links are and wherever they are stored.

Every link carries the SHA-256 of the link before it, so an edited, removed or inserted one breaks the
chain. A chain that was cut at its end still is one; therefore the newest hash is kept a second time, in
the head file. A link is stored first and the head follows, both forced to the disk:

- a crash between the two leaves the chain exactly one link ahead, which is repaired;
- every other difference means that one of the two was rolled back, and nothing goes on from there.

Whoever restores *both* from one old backup is found out by heads that the other side has counter-signed.

A link's hash is that of the canonical JSON of its content with ``seq`` and ``previous``. The privacy
ledger stores links as rows (`silotune.privacy.ledger_table`), the audit log as lines
(`silotune.trust.audit`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from silotune.errors import LedgerDamaged, SilotuneError
from silotune.plan.document import canonical_json, text_sha256
from silotune.trust.files import create_file, create_private_folder, replace_file, require_private
from silotune.trust.identity import encode_signing_key
from silotune.trust.signed import Signing, decoded, encoded, fits

_SIGNING = Signing("silotune ledger head v1", "head", LedgerDamaged)

Value = str | int | float | bool | None | list[Any] | dict[str, Any]


@dataclass(frozen=True)
class Head:
    """A place in a chain: how many links, and the hash of the last."""

    seq: int
    hash: str

    def after(self, content: Mapping[str, Value]) -> Head:
        """The place behind a link with this content that is appended here.

        Raises
        ------
        ValueError, TypeError
            The content is no JSON value.
        """
        seq = self.seq + 1
        text = canonical_json({**content, "seq": seq, "previous": self.hash})
        return Head(seq, text_sha256(text))

    def signed_bytes(self) -> bytes:
        """What a counter-signature covers; `silotune.trust.audit.AuditHead` says whose log it is."""
        return _SIGNING.covered(f"{self.seq} {self.hash}")

    def sign(self, key: Ed25519PrivateKey) -> bytes:
        """Counter-sign this head, as the coordinator does a ledger's."""
        return key.sign(self.signed_bytes())


GENESIS = Head(0, "0" * 64)
"""The place before the first link."""


class Link(Protocol):
    """A row, or a line."""

    @property
    def previous(self) -> str:
        """Hash of the link before it."""

    @property
    def head(self) -> Head:
        """Where a chain ends that ends with this link."""

    @property
    def content(self) -> Mapping[str, Value]:
        """All that it says, but for its place."""


L = TypeVar("L", bound=Link)


class Signable(Protocol):
    """A head that the other side signs."""

    def signed_bytes(self) -> bytes:
        """What the signature covers."""


class Chain:
    """A chain as far as this process has followed it, and its head file.

    Parameters
    ----------
    path : Path
        The file with the links; the head lies beside it as ``<name>.head``. Both have mode 0600.
    called, part : str
        What the whole and a link are called in errors: ``"ledger"`` and ``"row"``.
    damaged : type of SilotuneError
        Raised for every contradiction.

    Attributes
    ----------
    end : Head
        Where the links end that were taken.
    """

    def __init__(self, path: Path, *, called: str, part: str, damaged: type[SilotuneError]) -> None:
        self.path, self.head_path = path, path.with_name(path.name + ".head")
        self._called, self._part, self.damaged = called, part, damaged
        self.end = GENESIS
        self._settled = [GENESIS]  # where the head file is, unless a process crashed
        self._possible = [GENESIS]  # and where else a crash may have left it

    def prepare(self, *, create: bool, to_disk: bool = True) -> None:
        """See that both files are there and private; start an empty chain if there is none."""
        has_links, has_head = self.path.exists(), self.head_path.exists()
        if not has_links and not has_head:
            if not create:
                raise self.damaged(
                    f"there is no {self._called} at {self.path}",
                    remedy=f"Check the path of the {self._called}.",
                )
            create_private_folder(self.path.parent, to_disk=to_disk)
            # The head comes first: links without a head are then never the work of a crash.
            create_file(self.head_path, _head_bytes(GENESIS), to_disk=to_disk)
        elif not has_head:
            raise self.damaged(f"{self.head_path} is missing")
        if not self.path.exists():
            if self.read_head() != GENESIS:
                raise self.damaged(f"{self.path} is missing, and its head is not that of a new one")
            create_file(self.path, b"", to_disk=to_disk)
        require_private(self.path)
        require_private(self.head_path)

    def take(self, link: Link, *, waited: bool = True) -> None:
        """Follow the chain by one link. `waited`: it was on the disk before anybody was told of it."""
        self.end = self._behind(self.end, link)
        if waited:
            self._possible, self._settled = [*self._settled, self.end], [self.end]
        else:
            self._settled.append(self.end)
            self._possible = self._settled

    def checked(self, links: Iterable[L]) -> Iterator[L]:
        """The links of a whole chain, each checked before it is given."""
        end = GENESIS
        for link in links:
            end = self._behind(end, link)
            yield link

    def agrees(self) -> bool:
        """Whether the head file says what was followed; False after a crash, and it is to be written."""
        head = self.read_head()
        if head not in self._possible:
            raise self.damaged(
                f"{self.path} ends at {self._part} {self.end.seq} but its head file says "
                f"{self._part} {head.seq}: one of the two was cut, edited or rolled back"
            )
        return head in self._settled

    def read_head(self) -> Head:
        """What the head file says."""
        try:
            found = json.loads(self.head_path.read_bytes())
            return Head(int(found["seq"]), str(found["hash"]))
        except (OSError, ValueError, KeyError, TypeError) as exc:
            raise self.damaged(f"{self.head_path} is missing or not a head file") from exc

    def write_head(self, *, to_disk: bool = True) -> None:
        """Bring the head file to the end."""
        replace_file(self.head_path, _head_bytes(self.end), to_disk=to_disk)

    def require_signed(self, head: Signable, signature: bytes, key: Ed25519PublicKey) -> None:
        """Refuse a counter-signature that is none."""
        if not fits(signature, head.signed_bytes(), key):
            raise self.damaged("the counter-signature does not fit the head")

    def require_passed(self, seq: int, signed: str, found: str) -> None:
        """Refuse a chain that has another hash, or none, at a place that was counter-signed."""
        if found != signed:
            raise self.damaged(
                f"{self.path}: {self._part} {seq}, which the other side counter-signed, is not there"
            )

    def _behind(self, end: Head, link: Link) -> Head:
        """The place behind a link, if it follows there."""
        try:
            behind = end.after(link.content)
            if link.previous == end.hash and link.head == behind:
                return behind
        except (ValueError, TypeError):
            pass
        raise self.damaged(f"{self.path}: the hash chain is broken at {self._part} {end.seq + 1}")


def signature_fields(signature: bytes, key: Ed25519PublicKey) -> dict[str, str]:
    """A counter-signature as it is stored."""
    return {"signature": encoded(signature), "key": encode_signing_key(key)}


def require_counter_signature(
    head: Signable, fields: Mapping[str, Value], *, trusted: Ed25519PublicKey | None
) -> None:
    """Check a counter-signature that was stored.

    Raises
    ------
    ValueError
        There is none, it is wrong, or it is of another key than `trusted`.
    """
    try:
        raw, signature = decoded(str(fields["key"])), str(fields["signature"])
    except KeyError as exc:
        raise ValueError("no counter-signature") from exc
    if trusted is not None and raw != trusted.public_bytes_raw():
        raise ValueError("its counter-signature is of another key")
    if not fits(signature, head.signed_bytes(), raw):
        raise ValueError("its counter-signature is not valid")


def _head_bytes(head: Head) -> bytes:
    return json.dumps(asdict(head)).encode() + b"\n"
