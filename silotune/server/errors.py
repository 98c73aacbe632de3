"""Errors of the coordinator: its folder, its process, its sites and its runs."""

from __future__ import annotations

from silotune.errors import EnvironmentFault, RunError


class NotPossibleNow(RunError):
    """There is no such run, site or request, or it is not in the state that the action needs."""

    code = "ST-622"
    title = "This can't be done with it now"
    cause = "There is no run, site or request of that name, or its state does not allow the action."
    advice = "See `silotune coordinator runs list`, `sites list` and `requests`."


class ApprovalsMissing(RunError):
    """Too many sites rejected the plan."""

    code = "ST-623"
    title = "Too few sites approve the plan"
    cause = "All sites decided, and fewer than rounds.min_sites approve; their reasons are listed."
    advice = "Change what the sites object to and propose the plan again."


class CoordinatorConfigInvalid(EnvironmentFault):
    """coordinator.toml is missing or wrong."""

    code = "ST-720"
    title = "The coordinator's configuration is not valid"
    cause = "coordinator.toml is missing, is not TOML, or has an unknown or wrong setting."
    advice = (
        "Make a federation with `silotune coordinator init --dir DIR`, or correct the keys named."
    )


class CoordinatorNotRunning(EnvironmentFault):
    """No process answers on the admin socket."""

    code = "ST-721"
    title = "The coordinator is not running"
    cause = "Nothing answers on the admin socket of this folder."
    advice = "Start it: `silotune coordinator start --dir DIR`, and give the same --dir here."


class CoordinatorRunning(EnvironmentFault):
    """A second process was started on the same folder."""

    code = "ST-722"
    title = "The coordinator runs already"
    cause = "Another process holds the lock of this folder."
    advice = "Use the running one, or stop it first."


class FolderInUse(EnvironmentFault):
    """A federation is to be made in a folder that holds something."""

    code = "ST-726"
    title = "The folder is not empty"
    cause = "A federation gets a folder of its own, and this one holds files already."
    advice = "Give --dir a folder that is empty or does not exist yet."


class PortTaken(EnvironmentFault):
    """The public port can't be opened."""

    code = "ST-724"
    title = "The public address can't be used"
    cause = "Another process listens on it, or this machine does not have the address."
    advice = "Stop the other process, or change listen.host and listen.port in coordinator.toml."


class AdminUnreachable(EnvironmentFault):
    """The admin API does not answer, or TLS fails."""

    code = "ST-725"
    title = "The admin API can't be reached"
    cause = (
        "Nothing answers at its address, or TLS refuses the certificate on one of the two sides."
    )
    advice = (
        "Check [admin] in coordinator.toml, and that the certificate is not expired or revoked."
    )
