"""Chats by the command line: those that can't be used are counted, the others learned."""

import json
from unittest.mock import patch

import pytest
from typer.testing import CliRunner

from silotune import cli
from silotune.client.model_cache import ModelCache
from silotune.client.site_run import SiteRun
from silotune.data.site import load_sites
from silotune.plan.plan import Plan
from silotune.simulation import run
from tests.federation import CHOICES
from tests.models.chat_material import REAL, chat_site, messages, write_chat_model
from tests.whole_run import in_this_process

SECRET = "xylophonequartz"
ODD = {
    "a turn whose role is none of system, user, assistant": [
        [{"role": SECRET, "content": "a"}, {"role": "assistant", "content": "b"}],
        [{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}],
    ],
    "no list of role and content": [[], [{"role": "user"}], SECRET],
    "a chat without a turn of an assistant": [[{"role": "user", "content": SECRET}]],
    "a chat that the model's chat template can't show": [
        json.loads(messages("eye", "ear", system=SECRET)),
        [{"role": "user", "content": SECRET}] * 2 + [{"role": "assistant", "content": "b"}],
    ],
}
ILLS = ("cough", "sprain", "fever", "cut", "asthma", "gout", "copd", "lupus")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two sites of chats, one with some that can't be used; a template that takes no system turn."""
    place = tmp_path_factory.mktemp("chats")
    base = write_chat_model(place / "base", REAL["strict"])
    for name in ("alpha", "beta"):
        chats = [
            json.loads(messages(f"what is {ILLS[n % 8]} {n}?", f"it is {ILLS[n % 8]}"))
            for n in range(60)
        ]
        if name == "alpha":
            chats += [chat for some in ODD.values() for chat in some]
        (place / name).mkdir()
        lines = "".join(json.dumps({"chat": chat}) + "\n" for chat in chats)
        (place / name / "chats.jsonl").write_text(lines)
        (place / name / "site.toml").write_text(chat_site(name, "chats.jsonl"))
    (place / "plan.toml").write_text(f"""
[plan]
name = "talk"
purpose = "tests"
seed = 3
[model]
base = {json.dumps(str(base))}
task = "causal_lm"
dtype = "float32"
[model.chat]
template = "base"
[lora]
r = 2
alpha = 4.0
[data]
dataset = "chats"
max_length = 64
[rounds]
number = 2
min_sites = 2
[optimizer.site]
adapter_lr = 0.02
[privacy]
mode = "record"
epsilon = 8.0
delta = 1e-4
rate = 0.3
clip = 1.0
""")
    return place


def ran(*words):
    found = CliRunner().invoke(cli.app, [*map(str, words)])
    assert found.exit_code == 0, found.output
    return found.stdout


def test_a_chat_that_cannot_be_used_is_left_out_counted_never_quoted_and_keeps_no_other_out(folder):
    plan = Plan.load(folder / "plan.toml")
    alpha, _ = load_sites(folder)
    models = ModelCache(CHOICES)
    part = SiteRun(alpha, state=folder / "s", plan=plan, run="r", models=models)
    records = part.training.records
    assert len(records) == 60
    told = {fault.problem.split(": ")[-1]: len(fault.rows) for fault in records.left_out}
    assert told == {problem: len(chats) for problem, chats in ODD.items()}
    assert SECRET not in " ".join(map(str, records.left_out))
    assert len(part.training.encoded) == 60


def test_chats_are_checked_trained_and_answered_by_the_command_line(folder):
    plan = folder / "plan.toml"
    (checked,) = json.loads(
        ran("data", "check", folder / "alpha" / "site.toml", "--plan", plan, "--json")
    )["datasets"]
    assert (checked["rows"], checked["records"]) == (68, 60)
    assert checked["lengths"]["measure"] == "tokens"
    (plain,) = json.loads(ran("data", "check", folder / "alpha" / "site.toml", "--json"))[
        "datasets"
    ]
    assert plain["records"] == 62  # which template they will meet is not known yet
    assert SECRET not in json.dumps([checked, plain])
    with patch.object(run, "WorkerGrid", in_this_process):
        done = json.loads(
            ran("simulate", plan, "--runs", folder / "runs", "--workers", "1", "--json")
        )
    question = folder / "asked.jsonl"
    question.write_text(json.dumps({"chat": json.loads(messages("what is gout?"))}) + "\n")
    out = folder / "answers.jsonl"
    ran("predict", done["run_directory"], "--data", question, "--column", "messages=chat",
        "--out", out, "--max-new-tokens", "5")  # fmt: skip
    (answered,) = map(json.loads, out.read_text().splitlines())
    (alone,) = ran(
        "predict", done["run_directory"], "what is gout?", "--max-new-tokens", "5"
    ).splitlines()
    assert answered["prediction"].strip() == alone.strip()
