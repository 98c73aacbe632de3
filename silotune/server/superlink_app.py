"""Flower's SuperLink as an ASGI application: how it is made, and the paths that sites need of it."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

from fastapi import FastAPI
from flwr.superlink.auth_plugin import NoOpControlAuthnPlugin
from flwr.superlink.config_loader import SuperLinkLifespanConfig
from flwr.superlink.main import create_app

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


def superlink_app(database: Path) -> FastAPI:
    """The whole SuperLink over a link state in a SQLite file, without any process of Flower's."""
    # The package attribute of that name is a function, so the module is asked for by name.
    lifespan = importlib.import_module("flwr.superlink.cli.flower_superlink").SuperLinkLifespan
    return create_app(_config(database), lifespan)


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
