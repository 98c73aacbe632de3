"""Records in a database, from a trainer's side: one port, a name that was looked up before."""

import socket
import subprocess
import sys

import pytest

from silotune.client.training.bounds import table_of
from silotune.client.training.database import address_of, certificates_of, looked_up
from silotune.data.site import SiteConfig

DRIVER = """
import socket, sys
from silotune.client.isolation.confinement import Confinement, confine
from silotune.client.training.database import looked_up
place = ("localhost", int(sys.argv[1]))
if sys.argv[2] == "looked up":
    looked_up(f"mysql+pymysql://reader@localhost:{place[1]}/clinic", place)
confine(Confinement(reach=place))
for host, port in (place, ("localhost", int(sys.argv[3])), ("example.org", place[1])):
    try:
        socket.create_connection((host, port), timeout=5).close()
        print("connected")
    except OSError as exc:
        print(type(exc).__name__)
"""


@pytest.fixture
def ports():
    """Two servers on this machine, the first of which is the database."""
    with (
        socket.create_server(("127.0.0.1", 0)) as one,
        socket.create_server(("127.0.0.1", 0)) as two,
    ):
        yield [str(server.getsockname()[1]) for server in (one, two)]


@pytest.mark.parametrize(
    "how, ends",
    [
        ("looked up", ["connected", "gaierror", "gaierror"]),
        ("not looked up", ["gaierror", "gaierror", "gaierror"]),
    ],
)
def test_a_confined_driver_connects_by_the_name_that_was_looked_up(ports, how, ends):
    command = [sys.executable, "-c", DRIVER, ports[0], how, ports[1]]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert ran.stdout.split() == ends


def test_postgresql_is_given_the_address_beside_the_name(monkeypatch):
    def lookup(host, port, **options):
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.7", port))]

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    url = "postgresql+psycopg://reader:p%40ss@db.internal/clinic?sslmode=verify-full"
    assert looked_up(url, ("db.internal", 5432)) == url + "&hostaddr=192.0.2.7"
    assert socket.getaddrinfo("db.internal", "5432", 0, 0)[0][4] == ("192.0.2.7", 5432)
    assert socket.getaddrinfo("else.internal", 1)[0][4] == ("192.0.2.7", 1)  # asked anew


def test_a_name_that_is_not_found_stays(monkeypatch):
    def lookup(*place, **options):
        raise socket.gaierror("not known")

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    url = "postgresql://db.internal/clinic"
    assert looked_up(url, ("db.internal", 5432)) == url


def test_where_a_database_is_and_the_files_of_its_connection():
    assert address_of("") is None
    assert address_of("sqlite:///records.db") is None
    assert address_of("postgresql+psycopg://reader@db.internal/clinic") == ("db.internal", 5432)
    assert address_of("mysql+pymysql://db:3307/clinic") == ("db", 3307)
    url = "postgresql://db/clinic?sslmode=verify-full&sslrootcert=/etc/clinic/root.crt"
    assert [str(path) for path in certificates_of(url)] == ["/etc/clinic/root.crt"]


def test_a_trainer_may_read_the_synonyms_and_the_certificates(tmp_path, monkeypatch):
    monkeypatch.setenv("URL", "postgresql://db:99/clinic?sslrootcert=/etc/root.crt")
    raw = {
        "name": "s",
        "datasets": {
            "notes": {
                "format": "sql", "url": "${URL}", "query": "SELECT 1", "declared_units": 10,
                "columns": {"text": "note"},
                "augmentation": {"synonyms": "words.txt", "replace": 0.2},
            }
        },
    }  # fmt: skip
    site = SiteConfig.from_mapping(raw, folder=tmp_path)
    found = table_of(site, scratch=tmp_path / "scratch")["datasets"]["notes"]
    assert found["read"] == [str(tmp_path / "words.txt"), "/etc/root.crt"]
    assert list(found["reach"]) == ["db", 99]
