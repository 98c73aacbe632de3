"""A daemon that shuts itself out from the records: what reaches the network can't read them.

Once its launcher runs, the daemon opens its state folder, Python, the system's libraries and what finds
and trusts the coordinator, and nothing else: no record, no base model, no other file of its account. It
starts no program, and by Landlock's rules can't trace or look into processes that are not shut out with
it, its trainers among them. There is no way back.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from silotune.client.isolation import kernel, landlock
from silotune.client.isolation.confinement import Confinement, needed
from silotune.data.site import SiteConfig

_SYSTEM = ("/etc", "/proc", "/run/systemd/resolve", "/run/resolvconf", "/run/NetworkManager",
           "/usr/share/ca-certificates", "/usr/lib/ssl")  # fmt: skip
_NAMED = ("SSL_CERT_FILE", "SSL_CERT_DIR", "CREDENTIALS_DIRECTORY")


def shut_out(site: SiteConfig, *, records: Mapping[str, Iterable[Path]]) -> str:
    """Shut this process out for good.

    Parameters
    ----------
    site : SiteConfig
        Whose daemon it is.
    records : mapping of str to iterable of Path
        Where the records of each dataset lie.

    Returns
    -------
    str
        Empty if no record can be opened any more; else why one still can.
    """
    if sys.platform != "linux":
        return f"{sys.platform} has no means for it"
    if kernel.threads() != 1:
        return "the process has threads already, which would not be shut out"
    secrets = (site.at_rest.key_file, site.at_rest.passphrase_file)
    own = [site.folder / os.path.expandvars(name) for name in secrets if name is not None]
    named = [Path(place) for name in _NAMED if (place := os.environ.get(name))]
    read = [*needed(Confinement()), *map(Path, _SYSTEM), *own, *named]
    state = landlock.WRITE | landlock.MAKE_SOCKET
    try:
        kernel.set_no_new_privileges()
        landlock.restrict_files(
            [
                *((path, landlock.READ) for path in read),
                (site.state_folder, state),
                (Path("/dev/null"), landlock.READ | landlock.DEVICE),
            ]
        )
    except OSError as exc:
        return exc.strerror or str(exc)
    still = [name for name, paths in records.items() if any(map(_opens, paths))]
    if still:
        return f"the records of {', '.join(still)} lie where the daemon works: move them elsewhere"
    return ""


def would_shut_out(site: SiteConfig, *, records: Mapping[str, Iterable[Path]]) -> str:
    """What `shut_out` would say here, found out in a process that ends right after."""
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        why = "a process that tried it failed"
        try:
            why = shut_out(site, records=records)
        finally:
            os.write(tell, why.encode())
            os._exit(0)
    os.close(tell)
    with os.fdopen(told, "rb") as pipe:
        why = pipe.read().decode()
    os.waitpid(child, 0)
    return why


def _opens(path: Path) -> bool:
    try:
        os.close(os.open(path, os.O_RDONLY))
    except OSError:
        return False
    return True
