"""A browser without a browser: requests to the pages, with a session and its token."""

import re

from starlette.testclient import TestClient

from silotune.dashboard.page_guard import Access, OwnerLink
from silotune.dashboard.pages import Content, build
from silotune.trust.identity import Person

HTML = {"accept": "text/html"}


def browser(content, *, role="viewer", name="vera", signed_in=True, accounts=None):
    """A client of the pages on loopback; `client.access` and `client.token` are its session's."""
    access = Access(
        hosts=frozenset({"127.0.0.1"}),
        link=OwnerLink(Person(name=name, role=role)),
        accounts=accounts,
    )
    client = TestClient(build(content, access), base_url="http://127.0.0.1", follow_redirects=False)
    client.access, client.token = access, ""
    if signed_in:
        answer = client.get("/signin", params={"link": access.link.secret})
        assert answer.status_code == 303
        page = client.get("/", headers=HTML)
        client.token = re.search(r'name="token" value="([^"]+)"', page.text)[1]
    return client


def of(source, **more):
    return Content(title="demo", source=source, **more)
