"""The Ray engine gives the apps what WorkerGrid gives them, and leaves nothing behind."""

import importlib.util
import os

import numpy as np
import psutil
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import ServerApp

from silotune.errors import EnvironmentFault, QuorumLost, WorkerDied
from silotune.simulation import ray_engine
from silotune.simulation.grid import WorkerGrid
from silotune.simulation.pool import SiteSlot
from silotune.simulation.ray_engine import run_with_ray

SITES = [SiteSlot("eye"), SiteSlot("heart"), SiteSlot("skin")]


def instructions(nodes, kind, **config):
    flat = Array(np.arange(4, dtype=np.float32))
    content = RecordDict({"arrays": ArrayRecord({"flat": flat}), "config": ConfigRecord(config)})
    return [Message(content, node, kind, group_id="1") for node in nodes]


def conversation(told):
    """A ServerApp that tells what the sites said, by site."""
    app = ServerApp()

    @app.main()
    def main(grid, context):
        nodes = grid.get_node_ids()
        names = {}
        for reply in grid.send_and_receive(instructions(nodes, "query.who"), timeout=60):
            who = dict(reply.content["who"])
            names[reply.metadata.src_node_id] = who["site"]
            told[who["site"]] = [(who["partition-id"], who["num-partitions"])]
        for how in ("", "", "coded", "text"):
            sent = instructions(nodes, "train", do=how)
            ids = set(grid.push_messages(sent))
            assert ids == {message.metadata.message_id for message in sent}
            while ids:
                for reply in grid.pull_messages(ids):
                    ids.discard(reply.metadata.reply_to_message_id)
                    told[names[reply.metadata.src_node_id]].append(summary(reply))

    return app


def summary(reply):
    if reply.has_error():
        return reply.error.code, reply.error.reason
    # what differs between engines: the sites multiply by their node id
    flat = reply.content["update"]["flat"].numpy() / np.float32(reply.metadata.src_node_id)
    return reply.content["released"]["seen"], flat.round(3).tolist()


def test_sites_say_the_same_on_ray_as_on_worker_grid():
    environment = dict(os.environ)
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    on_ray, on_grid = {}, {}
    run_with_ray(
        conversation(on_ray),
        "grid_programs:build",
        {},
        sites=SITES,
        workers=2,
    )
    with WorkerGrid("grid_programs:build", {}, SITES, workers=0) as grid:
        context = Context(1, 0, {}, RecordDict(), {})
        conversation(on_grid)(grid=grid, context=context)
    assert on_ray == on_grid
    assert on_ray["heart"] == [
        (1, 3),
        (1, [0.0, 1.0, 2.0, 3.0]),
        (2, [0.0, 1.0, 2.0, 3.0]),  # a site's state lasts
        (2, "ST-401"),
        (2, "ST-000"),
    ]
    assert dict(os.environ) == environment
    remaining = [p for p in psutil.Process().children(recursive=True) if p.pid not in before]
    _, alive = psutil.wait_procs(remaining, timeout=90)
    assert not alive


def test_without_ray_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentFault) as caught:
        run_with_ray(ServerApp(), "grid_programs:build", {}, sites=SITES, workers=1)
    assert "silotune[ray]" in caught.value.remedy


@pytest.fixture
def engine(monkeypatch):
    """Flower's engine replaced by one that calls the ServerApp here, then does as told."""
    import flwr.simulation

    class Empty:
        nodes = (5, 3, 9)

        def get_node_ids(self):
            return self.nodes

        def pull_messages(self, ids):
            return []

    def pretend(then):
        def run_simulation(server, client, *, num_supernodes, backend_config):
            context = Context(1, 0, {}, RecordDict(), {})
            then(lambda: server(grid=Empty(), context=context))

        monkeypatch.setattr(flwr.simulation, "run_simulation", run_simulation)

    return pretend


def test_what_the_server_app_raises_is_raised_as_it_is(engine):
    app = ServerApp()

    @app.main()
    def main(grid, context):
        assert grid.get_node_ids() == [3, 5, 9]
        raise QuorumLost("1 of 3")

    engine(lambda serve: serve())
    with pytest.raises(QuorumLost, match="1 of 3"):
        run_with_ray(app, "grid_programs:build", {}, sites=SITES, workers=1)


def test_a_crash_of_the_engine_ends_a_server_app_that_waits(engine):
    import threading
    import time

    started, ended = threading.Event(), threading.Event()
    app = ServerApp()

    @app.main()
    def main(grid, context):
        try:
            while True:
                grid.pull_messages(["never"])
                started.set()
                time.sleep(0.01)
        finally:
            ended.set()

    def crash(serve):
        threading.Thread(target=serve).start()
        started.wait(10)
        raise RuntimeError("Simulation Runtime crashed.")

    engine(crash)
    with pytest.raises(WorkerDied, match="ended early"):
        run_with_ray(app, "grid_programs:build", {}, sites=SITES, workers=1)
    assert ended.is_set()


def test_an_error_of_the_engine_itself_crosses_as_a_code(caplog):
    from flwr.app.error import Error

    [instruction] = instructions([1], "train")
    reply = Message(Error(0, "<class 'RayActorError'>: patient 4711"), reply_to=instruction)
    assert ray_engine._coded(reply).error.reason == "ST-604"
    assert "patient 4711" in caplog.text
