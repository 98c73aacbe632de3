"""The coordinator's pages in a real browser, over a federation of real processes."""

import os
import re
import subprocess
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright

from tests.e2e.harness import CLI, environment, free_port, wait_for

pytestmark = pytest.mark.slow

IMAGES = Path(__file__).parents[2] / "docs" / "images"
SIZES = {"desktop": (1280, 800), "phone": (390, 844)}
PASSWORD = "correct horse battery"


@pytest.fixture
def chromium():
    with sync_playwright() as playwright:
        # Chromium's own sandbox does not start for root, as tests run in a container.
        path = "/usr/bin/chromium"
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


class Person:
    """Somebody at a browser; `problems` is what its console complained about."""

    def __init__(self, chromium, url, name, **looks):
        self.url, self.problems = url, []
        self.page = chromium.new_context(**looks).new_page()
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on(
            "console",
            lambda said: self.problems.append(said.text) if said.type == "error" else None,
        )
        self.page.goto(url)
        assert self.page.url == f"{url}/signin"
        self.page.fill("input[name=name]", name)
        self.page.fill("input[name=password]", PASSWORD)
        self.page.click("text=Sign in >> nth=-1")
        self.page.wait_for_url(f"{url}/")

    def go(self, path):
        self.page.goto(self.url + path)


def with_dashboard(made):
    """Switch the pages on, and give two people passwords; the pages' address."""
    port, config = free_port(), made.coordinator.folder / "coordinator.toml"
    config.write_text(config.read_text().replace("# port = 8445", f"port = {port}"))
    for name, role in (("vera", "viewer"), ("olga", "operator")):
        words = ["coordinator", "people", "password", name, "--role", role]
        subprocess.run(
            [*CLI, *words, "--dir", str(made.coordinator.folder)],
            check=True,
            input=PASSWORD + "\n",
            text=True,
            env=environment(),
        )
    return f"http://127.0.0.1:{port}"


def picture(chromium, url, name, path, *, act=None):
    """Screenshots of a page, light and dark, desktop and phone; nothing may stick out."""
    folder = Path(os.environ.get("SILOTUNE_SCREENSHOTS", IMAGES))
    for scheme in ("light", "dark"):
        for kind, (width, height) in SIZES.items():
            looks = {"viewport": {"width": width, "height": height}, "color_scheme": scheme}
            person = Person(chromium, url, "olga", **looks)
            person.go(path)
            if act:
                act(person.page)
            if "signin" in path:
                person.page.click("text=Sign out")
            person.page.screenshot(path=folder / f"{name}-{scheme}-{kind}.png", full_page=True)
            wide = person.page.evaluate("document.documentElement.scrollWidth")
            assert wide <= width, f"{name} is {wide} wide on a {kind}"
            assert not person.problems
            person.page.context.close()


def test_a_federation_is_run_from_the_browser(federation, chromium):
    made = federation(rounds__number=400, rounds__evaluate_every=0)
    url = with_dashboard(made)
    made.coordinator.up()
    joins = {n: s.joining(made.coordinator.invite(n)) for n, s in made.sites.items()}
    wait_for(made._all_ask, what="three requests")
    picture(chromium, url, "enrolments", "/sites")

    olga = Person(chromium, url, "olga")
    olga.go("/sites")
    words = [text.strip() for text in olga.page.locator(".words").all_inner_texts()]
    for _ in joins:
        olga.page.click("text=The words are the same: approve >> nth=0")
        olga.page.wait_for_load_state()
    said = {name: process.communicate(timeout=120)[0] for name, process in joins.items()}
    assert all(any(six in text for six in words) for text in said.values())
    for site in made.sites.values():
        site.start()
    made.wait_online()

    run = made.propose()
    made.coordinator.wait_round(run, 1, kind="round_finished")
    olga.go(f"/runs/{run}")
    olga.page.evaluate("window.mark = 'not loaded again'")
    first = rounds_done(olga.page)
    wait_for(lambda: rounds_done(olga.page) >= first + 3, what="three more rounds")
    assert olga.page.evaluate("window.mark") == "not loaded again"

    vera = Person(chromium, url, "vera")
    vera.go(f"/runs/{run}")
    assert vera.page.locator("text=Stop for good").count() == 0
    status = vera.page.evaluate(
        """run => fetch(`/runs/${run}/stop`, {method: "POST", redirect: "manual",
             body: new URLSearchParams({token: document.querySelector("[name=token]").value})})
           .then(answer => answer.status)""",
        run,
    )
    assert status == 403
    assert made.coordinator.state(run)["state"] == "running"

    picture(chromium, url, "run", f"/runs/{run}")
    olga.page.on("dialog", lambda dialog: dialog.accept())
    olga.page.click("text=Stop for good")
    olga.page.wait_for_load_state()
    wait_for(lambda: made.coordinator.state(run)["state"] == "stopped", what="the stop")
    olga.page.wait_for_selector("[data-part=head] .tile.s-stopped")
    assert olga.problems == []

    for name, path in (
        ("overview", "/"),
        ("sites", "/sites"),
        ("actions", "/actions"),
        ("compare", f"/compare?run={run}"),
        ("signin", "/?signin"),
    ):
        picture(chromium, url, name, path)
    olga.go("/actions")
    text = olga.page.inner_text("main")
    assert re.search(r"olga\s+operator\s+stop", text)
    assert "vera" in text


def rounds_done(page):
    return int(page.evaluate("document.querySelector('[data-part=head] progress').value"))
