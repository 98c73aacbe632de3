"""Claims about the pages under arbitrary requests: schemathesis finds no answer of 500 or above."""

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings

from silotune.dashboard.accounts import Accounts
from silotune.dashboard.page_guard import Access
from silotune.dashboard.pages import Content, build
from silotune.server.admin.operations import ACCOUNTS_FILE
from tests.server.monitored import office, tell_round
from tests.server.test_alerts import Told
from tests.server.test_coordinator_dashboard import PASSWORD, signed_in

__all__ = ["office"]

FEW = settings(
    max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


@pytest.fixture(scope="module")
def operator(office):
    Accounts(office.home.state / ACCOUNTS_FILE).add("olga", "operator", PASSWORD)
    tell_round(office.told_run("demo-1"), 1, ["a", "b"])
    office.asks_to_join("west")
    return signed_in(f"http://127.0.0.1:{office.coordinator.config.dashboard.port}", "olga")


def operations():
    """Every route of the pages, as FastAPI describes it; the server itself does not tell."""
    content = Content(title="x", source=Told(), operations=object())
    doorman = build(content, Access(hosts=frozenset()))
    schema = schemathesis.openapi.from_dict(doorman._app.openapi())
    return [found.ok() for found in schema.get_all_operations()]


@pytest.mark.parametrize("operation", operations(), ids=lambda found: found.label)
def test_no_request_makes_the_server_fail(operation, operator):
    @FEW
    @given(operation.as_strategy())
    def ask(case):
        path = case.formatted_path
        if path.endswith("/stream"):
            path = "/runs/none-of-ours/stream"  # one of ours would not end
        body = dict(case.body) if isinstance(case.body, dict) else {}
        ours = {} if path == "/signout" else {"token": operator.token}  # it shall stay signed in
        for person, extra in ((operator, ours), (stranger, {})):
            answer = person.request(
                case.method,
                f"{operator.base_url}".rstrip("/") + path,
                params=case.query or None,
                data={**body, **extra} if case.method == "POST" else None,
            )
            assert answer.status_code < 500, (case.method, path, answer.text[:200])

    with httpx.Client(trust_env=False, timeout=30) as stranger:
        ask()


def test_the_operator_was_let_in_all_the_while(operator):
    assert operator.get("/actions").status_code == 200
