"""Worker programs for secure simulations in which sites fail, and coordinators that spy."""

from flwr.clientapp import ClientApp

from silotune.simulation import program
from tests.simulation.plain_rounds import PHASES


class SiteGone(Exception):
    code = "ST-604"


class FailingSites:
    """`SimulatedSites` whose sites answer with an error as ``faults`` says.

    The payload's ``faults`` are texts "site round phase": the site is gone from that phase of that round
    on, for the rest of the round. A site that is gone in "share" or "keys" misses those of the next.
    """

    def __init__(self, payload):
        self._inner = program.build(payload)
        self._faults = {tuple(text.split()) for text in payload["faults"]}
        app, inner = ClientApp(), self._inner.client_app
        for phase in PHASES:
            app.train(phase)(
                lambda message, context, phase=phase: self._answer(message, context, phase)
            )
        app.query("join")(inner)
        self.client_app = app

    def _answer(self, message, context, phase):
        site = context.node_config["site"]
        number = str(int(message.content["config"]["round"]))
        gone = PHASES[: PHASES.index(phase) + 1]
        if any((site, number, earlier) in self._faults for earlier in gone):
            raise SiteGone
        return self._inner.client_app(message, context)

    def inspect(self, site_index, request, arrays):
        return self._inner.inspect(site_index, request, arrays)


def build(payload):
    return FailingSites(payload)
