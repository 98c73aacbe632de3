"""Signed documents: everything that a site, the coordinator or a person signs, in one way.

A signature is Ed25519 (RFC 8032) over a context and the content. The context says what kind of thing is
signed, so that a signature of one kind counts for no other. What is signed as a text is verified as that
text: first the signature over the bytes that came, then that they are the canonical form of what they
say (`silotune.plan.document`), so that nobody reads two things out of one signed text.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import Field, ValidationError

from silotune.errors import PlanSignatureInvalid, SilotuneError
from silotune.plan.document import Document, canonical_json
from silotune.plan.plan import Plan
from silotune.trust.files import replace_file
from silotune.trust.identity import encode_signing_key

KeyText = Annotated[str, Field(pattern=r"^[A-Za-z0-9+/]{43}=$")]
SignatureText = Annotated[str, Field(pattern=r"^[A-Za-z0-9+/]{86}==$")]
SignedText = Annotated[str, Field(max_length=4 << 20)]

_MOST_FILE_BYTES = 4 << 20

D = TypeVar("D", bound=Document)


def encoded(raw: bytes) -> str:
    """Base64 of a signature."""
    return base64.b64encode(raw).decode()


def decoded(text: str) -> bytes:
    """Read what `encoded` wrote, and nothing else. Raises `ValueError`."""
    return base64.b64decode(text, validate=True)


def fits(signature: bytes | str, covered: bytes, key: Ed25519PublicKey | bytes) -> bool:
    """Whether this key, raw or not, signed these bytes; the signature is raw or in base64."""
    try:
        signature = decoded(signature) if isinstance(signature, str) else signature
        public = Ed25519PublicKey.from_public_bytes(key) if isinstance(key, bytes) else key
        public.verify(signature, covered)
    except (InvalidSignature, ValueError):
        return False
    return True


@dataclass(frozen=True)
class Signing:
    """How one kind of thing is signed.

    Attributes
    ----------
    context : str
        What is signed before every content of this kind.
    noun : str
        What it is called, in messages and as the key of its file.
    refused : type of SilotuneError
        Raised for one that does not hold.
    """

    context: str
    noun: str
    refused: type[SilotuneError]

    def covered(self, content: str | bytes) -> bytes:
        """The bytes that a signature covers."""
        content = content.encode() if isinstance(content, str) else content
        return self.context.encode() + b"\0" + content

    def sign(self, content: str | bytes, key: Ed25519PrivateKey) -> bytes:
        """A signature, 64 bytes."""
        return key.sign(self.covered(content))

    def require(self, content: str | bytes, signature: bytes | str, key: Ed25519PublicKey) -> None:
        """Refuse a content that `key` did not sign."""
        if not fits(signature, self.covered(content), key):
            raise self.refused(f"the signature does not fit the {self.noun}")

    # --- a text and its signature ---

    def sign_text(self, document: Document, key: Ed25519PrivateKey) -> dict[str, str]:
        """The canonical text, by its noun, and the signature over it."""
        text = document.canonical()
        return {self.noun: text, "signature": encoded(self.sign(text, key))}

    def read_text(
        self, model: type[D], text: str, signature: str, *, trusted: Ed25519PublicKey
    ) -> D:
        """What a signed text says.

        Raises
        ------
        SilotuneError
            `trusted` did not sign it, it is no such document, or not in its canonical form.
        """
        self.require(text, signature, trusted)
        try:
            document = model.from_canonical(text)
        except ValidationError as exc:
            raise self.refused(f"what is signed is no {self.noun} of this version") from exc
        if document.canonical() != text:
            raise self.refused(f"the signed text is not the {self.noun}'s canonical form")
        return document

    # --- a file for everybody, with the key that signed it ---

    def write_file(self, path: Path, document: Document, key: Ed25519PrivateKey) -> None:
        """Write a signed document, readable by all: it is made to be handed out."""
        content = document.written()
        signed = {
            self.noun: content,
            "signature": encoded(self.sign(canonical_json(content), key)),
            "key": encode_signing_key(key.public_key()),
        }
        replace_file(path, json.dumps(signed, indent=2).encode() + b"\n", mode=0o644)

    def read_file(self, path: Path, model: type[D]) -> tuple[D, Ed25519PublicKey]:
        """What `write_file` wrote, and who signed it: that is for the reader to judge."""
        try:
            with path.open("rb") as file:
                content = file.read(_MOST_FILE_BYTES + 1)
        except OSError as exc:
            raise self.refused(f"{path}: {exc.strerror}") from exc
        return self.read_content(content, model, called=str(path))

    def read_content(
        self, content: bytes, model: type[D], *, called: str
    ) -> tuple[D, Ed25519PublicKey]:
        """`read_file` for what is no file; errors call it what you say."""
        try:
            if len(content) > _MOST_FILE_BYTES:
                raise ValueError("too large")
            signed = json.loads(content, object_pairs_hook=_without_doubles)
            if set(signed) != {self.noun, "signature", "key"}:
                raise ValueError("other keys")
            text = canonical_json(signed[self.noun])
            signature = str(signed["signature"])
            key = Ed25519PublicKey.from_public_bytes(decoded(signed["key"]))
        except (ValueError, TypeError, RecursionError) as exc:
            raise self.refused(f"{called} is not a signed {self.noun}") from exc
        if not fits(signature, self.covered(text), key):
            raise self.refused(f"{called}: the signature does not fit what it says")
        try:
            return model.model_validate_json(text), key
        except ValidationError as exc:
            places = ", ".join(".".join(map(str, error["loc"])) for error in exc.errors())
            raise self.refused(f"{called}: missing, unknown or wrong: {places}") from exc


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is given twice")
    return found


_PLAN = Signing("silotune plan v1", "plan", PlanSignatureInvalid)


class SignedPlan(Document):
    """A plan's canonical text and the signature of the federation's key over it."""

    plan: SignedText
    signature: SignatureText
    key: KeyText

    @classmethod
    def sign(cls, plan: Plan, key: Ed25519PrivateKey) -> Self:
        """Sign the canonical text."""
        return cls(**_PLAN.sign_text(plan, key), key=encode_signing_key(key.public_key()))

    def verify(self, trusted: Ed25519PublicKey) -> Plan:
        """The plan, if `trusted` signed it. Raises `PlanSignatureInvalid`, `PlanInvalid`."""
        if self.key != encode_signing_key(trusted):
            raise PlanSignatureInvalid("the plan says that another key signed it")
        return _PLAN.read_text(Plan, self.plan, self.signature, trusted=trusted)
