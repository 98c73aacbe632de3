"""A site's signing key: Ed25519 (RFC 8032), made once, private to its owner."""

from __future__ import annotations

import hashlib
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from silotune.errors import EnvironmentFault
from silotune.privacy.durable import create_file, create_private_folder, require_private


def load_or_create(path: Path) -> Ed25519PrivateKey:
    """The key at `path` (PKCS #8 PEM, mode 0600); a new one if there is no file.

    Two processes that start at once end up with the same key.

    Raises
    ------
    FileExposed
        Other accounts of the machine may read or write it.
    EnvironmentFault
        The file is not an Ed25519 key.
    """
    if not path.exists():
        create_private_folder(path.parent)
        fresh = Ed25519PrivateKey.generate()
        create_file(path, fresh.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    require_private(path)
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except (ValueError, TypeError) as exc:
        raise EnvironmentFault(f"{path} is not a private key in PEM format") from exc
    if not isinstance(key, Ed25519PrivateKey):
        raise EnvironmentFault(f"{path} is not an Ed25519 key")
    return key


def fingerprint(key: Ed25519PublicKey) -> str:
    """SHA-256 of the raw public key, in hex: what two people compare over the telephone."""
    return hashlib.sha256(key.public_bytes_raw()).hexdigest()
