"""A site's Flower ClientApp: the same in simulation and in deployment.

It reads a message, hands it to the site's `SiteRun`, and returns what the gate let out. Whatever is
raised here crosses the wire as a stable code only.
"""

from __future__ import annotations

from collections.abc import Callable

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from silotune.client.site_run import SiteRun
from silotune.events import tracing
from silotune.plan.plan import Plan
from silotune.protocol.errors import MessageRefused
from silotune.protocol.requests import (
    REQUESTS,
    CheckRequest,
    EvaluateRequest,
    JoinRequest,
    KeysRequest,
    MaskedRequest,
    OpenRequest,
    Request,
    ShareRequest,
    TrainRequest,
    plan_of,
    trace_of,
)

FindRun = Callable[[Context, Plan, str], SiteRun]


def _answer(site: SiteRun, asked: Request) -> RecordDict:
    """What the site lets out in answer to a request."""
    match asked:
        case JoinRequest():
            content = site.join()
        case TrainRequest():
            content = site.train(asked.adapter, asked.round, clip=asked.clip)
        case EvaluateRequest():
            content = site.evaluate(asked.adapter, asked.round)
        case MaskedRequest(present=present, sealed=sealed):
            content = site.train_masked(asked.adapter, asked.round, present=present, sealed=sealed)
        case KeysRequest():
            content = site.in_secure(asked.round).keys(asked.round)
        case ShareRequest():
            content = site.in_secure(asked.round).share(asked.round, asked.cohort)
        case CheckRequest():
            content = site.in_secure(asked.round).check(asked.round, asked.survivors)
        case OpenRequest():
            content = site.in_secure(asked.round).opened(
                asked.round,
                survivors=asked.survivors,
                signatures=asked.signatures,
                next_cohort=asked.cohort,
            )
        case _:
            raise MessageRefused(f"no answer to {asked.kind!r}")
    return content


def build_client_app(find_run: FindRun) -> ClientApp:
    """A ClientApp over the sites that `find_run` knows.

    Parameters
    ----------
    find_run : callable
        ``(context, plan, run) -> SiteRun``: which site this is, and its part in the run.
    """
    app = ClientApp(mods=[_traced])

    def register(kind: type[Request]) -> None:
        category, _, action = kind.kind.partition(".")

        @getattr(app, category)(action or "default")  # type: ignore[untyped-decorator]
        def handle(message: Message, context: Context) -> Message:
            named = Request.read(message.content)
            site = find_run(context, plan_of(named.plan), named.run)
            site.admit()
            return Message(_answer(site, kind.read(message.content)), reply_to=message)

    for kind in REQUESTS.values():
        register(kind)
    return app


def _traced(message: Message, context: Context, call_next: Callable[..., Message]) -> Message:
    """A span around the answer to a message, within the coordinator's exchange, if traces are on."""
    place = trace_of(message.content)
    kind = message.metadata.message_type
    with tracing.span(kind, run=place.run, round=place.round, parent=place.parent):
        return call_next(message, context)
