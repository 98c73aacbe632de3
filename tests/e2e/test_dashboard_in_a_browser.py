"""The coordinator's pages in a real browser, over a federation of real processes."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright

from tests.e2e.harness import CLI, SiteProcess, as_toml, environment, free_port, wait_for

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
    """Start with the pages on, and give two people passwords; the pages' address."""
    port, config = free_port(), made.coordinator.folder / "coordinator.toml"
    config.write_text(config.read_text().replace("# port = 8445", f"port = {port}"))
    made.coordinator.up()
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
            expected = "404" if name == "error" else "nothing"
            assert [told for told in person.problems if expected not in told] == []
            person.page.context.close()


def let_longer_runs_in(made):
    """The sites of this test allow more rounds than those of the others."""
    for site in made.sites.values():
        site.config.write_text(
            site.config.read_text().replace("max_rounds = 50", "max_rounds = 400")
        )


def a_stranger(made):
    """A fourth site that asks to be let in, and waits."""
    folder = made.folder / "sites" / "alpha"
    shutil.copytree(folder, folder.with_name("delta"), ignore=shutil.ignore_patterns("state"))
    stranger = SiteProcess(folder.with_name("delta"))
    stranger.config.write_text(stranger.config.read_text().replace('"alpha"', '"delta"'))
    return stranger.joining(made.coordinator.invite("delta"))


def attempt(person, path):
    """What becomes of a form that the page does not even offer; the status of the answer."""
    return person.page.evaluate(
        """path => fetch(path, {method: "POST", redirect: "manual",
             body: new URLSearchParams({token: document.querySelector("[name=token]").value})})
           .then(answer => answer.status)""",
        path,
    )


def approved_in_the_browser(made, olga, joins):
    """Approve every request that waits; each site's people saw the words that the page shows."""
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


@pytest.mark.timeout(900)
def test_a_federation_is_run_from_the_browser(federation, chromium):
    made = federation(rounds__number=400, rounds__evaluate_every=1, privacy__metrics_share=0.1)
    url = with_dashboard(made)
    let_longer_runs_in(made)
    joins = {n: s.joining(made.coordinator.invite(n)) for n, s in made.sites.items()}
    wait_for(made._all_ask, what="three requests")
    olga, vera = Person(chromium, url, "olga"), Person(chromium, url, "vera")
    waiting = made.coordinator.admin.get("/requests")
    vera.go("/sites")
    assert vera.page.locator("text=approve").count() == 0
    assert attempt(vera, f"/enrolments/{waiting[0]['request']}/approve") == 403
    assert made.coordinator.admin.get("/requests") == waiting
    approved_in_the_browser(made, olga, joins)

    run = made.propose()
    made.coordinator.wait_round(run, 1, kind="round_finished")
    olga.go(f"/runs/{run}")
    olga.page.evaluate("window.mark = 'not loaded again'")
    first = rounds_done(olga.page)
    wait_for(lambda: rounds_done(olga.page) >= first + 3, what="three more rounds")
    assert olga.page.evaluate("window.mark") == "not loaded again"

    vera.go(f"/runs/{run}")
    assert vera.page.locator("text=Stop for good").count() == 0
    assert attempt(vera, f"/runs/{run}/stop") == 403
    assert made.coordinator.state(run)["state"] == "running"

    olga.page.on("dialog", lambda dialog: dialog.accept())
    olga.page.click("text=Stop for good")
    olga.page.wait_for_load_state()
    wait_for(lambda: made.coordinator.state(run)["state"] == "stopped", what="the stop")
    olga.page.wait_for_selector("[data-part=head] .tile.s-stopped")
    olga.page.wait_for_selector("text=Stop for good", state="hidden")
    assert olga.problems == []
    the_other_pages(made, chromium, url, olga, run)


def the_other_pages(made, chromium, url, olga, run):
    """Pictures of them, with a second run to compare with and a site that waits."""
    changes = {"rounds.number": 16, "optimizer.site.head_lr": 0.05}
    made.plan_path.write_text(as_toml(json.loads(made.plan.override(changes).canonical())))
    second = made.propose()
    state = made.coordinator.state
    wait_for(lambda: state(second)["round"] >= 9, seconds=240, what="nine rounds", every=0.2)
    picture(chromium, url, "run", f"/runs/{second}")
    assert made.coordinator.wait_over(second, seconds=240)["state"] == "finished"
    stranger = a_stranger(made)
    wait_for(lambda: len(made.coordinator.admin.get("/requests")) == 4, what="a fourth request")
    for name, path in (
        ("overview", "/"),
        ("sites", "/sites"),
        ("actions", "/actions"),
        ("compare", f"/compare?run={run}&run={second}"),
        ("error", "/runs/none-of-ours"),
        ("signin", "/?signin"),
    ):
        picture(chromium, url, name, path)
    olga.go("/sites")
    olga.page.click("text=Refuse >> nth=0")
    olga.page.wait_for_load_state()
    assert "delta: refused" in olga.page.inner_text("main")
    assert stranger.wait(timeout=120) != 0
    olga.go("/actions")
    text = olga.page.inner_text("main")
    assert re.search(r"olga\s+operator\s+stop", text)
    assert re.search(r"vera\s+viewer\s+stop", text)
    assert re.search(r"vera\s+viewer\s+approve", text)
    assert re.search(r"olga\s+operator\s+refuse\s+delta", text)


def rounds_done(page):
    return int(page.evaluate("document.querySelector('[data-part=head] progress').value"))
