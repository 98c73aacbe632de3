"""`silotune plan new`: asked for or given, every number with its reason, and a plan that runs."""

import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from unittest.mock import patch

import pytest

from silotune.plan.left_out import left_out
from silotune.plan.plan import Plan
from silotune.simulation import run
from tests.commands.terminal import shown
from tests.federation import write_federation
from tests.whole_run import in_this_process

GIVEN = {
    "labels": "no,yes",
    "dataset": "notes",
    "units": "60,80,100",
    "epsilon": "4",
}
PROMPT = re.compile(r"(?P<question>[^\r\n]*): $")


def words(path, base, *more, **changes):
    said = {"base": str(base), **GIVEN, **changes}
    options = [f"--{key}={value}" for key, value in said.items() if value is not None]
    return ("plan", "new", str(path), *options, *more)


@pytest.fixture(scope="module")
def written(tmp_path_factory, bert_folder):
    path = tmp_path_factory.mktemp("new") / "plan.toml"
    told = shown("plain", *words(path, bert_folder, "--yes"))
    assert told.code == 0, told.errors
    return path


def test_the_file_is_a_plan_that_says_every_number(written, bert_folder):
    plan = Plan.load(written)
    assert left_out(Plan.written_in(written)) == ()
    assert plan.model.base == str(bert_folder)
    assert plan.model.sha256
    assert plan.privacy.epsilon == 4.0
    assert (plan.aggregation.cohort, plan.aggregation.threshold) == (3, 2)
    assert plan.privacy.noise == "shared"


def test_every_setting_has_its_reason_beside_it_or_above(written):
    lines = written.read_text().splitlines()
    settings = [i for i, line in enumerate(lines) if re.match(r"\w+ = ", line)]
    assert len(settings) > 25
    for number in settings:
        beside = re.search(r"# \w", lines[number])
        assert beside or lines[number - 1].startswith("# "), lines[number]
    assert max(map(len, lines)) < 140


def test_a_site_plays_it_as_it_is(tmp_path, bert_folder):
    federation = write_federation(tmp_path, bert_folder)
    path = federation.folder / "plan.toml"
    told = shown("plain", *words(path, bert_folder, "--yes", "--force"))
    assert told.code == 0, told.errors
    limits = [
        "rounds.number=3",
        "optimizer.site.head_rounds=3",
        "data.max_length=24",
        "plan.seed=1",
        "privacy.delta=1e-4",
    ]
    sets = [f"--set={limit}" for limit in limits]
    with patch.object(run, "WorkerGrid", in_this_process):
        ran = shown("plain", "simulate", str(path), f"--runs={tmp_path / 'runs'}", *sets)
    assert ran.code == 0, ran.errors + ran.text


def answer_all(command, answers, *, seconds=60):
    """Run a command in a terminal and answer each question; what the screen showed, and the code."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "silotune.cli", *command],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        close_fds=True,
    )
    os.close(theirs)
    screen, seen, asked, ends = "", 0, [], time.monotonic() + seconds
    while time.monotonic() < ends:
        if not select.select([ours], [], [], 0.2)[0]:
            continue
        try:
            chunk = os.read(ours, 4096).decode()
        except OSError:  # the other side is closed
            break
        if not chunk:
            break
        screen += chunk
        if found := PROMPT.search(screen[seen:]):
            asked.append(found["question"])
            (reply,) = [text for key, text in answers.items() if key in found["question"]]
            seen = len(screen)
            os.write(ours, f"{reply.pop(0)}\n".encode())
    os.close(ours)
    return screen, asked, process.wait(timeout=10)


def test_on_a_terminal_it_asks_for_what_is_not_given_and_no_more(tmp_path, bert_folder):
    path = tmp_path / "plan.toml"
    screen, asked, code = answer_all(
        ["plan", "new", str(path), f"--base={bert_folder}", "--dataset=notes"],
        {
            "Task": [""],
            "Labels": ["no, yes"],
            "Whose data": ["1750,4000", "patient"],
            "Units": ["many", "500"],
            "Number of sites": ["4"],
            "Epsilon": ["plenty", "2"],
            "What a site can send": [""],
        },
    )
    assert code == 0, screen
    assert len(asked) == 10
    assert "'1750,4000' is no name: lower-case letters" in screen
    assert "'many' won't do." in screen
    assert "'plenty' won't do." in screen
    plan = Plan.load(path)
    assert plan.model.labels == ("no", "yes")
    assert (plan.privacy.unit, plan.privacy.epsilon) == ("patient", 2.0)
    assert (plan.aggregation.cohort, plan.aggregation.threshold) == (4, 3)


def test_without_a_terminal_nothing_is_asked_and_what_is_missing_is_named(tmp_path, bert_folder):
    path = tmp_path / "plan.toml"
    told = shown("plain", *words(path, bert_folder, dataset=None, labels=None))
    assert told.code == 10
    assert "--labels, --dataset" in told.errors
    assert not path.exists()


@pytest.mark.parametrize(
    "wrong", [{"units": "60,none"}, {"units": "0"}, {"split-by": "site"}, {"task": "vision"}]
)
def test_an_option_that_makes_no_sense_is_named(tmp_path, bert_folder, wrong):
    told = shown("plain", *words(tmp_path / "plan.toml", bert_folder, "--yes", **wrong))
    assert told.code == 2
    assert "won't do" in told.errors
    assert not (tmp_path / "plan.toml").exists()


def test_a_file_in_its_place_is_left_alone(tmp_path, bert_folder):
    path = tmp_path / "plan.toml"
    path.write_text("mine")
    told = shown("plain", *words(path, bert_folder, "--yes"))
    assert "ST-104" in told.errors
    assert path.read_text() == "mine"


def test_statistics_of_the_sites_answer_what_they_know(tmp_path, bert_folder):
    estimate = {"value": 0.5, "low": 0.4, "high": 0.6}
    statistics = {
        "format": "silotune statistics 1",
        "dataset": "letters",
        "unit": "patient",
        "sites": {"north": {"declared_units": 3000}, "south": {"declared_units": 200}},
        "labels": [{"label": "acute", "share": estimate}, {"label": "chronic", "share": None}],
        "records_a_unit": {
            "bins": [
                {"from": 1, "to": 1, "share": {**estimate, "value": 0.7}},
                {"from": 2, "to": 4, "share": {**estimate, "value": 0.25}},
                {"from": 5, "to": None, "share": None},
            ]
        },
        "lengths": {
            "counted": "words",
            "quantiles": [{"q": 0.5, "value": 8.0}, {"q": 0.95, "value": 30.0}],
        },
    }
    (tmp_path / "statistics.json").write_text(json.dumps(statistics))
    told = shown(
        "json", "plan", "new", str(tmp_path / "plan.toml"), f"--base={bert_folder}", "--epsilon=8",
        f"--from-statistics={tmp_path / 'statistics.json'}",
    )  # fmt: skip
    assert told.code == 0, told.errors
    found = {row["key"]: row["value"] for row in told.facts["settings"]}
    assert found["model.labels"] == ["acute", "chronic"]
    assert (found["privacy.unit"], found["privacy.max_records_per_unit"]) == ("patient", 4)
    assert found["data.max_length"] == 56
    assert found["data.dataset"] == "letters"
    assert "aggregation.secure" not in found  # of two sites
    assert told.facts["sha256"] == Plan.load(tmp_path / "plan.toml").sha256


@pytest.mark.parametrize(
    ("changes", "key", "value"),
    [
        ({}, "rounds.number", 120),
        ({"link": "0.0002"}, "rounds.number", 40),
        ({"units": "100000,90000"}, "privacy.rate", 0.03),
        ({"units": "100000,90000"}, "privacy.delta", 1e-6),
        ({"epsilon": "0"}, "privacy.mode", "none"),
        ({"units": "60,80"}, "rounds.min_sites", 2),
        ({"split-by": "group"}, "data.split_by", "group"),
    ],
)
def test_numbers_follow_from_the_facts(tmp_path, bert_folder, changes, key, value):
    told = shown("json", *words(tmp_path / "plan.toml", bert_folder, **changes))
    assert told.code == 0, told.errors
    found = {row["key"]: row["value"] for row in told.facts["settings"]}
    assert found[key] == value


def test_a_causal_model_has_an_adapters_rate_and_no_head(tmp_path, llama_folder):
    told = shown(
        "json", *words(tmp_path / "plan.toml", llama_folder, "--task=causal_lm", labels=None)
    )
    assert told.code == 0, told.errors
    found = {row["key"]: row["value"] for row in told.facts["settings"]}
    assert found["optimizer.site.adapter_lr"] > 0.005
    assert not [key for key in found if "head" in key]


def test_a_head_on_every_token_is_trained_alone_and_without_cosines(tmp_path, bert_folder):
    path = tmp_path / "plan.toml"
    told = shown("json", *words(path, bert_folder, "--task=token_classification", labels="NAME"))
    assert told.code == 0, told.errors
    found = {row["key"]: row["value"] for row in told.facts["settings"]}
    assert found["optimizer.site.head_rounds"] == found["rounds.number"]
    assert "model.head_features" not in found
    assert found["privacy.clip"] == {"head": 0.25, "adapter": 0.25}  # means over tokens are short
    assert Plan.load(path).model.labels == ("NAME",)
