"""What a named person signs when an adapter leaves: terms and numbers, and the hashes of every file.

A machine-readable record of the criteria that were applied, tied to the output they were applied to, as
output-checking standards ask (SATRE 2.0, 3.3.07 and 3.3.09).
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Annotated, Literal

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from silotune.privacy.durable import file_sha256, replace_file
from silotune.privacy.signing import fingerprint
from silotune.release.errors import ReleaseInvalid

RELEASE_FILE = "release.json"
_CONTEXT = b"silotune release v1\0"

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Holder = Literal["engineer", "sites", "consortium", "person"]
ControlName = Literal[
    "adapter", "plan", "certificates", "audit", "membership", "memorisation", "signature"
]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Control(_Part):
    """One control, who holds it, and what it came to.

    Attributes
    ----------
    name : str
        Which one.
    held_by : str
        Who can make it pass or fail.
    passed : bool or None
        None where it does not apply.
    figures : mapping of str to number
        What was compared with what.
    """

    name: ControlName
    held_by: Holder
    passed: bool | None
    figures: dict[str, float] = {}


class Statement(_Part):
    """Everything that is signed.

    Attributes
    ----------
    files : mapping of str to SHA-256
        Every file of the adapter's folder.
    certificates : mapping of str to SHA-256
        Every site's certificate, by the name of the site.
    """

    format: Literal["silotune release 1"] = "silotune release 1"
    run: str
    plan_sha256: Sha256
    files: dict[str, Sha256]
    certificates: dict[str, Sha256]
    controls: tuple[Control, ...]
    person: Annotated[str, Field(min_length=1, max_length=200)]
    role: Annotated[str, Field(min_length=1, max_length=200)]
    code_version: str
    time: str


def hashes_of(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, by its path in it."""
    return {
        path.relative_to(folder).as_posix(): file_sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def sign(statement: Statement, path: Path, *, key: Ed25519PrivateKey) -> None:
    """Write the signed statement, readable by all: it goes where the adapter goes."""
    document = {
        "release": statement.model_dump(mode="json"),
        "signature": base64.b64encode(key.sign(_signed_bytes(statement))).decode(),
        "key": base64.b64encode(key.public_key().public_bytes_raw()).decode(),
    }
    replace_file(path, json.dumps(document, indent=2).encode() + b"\n", mode=0o644)


def read(path: Path) -> tuple[Statement, str]:
    """The statement in a file, once its signature fits, and the fingerprint of who signed.

    Raises
    ------
    ReleaseInvalid
        It is no signed release, or was changed.
    """
    try:
        document = json.loads(path.read_bytes())
        statement = Statement.model_validate_json(json.dumps(document["release"]))
        key = Ed25519PublicKey.from_public_bytes(base64.b64decode(document["key"], validate=True))
        signature = base64.b64decode(document["signature"], validate=True)
        key.verify(signature, _signed_bytes(statement))
    except OSError as exc:
        raise ReleaseInvalid(f"{path}: {exc.strerror}") from exc
    except InvalidSignature as exc:
        raise ReleaseInvalid(f"{path}: the signature does not fit what it says") from exc
    except (ValueError, KeyError, TypeError, ValidationError) as exc:
        raise ReleaseInvalid(f"{path} is not a signed release") from exc
    return statement, fingerprint(key)


def _signed_bytes(statement: Statement) -> bytes:
    content = statement.model_dump(mode="json")
    return _CONTEXT + json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
