"""A site's own secret: what decides the side of the split, and names the content of records.

It is made once, sealed in the state folder, and never changes: with another one, units that a model was
trained on would become test units.
"""

from __future__ import annotations

import os
from pathlib import Path

from silotune.federation.sealed import Vault
from silotune.privacy.durable import create_file, create_private_folder

SECRET_FILE = "split.secret.sealed"  # noqa: S105 - a file's name
"""Its name in the state folder."""

_BYTES = 32


def own_secret(state: Path, vault: Vault, *, new: bytes | None = None) -> bytes:
    """The secret in a state folder, made (or taken from `new`) if there is none yet.

    Raises
    ------
    SealBroken, FileExposed
        The file was changed, or other accounts of the machine may read it.
    """
    path = state / SECRET_FILE
    if not path.exists():
        create_private_folder(state)
        create_file(path, vault.seal(new or os.urandom(_BYTES), name=path.name))
    return vault.read(path)
