"""A site's Flower ClientApp: the same in simulation and in deployment.

It parses a message, hands it to the site's `SiteRun`, and returns what the gate let out. Whatever is
raised here crosses the wire as a stable code only.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from silotune.client.runtime import SiteRun
from silotune.client.trainer import Vector
from silotune.errors import PlanInvalid
from silotune.plan import Plan

FindRun = Callable[[Context, Plan, str], SiteRun]

MESSAGE_TYPES = frozenset({"query.join", "train", "evaluate"})
"""Every type of message that a site answers; all else is refused unread."""


def build_client_app(find_run: FindRun) -> ClientApp:
    """A ClientApp over the sites that `find_run` knows.

    Parameters
    ----------
    find_run : callable
        ``(context, plan, run) -> SiteRun``: which site this is, and its part in the run.
    """
    app = ClientApp()

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
        reply = part(message, context).train(_adapter(message.content), _round(message.content))
        return Message(reply, reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        reply = part(message, context).evaluate(_adapter(message.content), _round(message.content))
        return Message(reply, reply_to=message)

    return app


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


def _adapter(content: RecordDict) -> Vector:
    return np.asarray(content.array_records["arrays"]["flat"].numpy(), dtype=np.float32)
