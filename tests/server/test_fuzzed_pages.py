"""Claims about the pages under arbitrary requests: schemathesis finds no answer of 500 or above."""

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.pytest import from_fixture

from silotune.dashboard.accounts import Accounts
from silotune.dashboard.doorman import Door
from silotune.dashboard.pages import Content, build
from silotune.server.dashboard import ACCOUNTS_FILE
from tests.server.monitored import office, tell_round
from tests.server.test_coordinator_dashboard import PASSWORD, signed_in

__all__ = ["office"]

FEW = settings(
    max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


@pytest.fixture(scope="module")
def operator(office):
    Accounts(office.home.state / ACCOUNTS_FILE).add("olga", "operator", PASSWORD)
    tell_round(office.told_run("demo-1"), 1, ["a", "b"])
    office.asks_to_join("west")
    return signed_in(f"http://127.0.0.1:{office.coordinator.config.dashboard.port}", "olga")


@pytest.fixture(scope="module")
def described(office):
    """The pages as FastAPI describes them; the server itself does not tell."""
    operations = office.coordinator.monitoring.operations
    content = Content(title="x", source=operations.source, desk=operations)
    doorman = build(content, Door(hosts=frozenset()))
    return schemathesis.openapi.from_dict(doorman._app.openapi())


api = from_fixture("described")


@api.parametrize()
@FEW
def test_no_request_makes_the_server_fail(case, operator):
    path = case.formatted_path
    if path.endswith("/stream"):
        path = "/runs/none-of-ours/stream"  # one of ours would not end
    body = dict(case.body) if isinstance(case.body, dict) else {}
    ours = {} if path == "/signout" else {"token": operator.token}  # it shall stay signed in
    for person, extra in ((operator, ours), (httpx, {})):
        answer = person.request(
            case.method,
            f"{operator.base_url}{path}",
            params=case.query or None,
            data={**body, **extra} if case.method == "POST" else None,
            **({"trust_env": False} if person is httpx else {}),
        )
        assert answer.status_code < 500, (case.method, path, answer.text[:200])


def test_the_operator_was_let_in_all_the_while(operator):
    assert operator.get("/actions").status_code == 200
