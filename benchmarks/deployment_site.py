"""A site that trains nothing: joins, approves whatever is proposed, and answers with constants.

Run by `deployment.py`, one process a site: ``deployment_site.py FOLDER CODE VALUES``.
"""

import os
import secrets
import sys
import threading
import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from silotune.client.daemon.api import CoordinatorApi
from silotune.client.daemon.enrolment import Joining
from silotune.data.site import SiteConfig
from silotune.errors import SilotuneError
from silotune.flower.site_link import Fleet
from silotune.models.layout import ArrayEntry, Layout
from silotune.protocol import http
from silotune.protocol.envelope import address_of, seal, seal_id, unseal
from silotune.protocol.errors import CoordinatorUnavailable

_MOST_BYTES = 1 << 30
PAUSE = float(os.environ.get("SILOTUNE_BENCHMARK_PAUSE", "0"))  # as if it trained


def approve_all(enrolment, stop):
    api = CoordinatorApi(enrolment.facts.url, enrolment.tls())
    seen = {"roster": 0, "plans": 0}
    while not stop.is_set():
        try:
            news = api.news(**seen)
            seen = {"roster": news.roster, "plans": news.plans}
            for proposal in api.plans().proposals:
                if proposal.state == "proposed" and proposal.decided is None:
                    api.decide(
                        http.Decision.make(
                            enrolment.keys.signing,
                            federation=enrolment.facts.federation,
                            site=enrolment.facts.site,
                            run=proposal.run,
                            plan_sha256=proposal.plan_sha256,
                            verdict="approved",
                            decided_at=int(time.time()),
                        )
                    )
        except SilotuneError:
            stop.wait(1.0)


def answer(content, name, layout):
    config = content.config_records["config"]
    if "round" not in config:
        released = {"site": name, "declared_units": 100, "layout": layout.to_json()}
        return RecordDict({"released": ConfigRecord(released)})
    update = np.full(layout.size, 1e-3, dtype=np.float32)
    return RecordDict(
        {"update": ArrayRecord({"flat": Array(update)}), "released": MetricRecord({})}
    )


def main(folder, code, values):
    site = SiteConfig.load(Path(folder) / "site.toml")
    joining = Joining(site, code)
    joining.ask()
    enrolment = joining.wait(seconds=600)
    layout = Layout((ArrayEntry("x.lora_A.weight", (8, int(values) // 8), "adapter"),))
    stop = threading.Event()
    threading.Thread(target=approve_all, args=(enrolment, stop), daemon=True).start()
    fleet = Fleet(
        enrolment.facts.url,
        tls=enrolment.tls(),
        node_key=enrolment.keys.node,
        session=secrets.token_hex(16),
    )
    fleet.connect()
    while True:
        try:
            delivery = fleet.receive()
            if delivery is None:
                continue
            message = fleet.fetch(delivery, limit=_MOST_BYTES)
            address = address_of(message.content)
            content = unseal(message.content, address=address, key=enrolment.federation_key)
            time.sleep(PAUSE)
            reply = seal(
                answer(content, site.name, layout),
                address=address.reply(to=seal_id(message.content)),
                key=enrolment.keys.signing,
            )
            fleet.send(Message(reply, reply_to=message), seconds=0.0)
        except CoordinatorUnavailable:
            time.sleep(0.5)


if __name__ == "__main__":
    main(*sys.argv[1:])
