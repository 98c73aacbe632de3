"""Claims about the record: who did what with which outcome, whichever way they came.

Every command of `silotune coordinator` and `silotune admin`, every route of the socket and every form of
the pages is either among those that only look, or is tried here, done and refused: one that is added
and leaves no record fails.
"""

import json
import os
import pwd
import re

import httpx
import pytest
import typer.main
from typer.testing import CliRunner

from silotune import cli
from silotune.dashboard.page_guard import Access
from silotune.dashboard.pages import Content, build
from silotune.plan.plan import Plan
from silotune.server.admin.operations import Operations
from silotune.server.admin.socket import AdminRoutes
from silotune.server.admin.socket_client import AdminClient
from silotune.trust import identity
from silotune.trust.identity import Person, account_of
from tests.golden.registry import GOLDEN
from tests.server.monitored import office, plan_of, tell_round
from tests.server.test_alerts import Told

__all__ = ["office"]

ME = (f"{pwd.getpwuid(os.getuid()).pw_name} (uid {os.getuid()})", "operator")
OLGA, VERA = ("olga", "operator"), ("vera", "viewer")
PASSWORD = "correct horse battery"
HTML = {"accept": "text/html"}
QUESTIONS = {
    *("status", "sites", "requests", "runs", "run", "events", "people", "actions", "alarms"),
    *("holder", "signed_in", "refused"),
}


class Records:
    """What is newly recorded, in the three places where it has to be."""

    def __init__(self, office):
        self._office = office
        self._start = self._all()

    def _all(self):
        coordinator = self._office.coordinator
        fields = ("who", "role", "action", "target", "outcome")
        runs = [row["run"] for row in coordinator.operations.runs()]
        events = [e for run in runs for e in coordinator.operations.source.events(run)]
        events += coordinator.log.events("")
        audited = [x.fields for x in coordinator.audit.lines() if x.kind == "operator_action"]
        told = sorted((e["id"], e) for e in events if e["event"] == "operator_action")
        listed = reversed(coordinator.operations.actions())
        places = (listed, audited, (event for _, event in told))
        return [[tuple(row[field] for field in fields) for row in place] for place in places]

    def new(self):
        """The records since the start; they are the same in the list, the audit log and the events."""
        listed, audited, told = (
            rows[len(before) :] for rows, before in zip(self._all(), self._start, strict=True)
        )
        assert listed == audited == told
        return listed


class Stage:
    """Makes what an action needs: each name is used once."""

    number = 0

    def __init__(self, office, folder):
        Stage.number += 1
        self.office, self.folder, self.name = office, folder, f"n{Stage.number}"
        self.plan = plan_of(name=self.name)

    @property
    def registrar(self):
        return self.office.coordinator.registrar

    def run(self, state="running"):
        tell_round(self.office.told_run(self.name, state=state), 1, ["a", "b"])
        return self.name

    def asked(self):
        return self.office.asks_to_join(self.name)

    def member(self, name=None):
        self.registrar.approve(self.office.asks_to_join(name or self.name))
        return name or self.name

    def plan_file(self):
        while len(self.registrar.enrolled) < 2:
            self.member(f"member{len(self.registrar.enrolled)}")
        path = self.folder / "plan.toml"
        path.write_text(
            f'[plan]\nname = "{self.name}"\npurpose = "to test"\n'
            '[model]\nbase = "x"\ntask = "text_classification"\nlabels = ["a", "b"]\n'
            '[data]\ndataset = "d"\n'
            "[rounds]\nnumber = 3\nmin_sites = 2\ndeadline = 30.0\n"
            '[privacy]\nmode = "record"\nepsilon = 8.0\ndelta = 1e-5\nrate = 0.1\n'
            "[privacy.clip]\nhead = 1.0\nadapter = 1.0\n"
        )
        return path

    def person(self):
        self.office.credentials(self.name, "viewer")
        return self.name


def on_run(action, state="running"):
    """Done to a run in the right state; refused for one that is not there."""
    return (
        action,
        lambda stage: ([stage.run(state)], stage.name),
        lambda stage: (["nothing"], "nothing", "ST-622"),
    )


def on_request(action):
    def done(stage):
        request = stage.asked()
        return [request], f"{stage.name} {request}"

    return action, done, lambda stage: (["nobody"], "nobody", "ST-622")


def on_member(action):
    return (
        action,
        lambda stage: ([stage.member()], stage.name),
        lambda stage: (["nobody"], "nobody", "ST-622"),
    )


def submitted(stage, *more):
    path = stage.plan_file()
    return [path, *more], Plan.load(path).sha256


def fetched(stage, name, *more):
    return [stage.run(), *more], f"{stage.name}/{name}"


def found_by(kind, plan):
    """What came of a run that trains nothing, as a file to fetch."""

    def counted(stage):
        found = json.loads((GOLDEN / f"{kind}.json").read_text())
        run = stage.office.told_run(stage.name, plan=Plan.load(GOLDEN / plan))
        run.append_event(kind, found=found)
        return [stage.name], f"{stage.name}/{kind}.json"

    return "download", counted, lambda stage: (["nothing"], f"nothing/{kind}.json", "ST-631")


# action, then: words and target of one that is done; words, target and code of one that is refused
COORDINATOR = {
    "invite": (
        "invite",
        lambda stage: ([stage.name], stage.name),
        lambda stage: ([stage.member()], stage.name, "ST-622"),
    ),
    "approve": on_request("approve"),
    "refuse": on_request("refuse"),
    "sites revoke": on_member("revoke"),
    "sites rotate": on_member("rotate"),
    "run": ("submit", submitted, lambda stage: (*submitted(stage, "--quorum", 99), "ST-600")),
    "runs pause": on_run("pause"),
    "runs resume": on_run("resume", "paused"),
    "runs stop": on_run("stop"),
    "runs adapter": (
        "download",
        lambda stage: fetched(stage, "adapter.safetensors", "--out", stage.folder, "--no-peft"),
        lambda stage: (
            ["nothing", "--out", stage.folder],
            "nothing/adapter.safetensors",
            "ST-631",
        ),
    ),
    "runs statistics": found_by("statistics", "plans_that_count/words.toml"),
    "runs votes": found_by("votes", "plans_of_votes/rates.toml"),
    "people add": (
        "add_person",
        lambda stage: ([stage.name, "--role", "viewer", "--out", stage.folder / "p"], stage.name),
        None,  # its arguments are judged before; see the socket's routes below
    ),
    "people revoke": (
        "revoke_person",
        lambda stage: ([stage.person()], stage.name),
        lambda stage: (["nobody"], "nobody", "ST-622"),
    ),
    "people password": (
        "set_password",
        lambda stage: ([stage.name, "--role", "viewer"], stage.name),
        lambda stage: ([stage.name, "--role", "viewer"], stage.name, "ST-730"),
    ),
}
COORDINATOR_LOOKS = {
    *("init", "start", "doctor", "status", "requests", "reseal"),
    *("sites list", "runs list", "runs show", "runs watch", "people list"),
}
ADMIN = {
    "submit": ("submit", submitted),
    "pause": on_run("pause")[:2],
    "resume": on_run("resume", "paused")[:2],
    "stop": on_run("stop")[:2],
    "revoke": on_member("revoke")[:2],
    "approve": on_request("approve")[:2],
    "refuse": on_request("refuse")[:2],
}
ADMIN_LOOKS = {"runs", "show", "watch", "sites", "enrolments", "actions"}
PAGES = {
    "/runs/{}/pause": on_run("pause")[:2],
    "/runs/{}/resume": on_run("resume", "paused")[:2],
    "/runs/{}/stop": on_run("stop")[:2],
    "/enrolments/{}/approve": on_request("approve")[:2],
    "/enrolments/{}/refuse": on_request("refuse")[:2],
    "/sites/{}/revoke": on_member("revoke")[:2],
}


@pytest.fixture
def stage(office, tmp_path):
    return Stage(office, tmp_path)


@pytest.fixture
def records(stage):
    """Of what the test does once everything is prepared: take `records()` then."""
    return lambda: Records(stage.office)


def commands(group):
    """The words of every command below a group of the command line."""

    def leaves(found, words=()):
        for name, command in found.commands.items():
            if hasattr(command, "commands"):
                yield from leaves(command, (*words, name))
            else:
                yield " ".join((*words, name))

    return set(leaves(typer.main.get_command(cli.app).commands[group]))


def invoke(*words, **settings):
    return CliRunner().invoke(cli.app, [str(word) for word in words], **settings)


# --- nothing is left out ---


def test_every_command_of_the_operator_looks_or_is_tried_here():
    assert commands("coordinator") == COORDINATOR_LOOKS | COORDINATOR.keys()
    assert commands("admin") == ADMIN_LOOKS | ADMIN.keys() | {"download"}


def test_every_form_of_the_pages_is_tried_here():
    content = Content(title="x", source=Told(), operations=object())
    routes = build(content, Access(hosts=frozenset()))._app.routes
    forms = {route.path for route in routes if "POST" in getattr(route, "methods", ())}
    tried = {re.sub(r"^(/runs|/enrolments|/sites)/{}/.*", r"\1", path) for path in PAGES}
    assert {path.rsplit("/{", 2)[0] for path in forms - {"/signin", "/signout"}} == tried


def test_whatever_is_done_in_somebodys_name_is_an_action_that_is_tried_here():
    """Only what `_action` made takes a person; anything else that is public only looks."""
    public = {name for name in vars(Operations) if not name.startswith("_")}
    actions = {name for name in public if hasattr(getattr(Operations, name), "__wrapped__")}
    assert public - actions == QUESTIONS
    tables = (COORDINATOR, ADMIN, PAGES)
    assert actions == {case[0] for table in tables for case in table.values()}


# --- the coordinator's own command line ---


@pytest.mark.parametrize("words", COORDINATOR)
def test_what_an_account_does_at_the_command_line_is_recorded(words, stage, records):
    action, done, _ = COORDINATOR[words]
    arguments, target = done(stage)
    before, given = records(), f"{PASSWORD}\n"
    folder = ("--dir", stage.office.home.root)
    result = invoke("coordinator", *words.split(), *arguments, *folder, input=given)
    assert result.exit_code == 0, result.output
    assert before.new() == [(*ME, action, target, "done")]


@pytest.mark.parametrize("words", [words for words in COORDINATOR if COORDINATOR[words][2]])
def test_what_an_account_is_refused_is_recorded_with_the_code(words, stage, records):
    action, _, refused = COORDINATOR[words]
    arguments, target, code = refused(stage)
    before = records()
    folder = ("--dir", stage.office.home.root)
    result = invoke("coordinator", *words.split(), *arguments, *folder, input="short\n")
    assert result.exception.code == code
    assert before.new() == [(*ME, action, target, code)]


def socket_actions():
    operations = object.__new__(Operations)
    routes = AdminRoutes(operations).app().routes
    return [route.path for route in routes if "POST" in route.methods]


@pytest.mark.parametrize("body", [b"[", b"{}", b'{"nonsense": 1}'], ids=["torn", "empty", "alien"])
@pytest.mark.parametrize("path", socket_actions())
def test_no_body_reaches_an_action_of_the_socket_without_a_record(path, body, office):
    before, path = Records(office), re.sub(r"{\w+}", "nothing", path)
    with AdminClient(office.home)._connected() as client:
        answer = client.post(path, content=body)
    assert answer.status_code == 409
    ((*who, action, target, outcome),) = before.new()
    assert (tuple(who), outcome) == (ME, answer.json()["code"])
    assert outcome in {"ST-102", "ST-622", "ST-631", "ST-805"}
    assert action in {case[0] for case in COORDINATOR.values()}
    assert target.startswith("/".join(["nothing"] * path.count("nothing")))


def test_a_person_gets_no_certificate_in_a_role_that_there_is_not(office, records):
    client, key = AdminClient(office.home), identity.new_node_key()
    before, request = records(), identity.make_request("boss", key)
    with pytest.raises(Exception, match="ST-805 add_person: role"):
        client.post("/people", name="boss", role="boss", request=request)
    assert before.new() == [(*ME, "add_person", "boss", "ST-805")]


def test_another_account_gets_nothing_done_at_the_socket(office, monkeypatch):
    """The kernel's word counts, also where the socket's mode was changed by somebody."""
    monkeypatch.setattr("silotune.server.admin.socket.os.geteuid", lambda: os.getuid() + 1)
    monkeypatch.setattr("silotune.server.admin.socket._ROOT", -1)
    before = Records(office)
    with pytest.raises(Exception, match="ST-625"):
        AdminClient(office.home).post("/sites/north/revoke")
    assert before.new() == [(*ME, "revoke", "north", "ST-625")]
    with pytest.raises(Exception, match="ST-625"):
        AdminClient(office.home).get("/sites")


def test_an_account_without_a_name_is_told_by_its_number():
    assert account_of(4_000_000_001).name == "account (uid 4000000001)"
    assert len(account_of(0).name) <= 63


# --- gRPC ---


@pytest.mark.parametrize("words", ADMIN)
def test_what_a_person_does_over_grpc_is_recorded(words, stage, records):
    action, done = ADMIN[words]
    arguments, target = done(stage)
    for who, outcome in ((VERA, "ST-625"), (OLGA, "done")):
        folder = stage.office.credentials(*who)
        before = records()
        result = invoke("admin", words, *arguments, "--credentials", folder)
        assert (result.exit_code == 0) == (outcome == "done"), result.output
        assert before.new() == [(*who, action, target, outcome)]


def test_who_took_a_file_is_recorded_and_who_got_none(stage, records):
    run, folder = stage.run(), stage.office.credentials(*VERA)
    for name, outcome in (("plan.json", "done"), ("secrets", "ST-632")):
        before = records()
        out = ("--out", stage.folder / "file", "--credentials", folder)
        invoke("admin", "download", run, name, *out)
        assert before.new() == [(*VERA, "download", f"{run}/{name}", outcome)]


# --- pages ---


@pytest.fixture(scope="module")
def browsers(office):
    """Sessions of a viewer and an operator."""
    port, found = office.coordinator.config.dashboard.port, {}
    for who in (VERA, OLGA):
        office.coordinator.operations.accounts.add(*who, PASSWORD)
        client = httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=30)
        client.post("/signin", data={"name": who[0], "password": PASSWORD})
        page = client.get("/", headers=HTML).text
        client.token = re.search(r'name="token" value="([^"]+)"', page)[1]
        found[who] = client
    yield found
    for client in found.values():
        client.close()


@pytest.mark.parametrize("path", PAGES)
def test_what_a_person_does_at_the_pages_is_recorded(path, stage, records, browsers):
    action, done = PAGES[path]
    (given,), target = done(stage)
    for who, token, expected in (
        (VERA, browsers[VERA].token, (action, given, "ST-625")),
        (OLGA, "forged", (action, given, "ST-732")),
        (OLGA, browsers[OLGA].token, (action, target, "done")),
        (OLGA, browsers[OLGA].token, None),  # once more, in a state that does not allow it
    ):
        before = records()
        answer = browsers[who].post(path.format(given), data={"token": token})
        (found,) = before.new()
        assert found[:2] == who
        if expected is None:
            assert (found[2], found[4], answer.status_code) == (action, "ST-622", 409)
        else:
            assert found[2:] == expected, answer.text


def test_who_came_in_and_took_a_file_at_the_pages_is_recorded(stage, records, browsers):
    run, before = stage.run(), records()
    assert browsers[VERA].get(f"/runs/{run}/files/plan.json").status_code == 200
    assert browsers[VERA].get(f"/runs/{run}/files/secrets").status_code == 404
    answer = httpx.post(
        browsers[VERA].base_url.join("/signin"),
        data={"name": "olga", "password": PASSWORD},
        trust_env=False,
    )
    assert answer.status_code == 303
    assert before.new() == [
        (*VERA, "download", f"{run}/plan.json", "done"),
        (*VERA, "download", f"{run}/secrets", "ST-632"),
        (*OLGA, "sign_in", "password", "done"),
    ]


@pytest.mark.parametrize("stays", [True, False], ids=["stays", "leaves"])
def test_who_is_revoked_is_out_at_the_next_request_though_signed_in(stage, browsers, stays):
    stage.office.coordinator.operations.accounts.add(stage.name, "viewer", PASSWORD)
    with httpx.Client(base_url=browsers[VERA].base_url, trust_env=False, timeout=30) as client:
        client.post("/signin", data={"name": stage.name, "password": PASSWORD})
        assert client.get("/actions").status_code == 200
        if not stays:
            words = ("people", "revoke", stage.name, "--dir", stage.office.home.root)
            told = invoke("coordinator", *words)
            assert told.output == f"{stage.name}'s password is revoked.\n"
        assert client.get("/actions").status_code == (200 if stays else 401)
        form = {"name": stage.name, "password": PASSWORD}
        again = httpx.post(client.base_url.join("/signin"), data=form, trust_env=False)
        assert again.status_code == (303 if stays else 401)


# --- where it is read ---


def test_the_actions_page_and_the_admin_list_show_what_was_done_at_the_command_line(
    stage, browsers
):
    folder = ("--dir", stage.office.home.root)
    assert invoke("coordinator", "invite", stage.name, *folder).exit_code == 0
    shown = browsers[VERA].get("/actions", headers=HTML).text
    assert re.search(rf"{re.escape(ME[0])}</td>.*?invite.*?{stage.name}", shown, re.S)
    credentials = ("--credentials", stage.office.credentials(*VERA))
    listed = json.loads(invoke("admin", "actions", "--json", *credentials).output)
    assert (listed[0]["who"], listed[0]["action"], listed[0]["target"]) == (
        *(ME[0], "invite", stage.name),
    )


def test_a_failure_that_nobody_foresaw_is_recorded_too(office, monkeypatch):
    def fails(*_, **__):
        raise OSError("the disk is full")

    monkeypatch.setattr(office.coordinator.registrar, "revoke", fails)
    before, operations = Records(office), office.coordinator.operations
    with pytest.raises(OSError, match="full"):
        operations.revoke(Person(name="olga", role="operator"), "north")
    assert before.new() == [(*OLGA, "revoke", "north", "ST-000")]
