"""Claims about the pages off loopback: TLS, and people who sign in with a certificate."""

import re
import ssl

import httpx
import pytest

from silotune.server.store.people import People
from silotune.trust.authority import Authority
from tests.server.monitored import Office, tell_round

HTML = {"accept": "text/html"}
GET = ["/", "/runs/demo-1", "/runs/demo-1/live", "/runs/demo-1/stream", "/compare", "/sites"]
GET += ["/actions", "/metrics", "/runs/demo-1/files/plan.json"]
POST = ["/runs/demo-1/stop", "/enrolments/0/approve", "/sites/north/revoke", "/signout"]


@pytest.fixture(scope="module")
def office(tmp_path_factory):
    """As if it listened on another address: this machine has none but loopback."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("silotune.server.monitoring.LOOPBACK", frozenset())
        made = Office(tmp_path_factory.mktemp("office"))
        tell_round(made.told_run("demo-1"), 1, ["a", "b"])
        yield made
        made.close()


def browser(office, folder=None):
    """A client that trusts the federation's authority and shows the certificate of a folder."""
    trusted = ssl.create_default_context()
    trusted.load_verify_locations(office.home.keys / "authority.pem")
    if folder is not None:
        trusted.load_cert_chain(folder / "certificate.pem", folder / "key.pem")
    port = office.coordinator.config.dashboard.port
    url = f"https://127.0.0.1:{port}"
    return httpx.Client(base_url=url, verify=trusted, trust_env=False, timeout=30)


def enter(client):
    return client.post("/signin", data={"how": "certificate"})


def token(client):
    return re.search(r'name="token" value="([^"]+)"', client.get("/", headers=HTML).text)[1]


def test_people_sign_in_with_their_certificate_in_their_role(office):
    vera = browser(office, office.credentials("vera", "viewer"))
    olga = browser(office, office.credentials("olga", "operator"))
    for person, words in ((vera, "vera, viewer"), (olga, "olga, operator")):
        answer = enter(person)
        assert answer.status_code == 303
        cookie = answer.headers["set-cookie"].lower()
        assert cookie.startswith("__host-silotune=")
        assert "secure" in cookie
        assert words in person.get("/", headers=HTML).text
        for path in GET:
            if not path.endswith("/stream"):
                assert person.get(path).status_code == 200, path
    stop = "/runs/demo-1/stop"
    assert vera.post(stop, data={"token": token(vera)}).status_code == 403
    assert office.coordinator.run_control.runs.get("demo-1")["state"] == "running"
    assert olga.post(stop, data={"token": token(olga)}).status_code == 303
    assert office.coordinator.run_control.runs.get("demo-1")["state"] == "stopped"


def test_a_certificate_alone_is_no_session(office):
    client = browser(office, office.credentials("vincent", "viewer"))
    for path in GET:
        assert client.get(path).status_code == 401, path
    for path in POST:
        assert client.post(path).status_code == 401, path


def test_a_foreign_or_expired_certificate_does_not_even_connect(office):
    foreign = office.credentials("mallory", "operator", authority=Authority.create("demo"))
    expired = office.credentials("ed", "operator", days=-0.01)
    for folder in (foreign, expired):
        client = browser(office, folder)
        for path in [*GET, "/signin", "/static/dashboard.css"]:
            with pytest.raises(httpx.TransportError):
                client.get(path)
        for path in [*POST, "/signin"]:
            with pytest.raises(httpx.TransportError):
                client.post(path)


def test_a_revoked_certificate_and_one_of_a_site_do_not_sign_in(office):
    revoked = office.credentials("rita", "operator")
    People(office.coordinator.store).revoke("rita")
    for folder in (revoked, office.credentials("north", "site", days=1)):
        client = browser(office, folder)
        assert enter(client).status_code == 401
        assert client.get("/").status_code == 401


def test_a_certificate_that_is_revoked_later_ends_the_session_that_it_began(office):
    client = browser(office, office.credentials("rosa", "viewer"))
    assert enter(client).status_code == 303
    assert client.get("/").status_code == 200
    assert People(office.coordinator.store).revoke("rosa")
    assert client.get("/").status_code == 401


def test_without_a_certificate_every_page_is_shut_and_says_so_over_tls(office):
    client = browser(office)
    assert enter(client).status_code == 401
    for path in GET:
        answer = client.get(path)
        assert answer.status_code == 401, path
        assert answer.headers["strict-transport-security"]
    for path in POST:
        assert client.post(path).status_code == 401, path


def test_tls_below_1_3_is_refused(office):
    old = ssl.create_default_context()
    old.load_verify_locations(office.home.keys / "authority.pem")
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    port = office.coordinator.config.dashboard.port
    with pytest.raises(httpx.TransportError), httpx.Client(verify=old, trust_env=False) as client:
        client.get(f"https://127.0.0.1:{port}/signin")
