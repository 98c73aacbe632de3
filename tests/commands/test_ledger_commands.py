"""Claims about `silotune ledger` and `silotune certificate`, as somebody at a terminal sees them."""

import hashlib
import json
import sqlite3
import stat

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from typer.testing import CliRunner

from silotune.commands import books
from silotune.errors import CertificateInvalid, LedgerDamaged
from silotune.plan.plan import Plan
from silotune.privacy.accounting import epsilon
from silotune.privacy.certificate import issue
from silotune.privacy.events import gaussian_event
from silotune.privacy.ledger import Budget, Ledger, ReleaseKey
from silotune.trust.identity import fingerprint

DELTA = 1e-5
EVENT = gaussian_event(4.0)
KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))
PLAN = Plan.from_mapping(
    {
        "plan": {"name": "shown", "purpose": "test"},
        "model": {"base": "nowhere", "task": "causal_lm"},
        "data": {"dataset": "notes"},
        "rounds": {"number": 2},
        "privacy": {"mode": "record", "epsilon": 8.0, "delta": DELTA, "clip": 1.0, "batch": 10},
    }
)


@pytest.fixture
def state(tmp_path):
    """A site's state: one run settled after one of the two releases that it reserved."""
    ledger = Ledger(tmp_path / "ledger.sqlite")
    from dp_accounting import SelfComposedDpEvent

    whole = SelfComposedDpEvent(EVENT, 2)
    budget = Budget(8.0, DELTA)
    ledger.reserve("notes", "first", PLAN.sha256, whole, budget=budget)
    for run, number in (("first", 1), ("[red]second", 1)):
        ledger.reserve("notes", run, PLAN.sha256, whole, budget=budget)
        ledger.charge("notes", ReleaseKey(run, number, "update"), PLAN.sha256, EVENT, "00" * 32)
    ledger.settle("notes", "first")
    issue(
        tmp_path / "certificate.json",
        ledger=ledger,
        dataset="notes",
        run="first",
        plan=PLAN,
        site="north",
        model_sha256="ab" * 32,
        secure_noise=True,
        key=KEY,
    )
    ledger.close()
    return tmp_path


def run(command, *arguments):
    result = CliRunner().invoke(command, [str(part) for part in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("file", ["", "ledger.sqlite"])
def test_show_gives_spent_committed_and_left(state, file):
    shown = json.loads(run(books.ledger, "show", state / file, "--json"))
    (dataset,) = shown["datasets"]
    assert dataset["epsilon_spent"] == epsilon([EVENT] * 2, delta=DELTA)
    assert dataset["epsilon_committed"] == epsilon([EVENT] * 3, delta=DELTA)
    assert dataset["left"] == dataset["epsilon_budget"] - dataset["epsilon_committed"]
    assert (dataset["dataset"], dataset["delta"], dataset["releases"]) == ("notes", DELTA, 2)
    assert [(r["run"], r["state"]) for r in shown["runs"]] == [
        ("first", "settled"),
        ("[red]second", "open"),
    ]
    assert {r["epsilon"] for r in shown["runs"]} == {epsilon([EVENT], delta=DELTA)}


def test_show_prints_tables_and_takes_names_as_they_are(state, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    text = run(books.ledger, "show", state)
    for part in ("notes", "[red]second", "settled", f"{epsilon([EVENT] * 2, delta=DELTA):.4f}"):
        assert part in text


def test_show_says_when_there_is_nothing(tmp_path):
    Ledger(tmp_path / "ledger.sqlite").close()
    assert "empty" in run(books.ledger, "show", tmp_path)


def test_looking_at_a_ledger_never_starts_one(tmp_path):
    for command in ("show", "verify", "export"):
        result = CliRunner().invoke(books.ledger, [command, str(tmp_path / "typo.sqlite")])
        assert result.exit_code == 2
        assert "does not exist" in result.output
        with pytest.raises(LedgerDamaged, match="no ledger"):
            run(books.ledger, command, tmp_path)
    assert not list(tmp_path.iterdir())


def test_verify_finds_an_intact_ledger_intact_and_a_damaged_one_damaged(state):
    assert run(books.ledger, "verify", state).startswith("Intact: 5 rows")
    checked = json.loads(run(books.ledger, "verify", state, "--json"))
    assert (checked["rows"], checked["intact"]) == (5, True)
    db = sqlite3.connect(state / "ledger.sqlite")
    db.execute("DROP TRIGGER no_delete")
    db.execute("DELETE FROM entries WHERE seq = 5")
    db.commit()
    db.close()
    with pytest.raises(LedgerDamaged):
        run(books.ledger, "verify", state)


def test_an_export_can_be_checked_without_silotune(state, tmp_path):
    out = tmp_path / "audit.jsonl"
    run(books.ledger, "export", state, "--out", out)
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    assert out.read_text() == run(books.ledger, "export", state)
    previous = "0" * 64
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    for row in rows:
        claimed = row.pop("hash")
        assert row["previous"] == previous
        text = json.dumps(row, sort_keys=True, separators=(",", ":"))
        previous = hashlib.sha256(text.encode()).hexdigest()
        assert previous == claimed
    assert [row["kind"] for row in rows].count("charge") == 2


def test_a_certificate_is_shown_with_what_it_stands_for(state, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    path = state / "certificate.json"
    text = run(books.certificates, "verify", path)
    for part in ("Valid.", "north", "sigma 4.0000", "Compare the key", PLAN.sha256):
        assert part in text
    known = fingerprint(KEY.public_key())
    assert "Compare the key" not in run(books.certificates, "verify", path, "--key", known)
    shown = json.loads(run(books.certificates, "verify", path, "--json"))
    assert shown["valid"]
    assert shown["epsilon"] == shown["certificate"]["epsilon"] == epsilon([EVENT], delta=DELTA)
    assert (shown["key_sha256"], shown["key_known"]) == (known, False)


def test_a_changed_certificate_is_an_error(state):
    path = state / "certificate.json"
    path.write_text(path.read_text().replace('"north"', '"south"'))
    with pytest.raises(CertificateInvalid):
        run(books.certificates, "verify", path)
