"""The command line as its user meets it: help, plans, partitions, errors and exit codes."""

import csv
import json

import pytest
from typer.testing import CliRunner

from silotune import cli
from silotune.errors import BudgetExceeded, SilotuneError
from silotune.plan.plan import Plan, schema
from tests.federation import PRIVATE, SITES, write_federation


def invoke(*words):
    return CliRunner().invoke(cli.app, list(words))


@pytest.mark.parametrize(
    "command",
    [
        "demo",
        "partition",
        "plan",
        "simulate",
        "report",
        "predict",
        "ledger",
        "site",
        "audit",
        "certificate",
        "errors",
    ],
)
def test_every_command_explains_itself(command):
    result = invoke(command, "--help")
    assert result.exit_code == 0
    assert len(result.output) > 200


def test_plan_check_says_what_the_plan_costs(tmp_path, bert_folder):
    federation = write_federation(tmp_path, bert_folder)
    changed = federation.plan.override({**PRIVATE, "plan.seed": None})
    path = tmp_path / "private.toml"
    path.write_text(_toml(changed))
    facts = json.loads(invoke("plan", "check", str(path), "--json").output)
    assert facts["plan_sha256"] == Plan.load(path).sha256
    assert facts["steps"] == 5
    assert facts["private"] is True
    # LoRA on query and value of two layers, rank 2, hidden 32, and a head of 2 x 32 + 2.
    assert facts["trainable_parameters"] == 2 * 2 * 2 * (2 * 32) + 66
    assert facts["bytes_up"] == 4 * facts["trainable_parameters"]
    assert facts["kept_bytes"] == 5 * facts["bytes_up"]  # of five rounds each
    assert set(facts["sites"]) == {"alpha", "beta", "gamma"}
    assert all(s["epsilon"] == pytest.approx(8, rel=1e-3) for s in facts["sites"].values())
    shown = invoke("plan", "check", str(path), "--sizes", "1000,2500")
    assert shown.exit_code == 0
    assert "2,500" in shown.output
    assert "keeps at most 5 adapters, the last, the best and one in 1:" in _flat(shown.output)
    assert "epsilon" in shown.output


SITE_PRIVACY = {
    "privacy.mode": "site",
    "privacy.site": {"noise": "coordinator"},
    "privacy.epsilon": 8.0,
    "privacy.delta": 1e-4,
    "privacy.clip": 1.0,
    "aggregation.weights": "equal",
    "rounds.local_steps": 2,
}


def test_plan_check_prints_the_plans_own_rate_in_every_mode(tmp_path, bert_folder):
    federation = write_federation(tmp_path, bert_folder)
    for mode in ({}, PRIVATE, SITE_PRIVACY):
        path = tmp_path / "checked.toml"
        path.write_text(_toml(federation.plan.override(mode)))
        rows = [line.split() for line in invoke("plan", "check", str(path)).output.splitlines()]
        found = {row[0]: row[1:] for row in rows if row and row[0] in SITES}
        assert {row[2] for row in found.values()} == {"0.2000"}, mode
        told = {row[3] == "none" for row in found.values()}
        assert told == {not federation.plan.override(mode).private}


def _flat(text):
    return " ".join(text.split())


def _toml(plan):
    """Enough TOML for a plan: tables of plain values."""
    lines = []

    def write(table, prefix):
        lines.append(f"[{prefix}]")
        nested = {}
        for key, value in table.items():
            if isinstance(value, dict):
                nested[key] = value
            else:
                lines.append(f"{key} = {json.dumps(value)}")
        for key, value in nested.items():
            write(value, f"{prefix}.{key}")

    for section, table in plan.model_dump(mode="json", exclude_none=True).items():
        write(table, section)
    return "\n".join(lines)


def test_plan_schema_is_the_schema():
    assert json.loads(invoke("plan", "schema").output) == json.loads(json.dumps(schema()))


def test_a_plan_whose_model_is_not_here_is_checked_all_the_same(tmp_path, bert_folder):
    federation = write_federation(tmp_path, bert_folder)
    text = federation.plan_path.read_text().replace(str(bert_folder), str(tmp_path / "nowhere"))
    federation.plan_path.write_text(text)
    facts = json.loads(invoke("plan", "check", str(federation.plan_path), "--json").output)
    assert facts["model"].startswith("ST-301")
    assert facts["trainable_parameters"] is None


def test_a_file_is_partitioned_into_sites_that_keep_patients_whole(tmp_path):
    source = tmp_path / "all.csv"
    with source.open("w", newline="") as file:
        csv.writer(file).writerows(
            [["note", "ill", "who"], *[[f"n{i}", "yes", f"p{i // 3}"] for i in range(90)]]
        )
    result = invoke(
        *("partition", str(source), str(tmp_path / "sites"), "--sites", "3", "--by", "quantity"),
        *("--column", "text=note", "--column", "label=ill", "--column", "unit=who"),
        *("--unit", "patient"),
    )
    assert result.exit_code == 0, result.output
    owners = {}
    for path in (tmp_path / "sites").glob("*/records.csv"):
        with path.open() as file:
            for row in csv.DictReader(file):
                owners.setdefault(row["who"], set()).add(path.parent.name)
    assert len(owners) == 30
    assert all(len(sites) == 1 for sites in owners.values())


def test_a_wrong_role_is_told(tmp_path):
    result = invoke("partition", "x.csv", str(tmp_path), "--column", "txt=note")
    assert result.exit_code == 2
    assert "role=column" in result.output


def test_the_demo_does_not_overwrite_what_it_did_not_make(tmp_path):
    (tmp_path / "precious.txt").write_text("keep me")
    result = invoke("demo", "hospitals", str(tmp_path), "--force")
    assert isinstance(result.exception, SilotuneError)
    assert (tmp_path / "precious.txt").exists()


def test_an_error_is_shown_with_its_cause_and_remedy_and_no_traceback(monkeypatch, capsys):
    def fail():
        raise BudgetExceeded("asked 3, left 2")

    monkeypatch.setattr(cli, "app", fail)
    monkeypatch.setattr("sys.argv", ["silotune"])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 40
    shown = capsys.readouterr().err
    assert "ST-401" in shown
    assert "asked 3, left 2" in shown
    assert "Why: " in shown
    assert "Do:  " in shown
    assert "Traceback" not in shown


def test_debug_shows_the_traceback(monkeypatch):
    def fail():
        raise BudgetExceeded("asked 3, left 2")

    monkeypatch.setattr(cli, "app", fail)
    monkeypatch.setattr("sys.argv", ["silotune", "--debug"])
    with pytest.raises(BudgetExceeded):
        cli.main()


def test_a_resumed_run_must_be_a_run_directory(tmp_path):
    result = invoke("simulate", "--resume", str(tmp_path / "nothing"))
    assert result.exception.code == "ST-602"
