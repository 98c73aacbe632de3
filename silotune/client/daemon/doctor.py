"""The doctor: everything a site needs, looked at one by one, each trouble with a code and a remedy.

It changes nothing, and asks nothing of the coordinator that a stranger could not ask. Checks come in
the order in which one trouble causes the next; a check whose ground is missing says so and is skipped.
"""

from __future__ import annotations

import shutil
import socket
import ssl
from collections.abc import Callable
from urllib.parse import urlsplit

import httpx

from silotune.client.approvals import Approvals, ProposalRecord
from silotune.client.daemon.books import verify_books
from silotune.client.daemon.enrolment import Enrolment, trusting
from silotune.client.data_parallel import processes_for
from silotune.client.errors import (
    CertificateExpired,
    DeviceMissing,
    DiskLow,
    IsolationMissing,
    NameUnresolved,
    PolicyMissing,
    SiteNotEnrolled,
)
from silotune.client.isolation.confinement import checked
from silotune.client.isolation.shut_out import would_shut_out
from silotune.client.training.bounds import all_record_paths
from silotune.data.declared import rule_for, secret_for_a_look
from silotune.data.site import SiteConfig, require_guarded
from silotune.findings import Check, Finding, Skipped, examine
from silotune.protocol import http
from silotune.protocol.errors import (
    ClockWrong,
    CoordinatorUnavailable,
    PortUnreachable,
    ProxyFailed,
)
from silotune.protocol.https import (
    CONNECT_SECONDS,
    clock_skew,
    connection_errors,
    https_client,
    proxy_for,
)
from silotune.trust.audit import AUDIT_FILE, AuditLog
from silotune.trust.identity import certificate_from_pem, days_left, issued_by
from silotune.trust.vault import Vault

_LEAST_DISK = 200_000_000
_MOST_SKEW = 4.0


class SiteDoctor:
    """Looks at one site.

    Parameters
    ----------
    site : SiteConfig
        Its configuration, which was readable.
    """

    def __init__(self, site: SiteConfig) -> None:
        self._site = site
        self._enrolment: Enrolment | None = None
        self._vault: Vault | None = None
        self._response: httpx.Response | None = None

    def examine(self) -> list[Finding]:
        """Every check, in order."""
        checks: list[Check] = [
            ("files", self._files),
            ("policy", self._policy),
            ("keys", self._keys),
            ("enrolment", self._enrolled),
            ("name service", self._name),
            ("port", self._port),
            ("proxy", self._proxy),
            ("tls", self._tls),
            ("coordinator", self._coordinator),
            ("certificate", self._certificate),
            ("clock", self._clock),
            ("disk", self._disk),
            ("device", self._device),
            ("isolation", self._isolation),
            ("base models", self._models),
            *((f"dataset {name}", self._dataset(name)) for name in self._site.datasets),
            *((f"plan of {entry.run}", self._plan(entry)) for entry in self._open()),
            ("ledger", self._ledger),
            ("audit log", self._audit),
        ]
        return examine(checks)

    # --- the site's own word and keys ---

    def _files(self) -> str:
        require_guarded(self._site)
        return "nobody else may change site.toml or enter the state folder, and no link leads out of it"

    def _policy(self) -> str:
        if self._site.policy is None:
            raise PolicyMissing
        missing = [
            name
            for name, value in self._site.policy
            if value in (None, (), {}) and name != "approval"
        ]
        if missing:
            return f"written; left out, and so allowing nothing: {', '.join(missing)}"
        return f"written, every clause; approval is {self._site.policy.approval}"

    def _keys(self) -> str:
        if not (self._site.state_folder / "vault.json").exists():
            raise Skipped("no keys yet: they are made by `silotune site join`")
        self._vault = Vault(self._site.state_folder, self._site.at_rest, base=self._site.folder)
        return "the sealed files can be opened, and no other account can read them"

    def _enrolled(self) -> str:
        if self._vault is None:
            raise SiteNotEnrolled
        self._enrolment = Enrolment.open(self._site, self._vault)
        self._enrolment.require_listed()
        facts = self._enrolment.facts
        return f"{facts.site} in federation {facts.federation}, coordinator {facts.url}"

    # --- the way to the coordinator ---

    @property
    def _member(self) -> Enrolment:
        if self._enrolment is None:
            raise Skipped("the site is not in a federation")
        return self._enrolment

    @property
    def _place(self) -> tuple[str, int]:
        parts = urlsplit(self._member.facts.url)
        return parts.hostname or "", parts.port or 443

    def _name(self) -> str:
        host, port = self._place
        if proxy_for(self._member.facts.url):
            raise Skipped("the proxy looks the name up")
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as exc:
            raise NameUnresolved(f"{host}: {exc.strerror or exc}") from exc
        return f"{host} is {', '.join(sorted({str(entry[4][0]) for entry in found}))}"

    def _port(self) -> str:
        host, port = self._place
        if proxy_for(self._member.facts.url):
            raise Skipped("the proxy connects")
        try:
            socket.create_connection((host, port), timeout=CONNECT_SECONDS).close()
        except OSError as exc:
            raise PortUnreachable(f"{host}, port {port}: {exc.strerror or exc}") from exc
        return f"{host} answers on port {port}"

    def _proxy(self) -> str:
        proxy = proxy_for(self._member.facts.url)
        if proxy is None:
            return "none is set"
        parts = urlsplit(proxy)
        try:
            address = (parts.hostname or "", parts.port or 80)
            socket.create_connection(address, timeout=CONNECT_SECONDS).close()
        except OSError as exc:
            raise ProxyFailed(f"{parts.hostname}: {exc.strerror or exc}") from exc
        return f"{parts.hostname} answers on port {parts.port or 80}"

    def _tls(self) -> str:
        self._response = self._get(trusting(self._member.authority), http.AUTHORITY)
        return "TLS 1.3, with a certificate of the federation's authority"

    def _coordinator(self) -> str:
        if self._response is None:
            raise Skipped("there is no verified connection")
        if self._response.status_code != httpx.codes.OK:
            raise CoordinatorUnavailable(f"status {self._response.status_code}")
        said = http.parse(http.AuthorityReply, self._response.content)
        if said.federation != self._member.facts.federation:
            raise CoordinatorUnavailable(f"it serves federation {said.federation!r}")
        return f"it serves federation {said.federation}"

    def _certificate(self) -> str:
        own = certificate_from_pem(self._member.certificate)
        left = days_left(own)
        if not issued_by(own, certificate_from_pem(self._member.authority)):
            raise CertificateExpired(f"{left:.0f} days are left")
        return f"valid for {left:.0f} more days"

    def _clock(self) -> str:
        skew = clock_skew(self._response) if self._response is not None else None
        if skew is None:
            raise Skipped("nobody to compare with")
        if abs(skew) > _MOST_SKEW:
            raise ClockWrong(f"this machine is {skew:+.0f} s off the coordinator's clock")
        return f"within {max(1.0, abs(skew)):.0f} s of the coordinator's"

    def _get(self, tls: ssl.SSLContext, path: str) -> httpx.Response:
        url = self._member.facts.url
        client = https_client(url, tls=tls, limit=http.MOST_REPLY_BYTES)
        with client, connection_errors(url):
            return client.get(url + path)

    # --- the machine ---

    def _disk(self) -> str:
        folder = self._site.state_folder
        free = shutil.disk_usage(folder if folder.exists() else self._site.folder).free
        if free < _LEAST_DISK:
            raise DiskLow(f"{free / 1e6:.0f} MB are free at {folder}, wanted are 200 MB")
        return f"{free / 1e9:.1f} GB are free at {folder}"

    def _device(self) -> str:
        import torch

        from silotune.errors import EnvironmentFault
        from silotune.models.choices import resolve_device

        try:
            place = resolve_device(self._site.resources.device)
        except EnvironmentFault as exc:
            raise DeviceMissing(exc.detail) from exc
        if place.type == "cuda":
            found = f"{place}: {torch.cuda.get_device_name(place)}"
        else:
            threads = self._site.resources.threads or torch.get_num_threads()
            found = f"the CPU, {threads} threads"
        processes = processes_for(self._site.resources)
        return found if processes == 1 else f"{found}; {processes} processes share a step"

    def _isolation(self) -> str:
        found = checked(self._site)
        held = ", ".join(p.name for p in found if p.in_force) or "nothing"
        missing = "".join(f"; {p.lack}" for p in found if not p.in_force)
        why = would_shut_out(self._site, records=all_record_paths(self._site))
        if why and "landlock_files" in self._site.isolation.require:
            raise IsolationMissing(f"the daemon could read records: {why}")
        daemon = f"could read records: {why}" if why else "can open no record"
        return f"what reads records is confined by {held}{missing}; the daemon {daemon}"

    def _models(self) -> str:
        from silotune.models.pretrained import locate, require_weights

        policy = self._site.policy
        if policy is None or not policy.base_models:
            raise Skipped("policy.base_models lists none")
        for sha256, place in policy.base_models.items():
            require_weights(locate(place), sha256)
        return f"{len(policy.base_models)} there, with the listed hashes"

    def _dataset(self, name: str) -> Callable[[], str]:
        def check() -> str:
            from silotune.client.training.process import look_at

            dataset = self._site.dataset(name)
            rule = rule_for(dataset, secret_for_a_look(self._site, b"doctor"))
            found = look_at(self._site, name, rule=rule)
            left_out = "".join(f"; left out where it is needed: {each}" for each in found.left_out)
            budget = "" if dataset.budget else "; it has no budget, so no private plan can use it"
            return f"{found.records} records, with every column that is named{left_out}{budget}"

        return check

    def _open(self) -> list[ProposalRecord]:
        entries = Approvals(self._site.state_folder).entries()
        return [entry for entry in entries if not entry.over]

    def _plan(self, entry: ProposalRecord) -> Callable[[], str]:
        """Whether a proposal could be trained here, whatever the policy says of it."""

        def check() -> str:
            from silotune.client.proposal_view import require_servable

            policy, plan = self._site.policy, entry.plan
            if plan.statistics is not None:
                return f"{plan.plan.name}: statistics, for which no model is needed"
            if policy is None or plan.model.sha256 not in policy.base_models:
                raise Skipped("policy.base_models does not list its base model")
            require_servable(self._site, plan)
            return f"{plan.plan.name}: the base model takes it"

        return check

    def _ledger(self) -> str:
        from silotune.privacy.ledger import LEDGER_FILE

        if self._enrolment is None and not (self._site.state_folder / LEDGER_FILE).exists():
            raise Skipped("there is none yet")
        audit = AuditLog(self._site.state_folder / AUDIT_FILE)
        found = verify_books(self._site.state_folder, audit, trusted=self._member.federation_key)
        return (
            f"{found}. Whether the coordinator has signed newer rows is asked before each training"
        )

    def _audit(self) -> str:
        key = self._member.federation_key
        head = AuditLog(self._site.state_folder / AUDIT_FILE).verify(trusted=key)
        return f"whole, {head.seq} lines"
