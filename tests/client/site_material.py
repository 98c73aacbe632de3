"""A site's folder for tests of the daemon: synthetic notes, a tiny model, a policy."""

from dataclasses import dataclass
from pathlib import Path

from silotune.models.pretrained import weights_sha256
from silotune.plan.plan import Plan
from tests.federation import write_federation, write_policy

PRIVATE = {
    "privacy__mode": "record",
    "privacy__epsilon": 4.0,
    "privacy__delta": 1e-4,
    "privacy__clip": {"head": 1.0, "adapter": 1.0},
}


@dataclass(frozen=True)
class SiteFolder:
    folder: Path
    plan: Plan


def write_site_folder(folder: Path, base: Path, *, approval="manual", **settings) -> SiteFolder:
    """The site "alpha" under `folder`, and a private plan that its policy lets pass."""
    wanted = {
        "model__sha256": weights_sha256(base),
        "model__base": "somewhere/else",
        "rounds__min_sites": 1,
        **PRIVATE,
        **settings,
    }
    made = write_federation(folder, base, **wanted)
    site = folder / "alpha"
    write_policy(
        site / "site.toml", base, approval=approval, max_total_epsilon=8.25, max_upload_mb=0.2
    )
    return SiteFolder(site, made.plan)
