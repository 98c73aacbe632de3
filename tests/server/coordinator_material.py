"""A coordinator in this process, and sites with scripted work.

By default the store is a SQLite file. ``SILOTUNE_TEST_POSTGRES=postgresql+psycopg://user@host/postgres``
makes it a database of a PostgreSQL server instead, a new one for each test.
"""

import os
import secrets
import socket

import numpy as np
import pytest
import sqlalchemy
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from silotune.models.layout import ArrayEntry, Layout
from silotune.plan.plan import Plan
from silotune.server.config import Home
from silotune.server.coordinator import create
from tests.server.fleet_site import FleetSite
from tests.server.opening import open_coordinator

LAYOUT = Layout(
    (
        ArrayEntry("base_model.model.layer.0.lora_A.weight", (2, 6), "adapter"),
        ArrayEntry("base_model.model.layer.0.lora_B.weight", (6, 2), "adapter"),
        ArrayEntry("head.weight", (2, 6), "head"),
        ArrayEntry("head.bias", (2,), "head"),
    )
)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def store_url(folder):
    """URL of a store that is new."""
    server = os.environ.get("SILOTUNE_TEST_POSTGRES")
    if not server:
        return f"sqlite:///{folder / 'c.sqlite'}"
    name = f"silotune_{secrets.token_hex(6)}"
    engine = sqlalchemy.create_engine(server, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
    engine.dispose()
    return sqlalchemy.make_url(server).set(database=name).render_as_string(hide_password=False)


def small_plan(**settings):
    raw = {
        "plan": {"name": "t", "purpose": "t", "seed": 1},
        "model": {"base": "x", "task": "text_classification", "labels": ["a", "b"]},
        "data": {"dataset": "d"},
        "rounds": {"number": 3, "min_sites": 2, "deadline": 30.0},
        "privacy": {"mode": "none", "rate": 0.1},
    }
    return Plan.from_mapping(raw).override(settings)


def scripted(name, *, size=LAYOUT.size):
    """Work of a site: joins, and trains to noise that depends on its name and the round."""

    def work(address, content):
        if address.kind == "query.join":
            released = {"site": name, "declared_units": 100, "layout": LAYOUT.to_json()}
            return RecordDict({"released": ConfigRecord(released)})
        rng = np.random.default_rng([address.round, sum(name.encode())])
        flat = rng.normal(size=size).astype(np.float32)
        update = ArrayRecord({"flat": Array(flat)})
        return RecordDict({"update": update, "released": MetricRecord({})})

    return work


class Town:
    """A coordinator that can be restarted, and its sites."""

    def __init__(self, folder):
        self.home = Home(folder / "coordinator")
        create(self.home, name="demo", hosts=["127.0.0.1"], listen="127.0.0.1", port=free_port())
        text = self.home.config_path.read_text().replace("# patience = 120.0", "patience = 60.0  #")
        url = store_url(self.home.state)
        text = text.replace("[store]", f'[store]\nurl = "{url}"')
        self.home.config_path.write_text(text)
        self.sites = []
        self.start()

    def start(self):
        self.coordinator = open_coordinator(self.home)
        self.coordinator.start()
        return self.coordinator

    def restart(self):
        self.coordinator.close()
        return self.start()

    def invited(self, name):
        """A site that has a code and nothing else."""
        code = self.coordinator.registrar.invite(name, url=self.coordinator.url)
        site = FleetSite(name, code)
        self.sites.append(site)
        return site

    def enrolled(self, name):
        """A site with its certificate."""
        site = self.invited(name)
        assert site.ask().status_code == 200
        self.coordinator.registrar.approve(site.enrolment)
        assert site.collect().state == "approved"
        return site

    def serving(self, *names):
        """Sites that answer like `scripted`."""
        return [self.enrolled(name).activate().serve(scripted(name)) for name in names]

    def audit(self, kind):
        """Lines of the coordinator's audit log of one kind."""
        return [line.fields for line in self.coordinator.audit.lines() if line.kind == kind]

    def close(self):
        for site in self.sites:
            site.hang_up()  # otherwise the coordinator's end waits for connections to be closed
        self.coordinator.close()
        for site in self.sites:
            site.join()


@pytest.fixture
def town(tmp_path):
    made = Town(tmp_path)
    yield made
    made.close()
