"""Sites that train nothing: they join, approve whatever is proposed, and answer with constants.

Run by `deployment.py`, several sites a process, with a line ``FOLDER CODE`` on standard input for each.
How many values an update has is in the plan's name, behind its last dash. They speak the real protocol,
of the build that they import, and run secure aggregation's real state machine; what they leave out are
records, models and books.
"""

import inspect
import os
import secrets
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from silotune.client.daemon.api import CoordinatorApi
from silotune.client.daemon.enrolment import Joining
from silotune.client.secure import member_of
from silotune.data.site import SiteConfig
from silotune.errors import SilotuneError
from silotune.flower.site_link import Fleet
from silotune.models.layout import ArrayEntry, Layout
from silotune.privacy.secagg.keys import digest
from silotune.privacy.secagg.messages import pack_named
from silotune.privacy.secagg.site import SiteRound
from silotune.protocol import http
from silotune.protocol.envelope import address_of, seal, seal_id, unseal
from silotune.protocol.errors import CoordinatorUnavailable
from silotune.protocol.requests import REQUESTS, plan_of
from silotune.strategies.secure import encoding_for

_MOST_BYTES = 1 << 30
_UNITS = 100
PAUSE = float(os.environ.get("SILOTUNE_BENCHMARK_PAUSE", "0"))  # as if it trained
TAKES = inspect.signature(Fleet).parameters, inspect.signature(Fleet.send).parameters


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


def layout_of(plan):
    """Of an adapter with as many values as the plan's name says."""
    values = int(plan.plan.name.rpartition("-")[2])
    return Layout((ArrayEntry("x.lora_A.weight", (2, values // 2), "adapter"),))


class Double:
    """What one site answers."""

    def __init__(self, enrolment):
        self._enrolment = enrolment
        self._rounds, self._member = {}, None

    def answer(self, content, kind):
        """The content of the reply."""
        asked = REQUESTS[kind].read(content)
        layout = layout_of(plan_of(asked.plan))
        if kind == "query.join":
            released = {"site": self._enrolment.facts.site, "declared_units": _UNITS}
            return RecordDict({"released": ConfigRecord({**released, "layout": layout.to_json()})})
        if kind == "train":
            update = np.full(layout.size, 1e-3, dtype=np.float32)
            flat = ArrayRecord({"flat": Array(update)})
            return RecordDict({"update": flat, "released": MetricRecord({})})
        found, records = self._secure(asked, kind.partition(".")[2]), {}
        if isinstance(found.get("update"), np.ndarray):
            records["update"] = ArrayRecord({"flat": Array(found.pop("update"))})
        return RecordDict({"released": ConfigRecord(found), **records})

    def _secure(self, asked, phase):
        plan, number = plan_of(asked.plan), asked.round
        if phase == "keys":
            return {"keys": self._keys(plan, asked.run, number)}
        part = self._rounds[number]
        if phase == "share":
            return {"shares": pack_named(part.share(asked.cohort))}
        if phase == "check":
            return {"signature": part.sign(asked.survivors)}
        if phase == "open":
            found = {"opened": pack_named(part.open(asked.survivors, asked.signatures))}
            if asked.cohort:
                found["shares"] = pack_named(self._rounds[number + 1].share(asked.cohort))
            return found
        vector = encoding_for(plan, layout=layout_of(plan), server_round=number).zeros()
        names = [name.encode() for name in sorted(asked.present)]
        request = digest(part.cohort.digest, *names)
        part.mask(vector, present=asked.present, sealed=asked.sealed)
        last = number == plan.rounds.number
        more = {} if last else {"keys": self._keys(plan, asked.run, number + 1)}
        return {"update": vector, "request": request, **more}

    def _keys(self, plan, run, number):
        if self._member is None or self._member.run != run:
            self._rounds.clear()
            self._member = member_of(
                plan,
                run=run,
                site=self._enrolment.facts.site,
                declared_units=_UNITS,
                identity=self._enrolment.keys.signing,
                roster=self._roster(),
            )
        part = self._rounds[number] = SiteRound.begin(self._member, number)
        self._rounds.pop(number - 2, None)
        return part.advertisement().to_bytes()

    def _roster(self):
        enrolment = self._enrolment
        api = CoordinatorApi(enrolment.facts.url, enrolment.tls())
        enrolment.take_rosters(api.rosters(after=enrolment.roster.version))
        api.close()
        return enrolment.signers


def serve(folder, code):
    site = SiteConfig.load(Path(folder) / "site.toml")
    joining = Joining(site, code)
    joining.ask()
    enrolment = joining.wait(seconds=1800)
    stop = threading.Event()
    threading.Thread(target=approve_all, args=(enrolment, stop), daemon=True).start()
    double = Double(enrolment)
    earlier = {"node_key": enrolment.keys.node} if "node_key" in TAKES[0] else {}
    fleet = Fleet(
        enrolment.facts.url, tls=enrolment.tls(), session=secrets.token_hex(16), **earlier
    )
    fleet.connect()
    while True:
        with suppress(CoordinatorUnavailable):
            delivery = fleet.receive()
            if delivery is None:
                continue
            message = fleet.fetch(delivery, limit=_MOST_BYTES)
            address = address_of(message.content)
            content = unseal(message.content, address=address, key=enrolment.federation_key)
            time.sleep(PAUSE)
            reply = seal(
                double.answer(content, address.kind),
                address=address.reply(to=seal_id(message.content)),
                key=enrolment.keys.signing,
            )
            seconds = {"seconds": 0.0} if "seconds" in TAKES[1] else {}
            fleet.send(Message(reply, reply_to=message), **seconds)


def main():
    threads = [threading.Thread(target=serve, args=line.split()) for line in sys.stdin]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main()
