"""A site's folder for tests of the daemon: synthetic notes, a tiny model, a policy."""

from dataclasses import dataclass
from pathlib import Path

from silotune.models.weights import weights_sha256
from silotune.plan import Plan
from tests.federation import write_federation

POLICY = """
[policy]
approval = "{approval}"
max_epsilon = 8.0
max_total_epsilon = 8.25
max_delta = 1e-3
allow_seeded_noise = true
require_secure_aggregation = false
min_cohort = 1
tasks = ["text_classification"]
target_modules = ["auto"]
strategies = ["fedavg"]
max_rounds = 10
max_upload_mb = 0.2
hours = ["Mon-Sun 00:00-24:00"]
[policy.base_models]
"{sha256}" = "{base}"
[resources]
threads = 1
device = "cpu"
"""
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
    sha256 = weights_sha256(base)
    wanted = {
        "model__sha256": sha256,
        "model__base": "somewhere/else",
        "rounds__min_sites": 1,
        **PRIVATE,
        **settings,
    }
    made = write_federation(folder, base, **wanted)
    site = folder / "alpha"
    config = site / "site.toml"
    config.write_text(
        config.read_text() + POLICY.format(approval=approval, sha256=sha256, base=base)
    )
    return SiteFolder(site, made.plan)
