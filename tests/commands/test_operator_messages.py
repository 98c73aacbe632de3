"""What the commands of operators and sites say to somebody who mistypes, forgets or mixes up."""

import bz2
import gzip
import io
import json
import lzma

import openpyxl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from rich.console import Console
from typer.testing import CliRunner

from silotune import cli, terminal
from silotune.client.approvals import Approvals
from silotune.commands import site
from silotune.data.site import SiteConfig
from silotune.protocol.http import Proposal
from silotune.server.config import Home
from silotune.trust.identity import six_words
from silotune.trust.signed import SignedPlan
from tests.client.site_material import write_site_folder
from tests.server.opening import open_coordinator

KEY = Ed25519PrivateKey.generate()


def invoke(*words):
    return CliRunner().invoke(cli.app, [str(word) for word in words])


def failure(*words):
    """The error of a command that must fail."""
    result = invoke(*words)
    assert result.exit_code != 0, result.output
    assert hasattr(result.exception, "code"), result.output
    return result.exception


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "federation"
    words = ("--name", "demo", "--host", "127.0.0.1", "--listen", "127.0.0.1", "--port", "0")
    assert invoke("coordinator", "init", "--dir", made, *words).exit_code == 0
    return made


@pytest.fixture
def running(folder):
    coordinator = open_coordinator(Home(folder))
    coordinator.start()
    yield coordinator
    coordinator.close()


def propose(config, plans):
    """Proposals as the coordinator sends them, at a site."""
    approvals = Approvals(SiteConfig.load(config).state_folder, own=KEY.public_key())
    for run, plan in plans.items():
        proposal = Proposal(
            run=run, plan=SignedPlan.sign(plan, KEY), plan_sha256=plan.sha256, state="proposed",
            proposed_at=1,
        )  # fmt: skip
        approvals.take(proposal, KEY.public_key())


@pytest.fixture
def proposed(tmp_path, bert_folder, monkeypatch):
    """A site with two open plans; and what is decided."""
    made = write_site_folder(tmp_path / "sites", bert_folder, approval="manual")
    config = made.folder / "site.toml"
    plans = {f"run-{i}": made.plan.override({"plan.purpose": f"purpose {i}"}) for i in range(2)}
    propose(config, plans)
    decided = []
    told = {"sent": True}
    monkeypatch.setattr(site, "ask", lambda state, command, **f: decided.append(f["run"]) or told)
    return config, plans, decided


# --- a plan by the first digits of its hash ---


def test_four_digits_of_a_hash_mean_a_plan(proposed):
    config, plans, decided = proposed
    for run, plan in plans.items():
        for digits in (plan.sha256[:4], plan.sha256[:4].upper(), plan.sha256[:9], plan.sha256, run):
            result = invoke("site", "approve", digits, "--config", config)
            assert result.exit_code == 0, result.exception
    assert set(decided) == set(plans)


def test_three_digits_are_too_short_and_the_message_says_how_many_it_takes(proposed):
    config, plans, decided = proposed
    error = failure("site", "approve", plans["run-0"].sha256[:3], "--config", config)
    assert error.code == "ST-642"
    assert "too short" in error.detail
    assert "4 digits" in error.remedy
    assert "first 4 or more digits" in " ".join(invoke("site", "approve", "--help").output.split())
    assert decided == []


def test_digits_that_two_plans_share_name_both(proposed):
    config, plans, decided = proposed
    first = plans["run-0"]
    purposes = (first.override({"plan.purpose": f"another {i}"}) for i in range(10**6))
    twin = next(plan for plan in purposes if plan.sha256[:2] == first.sha256[:2])
    shared = first.sha256[:2]
    propose(config, {"twin": twin})
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(site, "_LEAST_DIGITS", 2)  # four would take a minute to find
        error = failure("site", "approve", shared, "--config", config)
    assert "run-0" in error.detail
    assert "twin" in error.detail
    assert "more digits" in error.remedy
    assert decided == []


# --- enrolment ---


def test_a_code_of_another_sites_name_says_whose_it_is_and_what_to_do(
    running, folder, tmp_path, bert_folder
):
    config = write_site_folder(tmp_path / "sites", bert_folder).folder / "site.toml"
    code = json.loads(invoke("coordinator", "invite", "ward7", "--dir", folder, "--json").output)
    error = failure("site", "join", code["code"], "--config", config)
    assert error.code == "ST-801"
    for part in ("'ward7'", "'alpha'", "set name in site.toml"):
        assert part in error.detail
    assert "fingerprint" not in error.detail + error.remedy + error.cause


def test_a_site_that_was_interrupted_joins_by_the_same_command_after_its_approval(
    running, folder, tmp_path, bert_folder
):
    config = write_site_folder(tmp_path / "sites", bert_folder).folder / "site.toml"
    found = json.loads(invoke("coordinator", "invite", "alpha", "--dir", folder, "--json").output)
    words = ("site", "join", found["code"], "--config", config, "--wait", "0")
    assert invoke(*words).exit_code == 1
    shown = invoke("coordinator", "requests", "--dir", folder).output
    (six,) = [line.split()[1] for line in shown.splitlines() if line.startswith("  words")]
    assert six in invoke(*words).output
    assert invoke("coordinator", "approve", "alpha", "--dir", folder).exit_code == 0
    result = invoke(*words)
    assert result.exit_code == 0, result.exception
    assert "alpha is now in federation demo" in result.output


@pytest.mark.parametrize("rows", [1, 5])
def test_six_words_are_never_broken_at_80_columns(rows, monkeypatch):
    words = six_words(name="alpha", signing_key="a", node_key="b")
    drawn = io.StringIO()
    console = Console(file=drawn, width=80, markup=False)
    monkeypatch.setattr(terminal, "terminal", lambda: console)
    row = {
        "request": "0d40b8901efdf33e5597cd9b948ea9c2",
        "site": "a-long-name-" * 4,
        "words": words,
    }
    terminal.show_rows([row] * rows, ("request", "site", "words"))
    for word in words.split("-"):
        assert drawn.getvalue().count(word) == rows


# --- the coordinator's folder ---


def test_a_host_name_with_a_space_and_a_name_with_capitals_are_refused_in_words(tmp_path):
    folder = tmp_path / "f"
    error = failure(
        "coordinator", "init", "--dir", folder, "--name", "f", "--host", "coord example.org"
    )
    assert error.code == "ST-720"
    assert "'coord example.org' is neither an IP address nor a host name" in error.detail
    result = invoke("coordinator", "init", "--dir", folder, "--name", "My Fed", "--host", "h")
    assert result.exit_code == 2
    assert "is no name: lower-case letters" in " ".join(result.output.replace("│", " ").split())
    for host in ("coord.example.org", "10.0.0.7", "::1", "coord-1"):
        made = invoke(
            "coordinator", "init", "--dir", tmp_path / f"x{host}", "--name", "f", "--host", host
        )
        assert made.exit_code == 0, made.exception


def test_init_into_a_folder_that_holds_something_says_so(folder):
    error = failure("coordinator", "init", "--dir", folder, "--name", "f", "--host", "h")
    assert error.code == "ST-726"
    assert str(folder) in error.detail


def test_every_coordinator_command_finds_its_folder_by_dir():
    group = cli.app
    from typer.main import get_command

    def leaves(command, words=()):
        if hasattr(command, "commands"):
            for name, below in command.commands.items():
                yield from leaves(below, (*words, name))
        else:
            yield words, command

    for words, command in leaves(get_command(group).commands["coordinator"]):
        options = {opt for parameter in command.params for opt in parameter.opts}
        assert "--dir" in options, words
        assert "folder" not in options, words  # never as an argument


def test_a_command_in_the_wrong_folder_says_that_no_coordinator_is_there(tmp_path):
    for words in (("status",), ("start",), ("doctor",), ("runs", "list")):
        error = failure("coordinator", *words, "--dir", tmp_path)
        assert error.code == "ST-720"
        assert f"there is no coordinator in {tmp_path}" in error.detail
        assert "--dir" in error.remedy


def test_a_stopped_coordinator_is_named_with_the_command_that_starts_it(folder):
    error = failure("coordinator", "status", "--dir", folder)
    assert error.code == "ST-721"
    assert error.remedy == f"Start it: silotune coordinator start --dir {folder}"


@pytest.mark.parametrize(
    "section, key",
    [("dashboard", "metrics_token_file"), ("alerts", "webhook_secret_file")],
)
def test_a_missing_file_with_a_secret_is_reported_with_its_key_and_path(folder, section, key):
    config = folder / "coordinator.toml"
    more = "port = 0\n" if section == "dashboard" else 'webhooks = ["https://h.example.org"]\n'
    text = config.read_text().replace(f"[{section}]", f'[{section}]\n{key} = "no/token"\n{more}#')
    config.write_text(text)
    coordinator = open_coordinator(Home(folder))
    try:
        with pytest.raises(Exception, match="ST-720") as caught:
            coordinator.start()
    finally:
        coordinator.close()
    assert f"{section}.{key}: {folder / 'no/token'}: No such file" in caught.value.detail
    found = json.loads(invoke("coordinator", "doctor", "--dir", folder, "--json").output)
    secrets = next(f for f in found["findings"] if f["check"] == "secrets")
    assert secrets["state"] == "failed"
    assert str(folder / "no/token") in secrets["detail"]


# --- the coordinator's doctor ---


def examined(folder, *, code=0):
    result = invoke("coordinator", "doctor", "--dir", folder, "--json")
    assert result.exit_code == code, result.output
    return {f["check"]: f for f in json.loads(result.output)["findings"]}


def test_the_doctor_finds_a_healthy_coordinator_healthy_running_or_not(folder):
    found = examined(folder)
    assert found["daemon"]["state"] == "skipped"
    assert found["store"]["state"] == "skipped"
    coordinator = open_coordinator(Home(folder))
    coordinator.start()
    try:
        found = examined(folder)
        assert {f["state"] for name, f in found.items() if name != "secrets"} == {"ok"}
        assert "answers on port" in found["port"]["detail"]
    finally:
        coordinator.close()
    assert examined(folder)["store"]["state"] == "ok"


@pytest.mark.parametrize(
    "check, code, harm",
    [
        ("permissions", "ST-409", lambda f: (f / "keys").chmod(0o755)),
        ("keys", "ST-430", lambda f: (f / "keys" / "vault.key").unlink()),
        ("keys", "ST-430", lambda f: (f / "keys" / "vault.json").unlink()),
        ("keys", "ST-802", lambda f: (f / "keys" / "server.key").unlink()),
        ("certificate", "ST-802", lambda f: (f / "keys" / "server.pem").unlink()),
        ("audit log", "ST-432", lambda f: (f / "state" / "audit.jsonl.head").unlink()),
        ("store", "ST-723", lambda f: (f / "state" / "coordinator.sqlite").write_bytes(b"x" * 99)),
    ],
)
def test_the_doctor_finds_each_trouble_and_changes_nothing(folder, check, code, harm):
    harm(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    found = examined(folder, code=70)
    assert (found[check]["state"], found[check]["code"]) == ("failed", code)
    assert found[check]["remedy"]
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


# --- paths ---


@pytest.mark.parametrize(
    "words",
    [
        ("audit", "verify"), ("audit", "show"), ("audit", "export"), ("ledger", "show"),
        ("ledger", "verify"), ("ledger", "export"), ("certificate", "verify"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_mistyped_path_is_told_as_one_and_not_as_damage(words, tmp_path):
    result = invoke(*words, tmp_path / "nowhere")
    assert result.exit_code == 2
    assert "does not exist" in " ".join(result.output.replace("│", " ").split())


def test_a_log_that_is_gone_from_its_folder_is_damage(folder):
    for name in ("audit.jsonl", "audit.jsonl.head"):
        (folder / "state" / name).unlink()
    assert failure("audit", "verify", folder / "state").code == "ST-432"


# --- records ---


def doctor_of(tmp_path, name, form, *, entry=""):
    (tmp_path / "site.toml").write_text(
        f'name = "a"\n[datasets.d]\nformat = "{form}"\npath = "{name}"\ndeclared_units = 10\n{entry}\n'
        '[datasets.d.columns]\ntext = "t"\nlabel = "l"\n'
    )
    result = invoke("site", "doctor", "--config", tmp_path / "site.toml", "--json")
    return next(f for f in json.loads(result.output)["findings"] if f["check"] == "dataset d")


def site_with(tmp_path, name, content, form):
    path = tmp_path / name
    path.write_bytes(content) if content is not None else path.mkdir()
    return doctor_of(tmp_path, name, form)


ROWS = [{"t": "a", "l": "x"}, {"t": "b", "l": "y"}]
CSV = b"t,l\na,x\n"


def workbook():
    made, book = io.BytesIO(), openpyxl.Workbook()
    for row in (("t", "l"), ("a", "x")):
        book.active.append(row)
    book.save(made)
    return made.getvalue()


@pytest.mark.parametrize(
    "name, content, form, parts",
    [
        ("parts", None, "parquet", ("is a folder without a file of records", "Check the path")),
        ("parts", None, "csv", ("is a folder without a file of records", "Check the path")),
        ("a.csv", bz2.compress(CSV), "csv", ("packed by bzip2", "Unpack it")),
        ("a.csv", lzma.compress(CSV), "csv", ("packed by xz", "Unpack it")),
        ("a.csv", gzip.compress(gzip.compress(CSV)), "csv", ("not UTF-8 text at line 1",)),
        ("a.csv", CSV, "jsonl", ("there is no record in it", "not a JSON object in 2 rows", "format")),
        ("a.csv", b"t,l\n", "csv", ("there is no record in it", "format")),
    ],
)  # fmt: skip
def test_a_file_of_another_kind_is_named_with_what_to_do(tmp_path, name, content, form, parts):
    found = site_with(tmp_path, name, content, form)
    assert (found["state"], found["code"]) == ("failed", "ST-203")
    for part in parts:
        assert part in found["detail"] + found["remedy"]


@pytest.mark.parametrize(
    "name, content, form, kind, remedy",
    [
        ("a.xlsx", workbook(), "csv", "Excel", 'format = "excel"'),
        ("a.csv", "t,l\na,ä\n".encode("utf-16"), "csv", "UTF-16", 'encoding = "utf-16"'),
        ("a.csv", "t,l\na,ä\n".encode("latin-1"), "csv", "not UTF-8 text at line 2",
         'encoding = "cp1252"'),
        ("a.json", json.dumps(ROWS).encode(), "jsonl", "one JSON array", 'format = "json"'),
        ("a.json", json.dumps(ROWS, indent=1).encode(), "jsonl", "one JSON array",
         'format = "json"'),
        ("a.json", b"".join(json.dumps(row).encode() + b"\n" for row in ROWS), "json",
         "no JSON array", 'format = "jsonl"'),
    ],
)  # fmt: skip
def test_what_the_remedy_says_of_a_file_of_another_kind_reads_it(
    tmp_path, name, content, form, kind, remedy
):
    found = site_with(tmp_path, name, content, form)
    assert (found["state"], found["code"]) == ("failed", "ST-203")
    assert kind in found["detail"]
    assert remedy in found["remedy"]
    key, value = remedy.replace('"', "").split(" = ")
    form, entry = (value, "") if key == "format" else (form, remedy)
    read = doctor_of(tmp_path, name, form, entry=entry)
    assert read["state"] == "ok", read
    assert read["detail"].startswith(f"{2 if name == 'a.json' else 1} records, with every column")
    assert "left out" not in read["detail"]


def test_a_file_that_gzip_packed_is_read_whatever_its_name(tmp_path):
    found = site_with(tmp_path, "a.csv", gzip.compress(CSV), "csv")
    assert found["state"] == "ok"
    assert found["detail"].startswith("1 records, with every column")
    assert "left out" not in found["detail"]


def test_a_parquet_file_that_is_called_csv_is_recognised(tmp_path):
    made = io.BytesIO()
    pq.write_table(pa.table({"t": ["a"] * 50, "l": ["x"] * 50}), made)
    found = site_with(tmp_path, "a.csv", made.getvalue(), "csv")
    assert 'format = "parquet"' in found["remedy"]
