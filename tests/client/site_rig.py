"""A joined site inside the test's own process: its line, runner and documents, without its daemon."""

import threading
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord

from silotune.client.approvals import Approvals
from silotune.client.daemon.api import closing_api
from silotune.client.daemon.books import SiteBooks
from silotune.client.daemon.connection import SiteConnection
from silotune.client.daemon.documents import DocumentExchange
from silotune.client.daemon.enrolment import Joining
from silotune.client.daemon.runner import Runner
from silotune.client.model_cache import ModelCache
from silotune.data.site import SiteConfig
from silotune.models.base import outline
from silotune.privacy.ledger import Ledger
from silotune.protocol.envelope import address_of, seal_id, unseal
from silotune.trust.audit import AUDIT_FILE, AuditLog
from silotune.trust.identity import decode_signing_key
from silotune.trust.vault import Vault
from tests.client.coordinator_double import CoordinatorDouble
from tests.client.site_material import write_site_folder


class Rig:
    """Everything of one site but its process."""

    def __init__(self, folder: Path, base: Path, double: CoordinatorDouble, **settings):
        made = write_site_folder(folder, base, **settings)
        self.double, self.plan, self.base = double, made.plan, base
        self.site = SiteConfig.load(made.folder / "site.toml")
        self.state = self.site.state_folder
        joining = Joining(self.site, double.invitation())
        joining.ask()
        self.enrolment = joining.wait(seconds=10)
        self.audit = AuditLog(self.state / AUDIT_FILE, owner=self.site.name)
        own = self.enrolment.keys.signing.public_key()
        self.approvals = Approvals(self.state, own=own)
        self.vault = Vault(self.state)
        self.paused = False
        self.runner = Runner(
            self.site,
            enrolment=self.enrolment,
            approvals=self.approvals,
            vault=self.vault,
            audit=self.audit,
            trainers=ModelCache(device="cpu"),
            paused=lambda: self.paused,
        )
        self.books = SiteBooks(enrolment=self.enrolment, audit=self.audit)
        self.documents = DocumentExchange(
            enrolment=self.enrolment,
            approvals=self.approvals,
            audit=self.audit,
            books=self.books,
            judge=None,
            settle=lambda entry: self.runner.finish(entry, self.state / "certificate.json"),
        )
        self.link = SiteConnection(
            self.site,
            enrolment=self.enrolment,
            runner=self.runner,
            audit=self.audit,
            session="0" * 32,
            answered=lambda: None,
        )
        self.thread = threading.Thread(target=self.link.serve, daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.link.stop.set()
        self.double.hang_up()
        self.link.end(grace=10)
        self.thread.join(10)

    # --- shorthands ---

    def approve(self, run="r1", plan=None):
        """Propose a run, and have the site's people approve it."""
        self.double.propose(run, plan or self.plan)
        self.take_plans()
        self.documents.decide(run, "approved", reason="", by="test")

    def take_plans(self):
        """What the news thread does when plans have changed."""
        with closing_api(self.enrolment.facts.url, self.enrolment.tls()) as api:
            self.documents.take_plans(api)

    def records(self, number=1, **changes):
        if not number:
            return {}
        size = outline(self.plan, base=str(self.base)).size
        flat = np.zeros(size, dtype=np.float32)
        return {"arrays": ArrayRecord({"flat": Array(flat)}), **changes}

    def sealed(self, kind, number=0, *, run="r1", plan=None, key=None, address=None, **changes):
        """A message's content, signed like the coordinator's."""
        records = {**self.records(number), **changes}
        content = self.double.content(run, plan or self.plan, server_round=number, **records)
        place = self.double.address(run, kind, number, **(address or {}))
        return place, self.double.sealed(content, address=place, key=key)

    def ask(self, kind, number=0, **options):
        """One honest request; the verified content of its answer."""
        place, content = self.sealed(kind, number, **options)
        reply = self.double.exchange(content, kind)
        return self.opened(reply, place.reply(to=seal_id(content)))

    def opened(self, reply, address=None):
        """What the site signed; at the address that it claims, unless another is expected."""
        key = decode_signing_key(self.double.member.signing_key)
        return unseal(reply.content, address=address or address_of(reply.content), key=key)

    def ledger_rows(self):
        path = self.state / "ledger.sqlite"
        if not path.exists():
            return []
        ledger = Ledger(path, create=False)
        rows = ledger.rows()
        ledger.close()
        return rows

    def refusals(self):
        return [line.fields for line in self.audit.lines() if line.kind == "refused"]
