"""What a simulated run takes over from the run that it goes on with, as a real site would have it.

A site keeps its ledger and the secret by which its records are split from run to run. A simulation has
them in its run directory; the next run that starts from its adapter begins with copies of both, so that
what two runs cost adds up, and no record is tested on that the start was trained on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from silotune.data.declared import SECRET_FILE, own_secret
from silotune.data.site import SiteConfig
from silotune.plan.plan import Plan
from silotune.privacy.ledger import LEDGER_FILE
from silotune.rounds.run_directory import RunDirectory
from silotune.trust.files import create_file
from silotune.trust.vault import Vault

_LEDGER = (LEDGER_FILE, f"{LEDGER_FILE}.head")


def states_of_start(plan: Plan, sites: Sequence[SiteConfig]) -> dict[str, Path]:
    """The state folder that each site has in the run that ``lora.start`` names; only those there are."""
    if plan.lora.start is None:
        return {}
    given = Path(plan.lora.start.adapter).expanduser().resolve()
    # A run's directory, or the folder adapters/final in it.
    root = given if (given / "sites").is_dir() else given.parent.parent
    found = {site.name: root / "sites" / site.name for site in sites}
    return {name: state for name, state in found.items() if (state / SECRET_FILE).is_file()}


def secrets_of(states: Mapping[str, Path]) -> dict[str, bytes]:
    """The sites' secrets in their states of a run, made where there is none yet."""
    return {name: own_secret(state, Vault(state)) for name, state in states.items()}


def carry_ledgers(states: Mapping[str, Path], directory: RunDirectory) -> None:
    """Copy the ledgers of an earlier run into the sites' states of a new one."""
    for name, state in states.items():
        for file in _LEDGER:
            if (state / file).is_file():
                create_file(directory.site(name) / file, (state / file).read_bytes())
