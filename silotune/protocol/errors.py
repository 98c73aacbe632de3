"""Errors of what travels between a site and the coordinator: messages, connections, kept state."""

from __future__ import annotations

from silotune.errors import EnvironmentFault, RunError


class SiteOffline(RunError):
    """A site was offline for longer than the coordinator waits."""

    code = "ST-620"
    title = "A site is silent"
    cause = "The site's daemon has sent no sign of life for longer than link.patience."
    advice = "Ask the site's team whether its daemon runs: `silotune site status`; then resume."


class StoppedByOperator(RunError):
    """The operator stopped the run."""

    code = "ST-621"
    title = "The run was stopped"
    cause = "The coordinator's operator stopped it."
    advice = "Start a new run; what finished is kept: `silotune coordinator runs show RUN`."


class MessageRefused(RunError):
    """A message is of no kind that this site knows, or breaks its form."""

    code = "ST-641"
    title = "A message was refused unread"
    cause = "It is too large, of an unknown kind, or has records that the protocol does not have."
    advice = "The two sides probably run different versions of silotune; align them."


class CoordinatorRefused(RunError):
    """The coordinator doesn't let this site in."""

    code = "ST-647"
    title = "The coordinator does not let this site in"
    cause = "The certificate was revoked or is unknown there."
    advice = "Ask the coordinator's operator; a revoked site has to join again."


class SessionTaken(RunError):
    """Another process with this site's keys has connected."""

    code = "ST-649"
    title = "Another process has taken the site's place"
    cause = "A process with the same keys connected later; the coordinator serves the newest."
    advice = (
        "If it was not you: somebody has the site's keys. Tell the operator to revoke the site."
    )


class StoreUnusable(EnvironmentFault):
    """The database can't be opened, or was written by a newer version."""

    code = "ST-723"
    title = "The coordinator's database can't be used"
    cause = "It is not reachable, not writable, or was written by a newer version of silotune or Flower."
    advice = "Check [store] url in coordinator.toml; never downgrade: restore a backup instead."


class PortUnreachable(EnvironmentFault):
    """TCP."""

    code = "ST-741"
    title = "The coordinator's port can't be reached"
    cause = "No TCP connection: a firewall is in between, or the coordinator is down."
    advice = "Have the firewall allow this one outbound port, or set HTTPS_PROXY to the proxy."


class ProxyFailed(EnvironmentFault):
    """The proxy doesn't connect."""

    code = "ST-742"
    title = "The proxy does not connect to the coordinator"
    cause = "HTTPS_PROXY names a proxy that is unreachable or refuses the CONNECT."
    advice = "Check HTTPS_PROXY, and have the proxy allow CONNECT to the coordinator's port."


class ServerUntrusted(EnvironmentFault):
    """TLS."""

    code = "ST-743"
    title = "The server is not the federation's coordinator"
    cause = "Its certificate is not of the federation's authority, or is for another host name."
    advice = "A proxy may be opening TLS: have it pass this host through. Else ask the operator."


class ClockWrong(EnvironmentFault):
    """Clock skew."""

    code = "ST-745"
    title = "The machine's clock is wrong"
    cause = "It differs from the coordinator's by more than a minute."
    advice = "Start time synchronisation: `timedatectl set-ntp true`."


class CoordinatorUnavailable(EnvironmentFault):
    """The coordinator doesn't answer as one."""

    code = "ST-748"
    title = "The coordinator does not answer"
    cause = "The connection stands, but what answers is no coordinator, or it is starting up."
    advice = "Try again in a minute; then ask the coordinator's operator."


class VersionsDiffer(EnvironmentFault):
    """One end speaks an older protocol than the other."""

    code = "ST-761"
    title = "Site and coordinator run versions of silotune that don't understand each other"
    cause = "Messages cross the wire in another form since a newer version; one end has the older."
    advice = "Install the same version at both ends; a site goes on by itself once they agree."
