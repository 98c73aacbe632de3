"""Files at rest: sealed with AES-256-GCM under a key that is kept elsewhere.

A folder's data key is random and lies in it wrapped by what opens the vault: a key file, or a
passphrase stretched with scrypt (RFC 7914). Each sealed file has a key of its own (HKDF-SHA256 with a
random salt), so that no number of files wears a key out, and its name is authenticated, so that two
files can't be exchanged. A disk that is stolen without the key file or passphrase gives nothing away.

What opens a vault can be changed: `Vault.reseal` wraps the same data key under the new secret, beside
the old wrapping. Both open it until the first start with the new one, which ends the old
(`Vault.end_previous`): whatever crashes between file and configuration, one of them fits.
"""

from __future__ import annotations

import base64
import json
import os
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Self

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt
from pydantic import Field, model_validator

from silotune.errors import FileExposed
from silotune.plan.sections import Section
from silotune.trust.errors import SealBroken, VaultLocked
from silotune.trust.files import create_file, create_private_folder, replace_file, require_private

VAULT_FILE = "vault.json"
"""The wrapped data key, in the folder whose files it seals."""

KEY_FILE = "vault.key"
"""The key file of a vault whose configuration names no other."""

_MAGIC = b"silotune sealed 1\n"
_WRAP = b"silotune vault key v1"
_SALT, _NONCE, _KEY = 16, 12, 32
_SCRYPT = {"n": 2**15, "r": 8, "p": 1}  # 32 MB and some 0.1 s a guess
_LARGEST_SCRYPT = 2**17
_SHORTEST_PASSPHRASE = 12

PathText = Annotated[str, Field(min_length=1)]


class AtRest(Section):
    """``[at_rest]`` of site.toml and coordinator.toml: what opens the sealed files.

    Attributes
    ----------
    key_file : str or None
        A file of random bytes, made at the first start. Keep it on another disk than the state.
    passphrase_file : str or None
        A file whose first line is a passphrase; ``${CREDENTIALS_DIRECTORY}`` is systemd's.
    passphrase_env : str or None
        Name of an environment variable that a service manager sets.
    """

    key_file: PathText | None = None
    passphrase_file: PathText | None = None
    passphrase_env: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        given = [name for name, value in self if value is not None]
        if len(given) > 1:
            raise ValueError(f"give one of {' and '.join(given)}, not both")
        return self


class Vault:
    """Seals and opens the files of one folder. Safe for many threads and processes.

    Parameters
    ----------
    folder : Path
        Where the wrapped key is; made if missing.
    at_rest : AtRest
        What opens it; by default a key file in the folder itself, which protects against a copied
        file but not against a stolen disk.
    base : Path, optional
        Folder that relative paths of `at_rest` start from; `folder` if not given.
    to_disk : bool
        Force what is made to the disk; False in simulations only.

    Raises
    ------
    VaultLocked
        The key file or passphrase is missing or wrong.
    FileExposed
        Other accounts of the machine may read the key file, the passphrase or the wrapped key.
    """

    def __init__(
        self,
        folder: Path,
        at_rest: AtRest | None = None,
        *,
        base: Path | None = None,
        to_disk: bool = True,
    ) -> None:
        self.folder, self.to_disk = folder, to_disk
        create_private_folder(folder, to_disk=to_disk)
        require_private(folder)
        self._path = folder / VAULT_FILE
        exists = self._path.exists()
        secret, kind = _secret(at_rest or AtRest(), folder, base or folder, exists, to_disk)
        if not exists:
            made = _vault_file(_wrapped(os.urandom(_KEY), secret, kind))
            create_file(self._path, made, to_disk=to_disk)
        require_private(self._path)
        self._data_key, self._opened = _unwrapped(self._path, secret, kind)
        self._lock = threading.Lock()

    @property
    def opened_by(self) -> str:
        """What the vault was opened with: ``passphrase`` or ``key file``."""
        return str(self._opened["opened_by"])

    def reseal(self, at_rest: AtRest, *, base: Path) -> str:
        """Let another secret open the vault, beside the one it was opened with.

        Parameters
        ----------
        at_rest : AtRest
            The new secret; a key file that isn't there is made.
        base : Path
            Folder that relative paths of `at_rest` start from.

        Returns
        -------
        str
            Its kind.

        Raises
        ------
        VaultLocked, FileExposed
            The new secret can't be read, is too short, or is open to others. Nothing was changed.
        """
        secret, kind = _secret(at_rest, self.folder, base, exists=False)
        wrapped = _wrapped(self._data_key, secret, kind)
        replace_file(self._path, _vault_file(wrapped, previous=self._opened))
        return kind

    def end_previous(self) -> bool:
        """After `reseal`, and opened by the new secret: have the old one open nothing any more.

        Returns
        -------
        bool
            Whether there was an old one to end.
        """
        newest, *previous = _heads(self._path)
        if not previous or newest != self._opened:
            return False
        replace_file(self._path, _vault_file(newest))
        return True

    def seal(self, content: bytes, *, name: str) -> bytes:
        """Encrypt; only this vault opens the result, and only under the same name."""
        salt, nonce = os.urandom(_SALT), os.urandom(_NONCE)
        sealed = AESGCM(self._file_key(salt, name)).encrypt(nonce, content, _MAGIC)
        return _MAGIC + salt + nonce + sealed

    def unseal(self, sealed: bytes, *, name: str) -> bytes:
        """Decrypt what `seal` made.

        Raises
        ------
        SealBroken
            It was changed, has another name, or was sealed by another vault.
        """
        start = len(_MAGIC) + _SALT + _NONCE
        if not sealed.startswith(_MAGIC) or len(sealed) < start:
            raise SealBroken(f"{name} is not a sealed file")
        salt, nonce = sealed[len(_MAGIC) : start - _NONCE], sealed[start - _NONCE : start]
        try:
            key = self._file_key(salt, name)
            return AESGCM(key).decrypt(nonce, memoryview(sealed)[start:], _MAGIC)
        except InvalidTag:
            raise SealBroken(f"{name} was changed, or belongs to another name or vault") from None

    def write(self, path: Path, content: bytes) -> None:
        """Seal `content` into the file `path`: after a crash it holds the old or the new, whole."""
        create_private_folder(path.parent)
        sealed = self.seal(content, name=path.name)
        with self._lock:  # a path has one writer at a time
            replace_file(path, sealed)

    def read(self, path: Path) -> bytes:
        """Content of a sealed file.

        Raises
        ------
        SealBroken
            It was changed, renamed, or sealed by another vault.
        FileExposed
            Other accounts of the machine may read or write it.
        FileNotFoundError
            There is no such file.
        """
        require_private(path)
        return self.unseal(path.read_bytes(), name=path.name)

    def _file_key(self, salt: bytes, name: str) -> bytes:
        return _derive(self._data_key, salt, b"file " + name.encode())


def _secret(
    at_rest: AtRest, folder: Path, base: Path, exists: bool, to_disk: bool = True
) -> tuple[bytes, str]:
    """What opens the vault, and its kind: ``passphrase`` or ``key file``.

    A key file that isn't there is made, unless the vault exists: then it is lost.
    """
    if at_rest.passphrase_env is not None:
        name = at_rest.passphrase_env
        return _passphrase(os.environ.get(name, ""), f"environment variable {name}"), "passphrase"
    if at_rest.passphrase_file is not None:
        path = _path(at_rest.passphrase_file, base)
        lines = _read_private(path).decode("utf-8", "replace").splitlines()
        return _passphrase(lines[0] if lines else "", str(path)), "passphrase"
    path = _path(at_rest.key_file, base) if at_rest.key_file else folder / KEY_FILE
    if not path.exists() and not exists:
        create_private_folder(path.parent, to_disk=to_disk)
        create_file(path, os.urandom(_KEY).hex().encode() + b"\n", to_disk=to_disk)
    content = _read_private(path).strip()
    if len(content) < _KEY:
        raise VaultLocked(f"{path} is too short for a key file")
    return content, "key file"


def _path(text: str, base: Path) -> Path:
    found = os.path.expandvars(text)
    if "$" in found:
        raise VaultLocked(
            f"{text}: the environment variable is not set here",
            remedy="systemd sets CREDENTIALS_DIRECTORY for its service alone. For a command by hand "
            "set it to the folder of the passphrase file, as an account that may read it.",
        )
    return base / Path(found).expanduser()


def _read_private(path: Path) -> bytes:
    if path == Path("/dev/stdin"):
        # Never opened by that name: a pipe has no path, and may be of the account before `sudo -u`.
        return sys.stdin.buffer.read()
    try:
        credentials = os.environ.get("CREDENTIALS_DIRECTORY")
        # systemd guards that folder itself, and lets the service in by an access control list.
        if credentials is None or path.parent != Path(credentials):
            require_private(path.resolve())  # secrets are often mounted as links
        return path.read_bytes()
    except FileExposed:
        raise
    except OSError as exc:
        raise VaultLocked(f"{path}: {exc.strerror or type(exc).__name__}") from exc


def _passphrase(text: str, source: str) -> bytes:
    if len(text) < _SHORTEST_PASSPHRASE:
        raise VaultLocked(
            f"{source} has no passphrase of at least {_SHORTEST_PASSPHRASE} characters"
        )
    return text.encode()


def _wrapped(data_key: bytes, secret: bytes, kind: str) -> dict[str, Any]:
    """A data key, wrapped."""
    head: dict[str, Any] = {
        "opened_by": kind,
        "salt": base64.b64encode(os.urandom(_SALT)).decode(),
        **(_SCRYPT if kind == "passphrase" else {}),
    }
    nonce = os.urandom(_NONCE)
    sealed = AESGCM(_wrapping_key(secret, head)).encrypt(nonce, data_key, _WRAP)
    return {**head, "key": base64.b64encode(nonce + sealed).decode()}


def _vault_file(wrapped: Mapping[str, Any], *, previous: Mapping[str, Any] | None = None) -> bytes:
    content = {"format": "silotune vault 1", **wrapped}
    if previous is not None:
        content["previous"] = dict(previous)
    return json.dumps(content).encode() + b"\n"


def _heads(path: Path) -> list[dict[str, Any]]:
    """The wrappings in a vault file, newest first."""
    try:
        newest = json.loads(path.read_bytes())
        newest.pop("format", None)
        previous = newest.pop("previous", None)
        return [newest] if previous is None else [newest, dict(previous)]
    except (OSError, ValueError, AttributeError, TypeError) as exc:
        raise SealBroken(f"{path} is not a vault file") from exc


def _unwrapped(path: Path, secret: bytes, kind: str) -> tuple[bytes, dict[str, Any]]:
    """The data key, and the wrapping that the secret opened."""
    heads = _heads(path)
    try:
        for head in heads:
            sealed = base64.b64decode(head["key"], validate=True)
            if head["opened_by"] != kind:
                continue
            key = _wrapping_key(secret, head)
            with suppress(InvalidTag, ValueError):
                return AESGCM(key).decrypt(sealed[:_NONCE], sealed[_NONCE:], _WRAP), head
    except (ValueError, KeyError, TypeError) as exc:
        raise SealBroken(f"{path} is not a vault file") from exc
    kinds = list(dict.fromkeys(str(head["opened_by"]) for head in heads))
    if kind not in kinds:
        raise VaultLocked(
            f"{path} is opened by a {' or a '.join(kinds)}, and the configuration has a {kind}",
            remedy="Set [at_rest] back, and let another secret open the folder by "
            "`silotune coordinator reseal` or `silotune site reseal`.",
        )
    raise VaultLocked(f"{path}: this is another {kind} than the one it was made with")


def _wrapping_key(secret: bytes, head: Mapping[str, Any]) -> bytes:
    salt = base64.b64decode(head["salt"], validate=True)
    if head["opened_by"] != "passphrase":
        return _derive(secret, salt, _WRAP)
    cost = {name: int(head[name]) for name in _SCRYPT}
    if cost["n"] > _LARGEST_SCRYPT or cost["r"] * cost["p"] > _SCRYPT["r"] * 4:
        raise ValueError("scrypt parameters out of range")
    return Scrypt(salt=salt, length=_KEY, **cost).derive(secret)


def _derive(key: bytes, salt: bytes, purpose: bytes) -> bytes:
    return HKDF(algorithm=SHA256(), length=_KEY, salt=salt, info=purpose).derive(key)
