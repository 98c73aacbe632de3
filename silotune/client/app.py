"""A site's Flower ClientApp: the same in simulation and in deployment.

It parses a message, hands it to the site's `SiteRun`, and returns what the gate let out. Whatever is
raised here crosses the wire as a stable code only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from silotune.client.secure import SecurePart
from silotune.client.site_run import SiteRun
from silotune.client.trainer import Vector
from silotune.errors import PlanInvalid
from silotune.events import tracing
from silotune.plan.plan import Plan
from silotune.privacy.errors import MessageMalformed
from silotune.privacy.secagg.messages import unpack_named, unpack_names

FindRun = Callable[[Context, Plan, str], SiteRun]

SECURE_TYPES = frozenset({"train.keys", "train.share", "train.masked", "train.check", "train.open"})
"""Those of secure aggregation."""

MESSAGE_TYPES = frozenset({"query.join", "train", "evaluate"}) | SECURE_TYPES
"""Every type of message that a site answers; all else is refused unread."""


def build_client_app(find_run: FindRun) -> ClientApp:
    """A ClientApp over the sites that `find_run` knows.

    Parameters
    ----------
    find_run : callable
        ``(context, plan, run) -> SiteRun``: which site this is, and its part in the run.
    """
    app = ClientApp(mods=[_traced])

    def part(message: Message, context: Context) -> SiteRun:
        config = message.content.config_records["config"]
        plan = Plan.from_canonical(_text(config, "plan"))
        site = find_run(context, plan, _text(config, "run"))
        site.admit()
        return site

    @app.query("join")
    def join(message: Message, context: Context) -> Message:
        return Message(part(message, context).join(), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        content = message.content
        reply = part(message, context).train(
            _adapter(content), _round(content), clip=_clip(content)
        )
        return Message(reply, reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        reply = part(message, context).evaluate(_adapter(message.content), _round(message.content))
        return Message(reply, reply_to=message)

    _add_secure(app, part)
    return app


def _traced(message: Message, context: Context, call_next: Callable[..., Message]) -> Message:
    """A span around the answer to a message, within the coordinator's exchange, if traces are on."""
    config: Mapping[str, object] = message.content.config_records.get("config") or {}
    parent, run = config.get(tracing.TRACEPARENT), config.get("run")
    number = config.get("round")
    with tracing.span(
        message.metadata.message_type,
        run=run if isinstance(run, str) else "",
        round=number if isinstance(number, int) else 0,
        parent=parent if isinstance(parent, str) else None,
    ):
        return call_next(message, context)


def _add_secure(app: ClientApp, part: Callable[[Message, Context], SiteRun]) -> None:
    """The phases of secure aggregation."""

    def secure(message: Message, context: Context) -> tuple[SecurePart, int]:
        number = _round(message.content)
        return part(message, context).in_secure(number), number

    @app.train("keys")
    def keys(message: Message, context: Context) -> Message:
        site, number = secure(message, context)
        return Message(site.keys(number), reply_to=message)

    @app.train("share")
    def share(message: Message, context: Context) -> Message:
        site, number = secure(message, context)
        return Message(site.share(number, _blob(message.content, "cohort")), reply_to=message)

    @app.train("masked")
    def masked(message: Message, context: Context) -> Message:
        site, content = part(message, context), message.content
        reply = site.train_masked(
            _adapter(content),
            _round(content),
            present=unpack_names(_blob(content, "present")),
            sealed=unpack_named(_blob(content, "sealed")),
        )
        return Message(reply, reply_to=message)

    @app.train("check")
    def check(message: Message, context: Context) -> Message:
        site, number = secure(message, context)
        survivors = unpack_names(_blob(message.content, "survivors"))
        return Message(site.check(number, survivors), reply_to=message)

    @app.train("open")
    def opened(message: Message, context: Context) -> Message:
        site, number = secure(message, context)
        reply = site.opened(
            number,
            survivors=unpack_names(_blob(message.content, "survivors")),
            signatures=unpack_named(_blob(message.content, "signatures")),
            next_cohort=_blob(message.content, "cohort"),
        )
        return Message(reply, reply_to=message)


def _blob(content: RecordDict, key: str) -> bytes:
    """A byte string of the message's ``secure`` record."""
    record = content.config_records.get("secure")
    value = record.get(key) if record is not None else None
    if not isinstance(value, bytes):
        raise MessageMalformed(f"the message has no bytes {key!r}")
    return value


def _text(config: object, key: str) -> str:
    value = config.get(key) if hasattr(config, "get") else None
    if not isinstance(value, str):
        raise PlanInvalid(f"the message has no text {key!r}")
    return value


def _round(content: RecordDict) -> int:
    value = content.config_records["config"].get("round")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise PlanInvalid("the message has no round number")
    return value


def _clip(content: RecordDict) -> float | None:
    """The norm of a round under adaptive clipping, which the coordinator names."""
    value = content.config_records["config"].get("clip")
    if value is None:
        return None
    if not isinstance(value, float) or not math.isfinite(value) or value <= 0.0:
        raise PlanInvalid("the message's clipping norm is not a positive number")
    return value


def _adapter(content: RecordDict) -> Vector:
    return np.asarray(content.array_records["arrays"]["flat"].numpy(), dtype=np.float32)
