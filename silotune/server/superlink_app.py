"""Flower's SuperLink as an ASGI application: how it is made, and the paths that sites need of it."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

from alembic.util import CommandError
from fastapi import FastAPI
from flwr.supercore.object_store import ObjectStore
from flwr.supercore.protobuf.translation import ProtobufTranslationMiddleware
from flwr.superlink.auth_plugin import NoOpControlAuthnPlugin
from flwr.superlink.config_loader import SuperLinkLifespanConfig
from flwr.superlink.main import create_app
from flwr.superlink.routers.fleet.node_auth import NodeAuthMiddleware
from flwr.superlink.routers.fleet.router import router as fleet_router
from sqlalchemy import event
from starlette.middleware.base import BaseHTTPMiddleware

from silotune.server.errors import StoreUnusable

ACTIVATE, DEACTIVATE, HEARTBEAT, PULL, PUSH, PULL_OBJECT, PUSH_OBJECT, CONFIRM = (
    f"/v1/fleet/{name}"
    for name in (
        "activate-node",
        "deactivate-node",
        "send-node-heartbeat",
        "pull-messages",
        "push-messages",
        "pull-object",
        "push-object",
        "confirm-message-received",
    )
)


_NEEDED: tuple[Any, ...] = (
    BaseHTTPMiddleware,
    ProtobufTranslationMiddleware,
    NodeAuthMiddleware,
)


def superlink_app(database: Path) -> FastAPI:
    """The SuperLink's fleet API over a link state in a SQLite file, without any process of Flower's.

    Its other APIs are taken out, with the six of nine layers around every request that are there for
    them or for logs: each costs a task and a stream a request. The first that is kept translates errors.

    Raises
    ------
    StoreUnusable
        A newer version of Flower wrote the link state.
    """
    # The package attribute of that name is a function, so the module is asked for by name.
    lifespan = importlib.import_module("flwr.superlink.cli.flower_superlink").SuperLinkLifespan
    try:
        app = create_app(_config(database), lifespan)
    except CommandError as exc:
        raise StoreUnusable(
            f"{database} was written by a newer version of Flower than the installed one",
            remedy=f"Install that version of Flower again, or remove {database.name}* in"
            f" {database.parent}: what is lost are messages under way.",
        ) from exc
    included = [(route, getattr(route, "original_router", None)) for route in app.router.routes]
    app.router.routes[:] = [route for route, router in included if router is fleet_router]
    app.user_middleware = [layer for layer in app.user_middleware if layer.cls in _NEEDED]
    return app


def lighten(state: Any, objects: ObjectStore) -> None:
    """Leave out of a link state what Flower does at every request and nobody here needs.

    Parts of messages go to `objects` instead of tables. Flower looks twice for processes whose token has
    expired (`Link.new_run` gives no tokens), and adds up bytes for a bill: four writing statements a
    request. And it lets each of a dozen connections keep 64 MB of pages, for rows that are read once.
    """
    state._cleanup_expired_task_tokens = lambda: None
    state.store_traffic = lambda run_id, *, bytes_sent, bytes_recv: None
    state.object_store._engine.dispose()
    state._object_store = objects
    event.listen(state._engine, "connect", _keep_little)
    state._engine.dispose()


def _keep_little(connection: Any, _record: Any) -> None:
    cursor = connection.cursor()
    for pragma in ("cache_size = -2000", "mmap_size = 0"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _config(database: Path) -> SuperLinkLifespanConfig:
    return SuperLinkLifespanConfig(
        control_address="",
        health_server_address=None,
        host="127.0.0.1",
        port=0,
        insecure=False,
        certificates=None,
        superexec_auth_secret=os.urandom(32),  # nobody knows it: no task can be acquired
        authn_plugin=NoOpControlAuthnPlugin(),
        event_log_plugin=None,
        fleet_event_log_plugin=None,
        enable_event_log=False,
        artifact_provider=None,
        enable_supernode_auth=True,
        fleet_api_type="grpc-rere",
        fleet_api_address=None,
        simulation=False,
        ssl_ca_certfile=None,
        ssl_certfile=None,
        ssl_keyfile=None,
        database=str(database),
        isolation="process",  # no child process
        runtime_dependency_install=False,
    )
