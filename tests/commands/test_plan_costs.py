"""`silotune plan check`: what a run costs, what was left out, and settings in a bad corner."""

import re
import time

import pytest

from silotune.commands import plan as plan_commands
from silotune.commands.costs import seconds_a_record, signals
from silotune.models.base import load_model, outline
from silotune.plan.plan import Plan
from tests.commands.terminal import FORMS, shown
from tests.federation import write_federation
from tests.plan.test_left_out import REQUIRED, as_toml


@pytest.fixture(scope="module")
def plan_path(tmp_path_factory, bert_folder):
    path = tmp_path_factory.mktemp("check") / "plan.toml"
    model = {**REQUIRED["model"], "base": str(bert_folder)}
    path.write_text(
        as_toml({**REQUIRED, "model": model, "data": {"dataset": "notes", "max_length": 32}})
    )
    return path


def checked(path, *sets, sizes="4000,4000", form="json"):
    told = shown(
        form, "plan", "check", str(path), f"--sizes={sizes}", *(f"--set={s}" for s in sets)
    )
    assert told.code == 0, told.errors
    return told


def notes(path, *sets, sizes="4000,4000"):
    return checked(path, *sets, sizes=sizes).facts["notes"]


def named(found, *needles):
    return [note for note in found if all(needle in note for needle in needles)]


def test_what_was_left_out_is_told_with_its_rule(plan_path):
    found = {row["key"]: row for row in checked(plan_path).facts["left_out"]}
    assert found["optimizer.site.head_lr"]["value"] == 0.083
    assert "10 / rounds" in found["optimizer.site.head_lr"]["why"]
    assert set(found) >= {"optimizer.site.head_rounds", "model.head_features", "lora.r"}


@pytest.mark.parametrize("form", FORMS[:2])
def test_a_person_reads_the_same(plan_path, form):
    plain = re.sub(r"\x1b\[[0-9;]*m", "", checked(plan_path, form=form).text)
    said = " ".join(plain.split())
    assert "Left out. optimizer.site.head_lr = 0.083: 10 / rounds" in said
    assert "The whole run of 120 rounds moves" in said
    assert "Computing takes about" in said


def test_the_bytes_of_a_run_are_those_of_what_each_round_sends(plan_path, bert_folder):
    facts = checked(plan_path).facts
    head = 2 * 2048 + 2
    assert facts["run_bytes_up"] == 120 * 4 * head
    assert facts["run_bytes_down"] == 120 * facts["bytes_down"]
    assert facts["link_seconds"] == pytest.approx(
        8e-6 * (facts["run_bytes_up"] + facts["run_bytes_down"]) / 100
    )
    assert 0 < facts["sites"]["site 1"]["seconds"] < 600


def test_a_pass_that_the_machine_held_up_makes_no_record_slow(plan_path):
    model, passed = load_model(Plan.load(plan_path), device="cpu"), []

    def held_up(*_):
        passed.append(time.sleep(0.2 * (len(passed) == 1)))  # the first that is measured

    model.module.register_forward_hook(held_up)
    assert 0 < seconds_a_record(model) < 0.2 / 8
    assert len(passed) > 2


def test_a_plan_with_enough_units_is_in_no_corner(plan_path):
    found = notes(plan_path)
    assert not named(found, "far below its noise")
    assert not named(found, "is large for this plan")
    assert not named(found, "fewer than 10 units")


@pytest.mark.parametrize(
    ("sets", "sizes", "needles"),
    [
        (["privacy.epsilon=0.5"], "200,200", ["far below its noise", "the head"]),
        ([], "50,4000", ["fewer than 10 units", "site 1"]),
        (["optimizer.site.head_lr=1.0"], "4000,4000", ["head_lr = 1 is large", "0.083"]),
        (["optimizer.site.head_lr=0.001"], "4000,4000", ["head_lr = 0.001 is small"]),
        (
            ["optimizer.site.head_rounds=20", "optimizer.site.adapter_lr=1e-4"],
            "4000,4000",
            ["adapter_lr = 0.0001 is small"],
        ),
        (
            ["optimizer.server.name=sgd", "optimizer.site.head_rounds=0", "lora.r=2"],
            "4000,4000",
            ["adapter_lr = 0.001 is small", "under SGD, with 672 units a step"],
        ),
        ([], "400,400,400,400", ["'local'", "2.0 times the noise"]),
        (
            [
                'model.head_features={kind="cosines"}',
                "data.split_by=group",
                'model.centre_texts=["a", "b", "c"]',
            ],
            "4000,4000",
            ["model.head_features", "groups"],
        ),
    ],
)
def test_bad_corners_are_named_with_what_is_better(plan_path, sets, sizes, needles):
    assert named(notes(plan_path, *sets, sizes=sizes), *needles)


def test_an_adapters_rate_under_sgd_that_noise_allows_is_in_no_corner(plan_path):
    sgd = ["optimizer.server.name=sgd", "optimizer.site.head_rounds=0", "lora.r=2"]
    (told,) = named(notes(plan_path, *sgd), "adapter_lr = 0.001 is small")
    fitting = re.search(r"an adapter at (\S+) as far", told)[1]
    assert not named(notes(plan_path, *sgd, f"optimizer.site.adapter_lr={fitting}"), "adapter_lr")


BANDED = ("optimizer.server.name=sgd", "privacy.bands=8")


def test_what_correlated_noise_is_worth_is_told(plan_path):
    plain, found = checked(plan_path).facts, checked(plan_path, *BANDED).facts
    assert plain["noise_beside_independent"] is None
    # benchmarks/bands.py: 120 rounds at a rate of 0.12
    assert found["noise_beside_independent"] == pytest.approx(0.751, abs=0.005)
    assert not named(found["notes"], "privacy.bands")
    (weights,) = (row for row in found["left_out"] if row["key"] == "privacy.band_weights")
    assert len(weights["value"]) == 8
    told = " ".join(checked(plan_path, *BANDED, form=FORMS[0]).text.split())
    assert "is 0.75 of that of independent noise" in told
    assert "charged once for 8 rounds, 15 times in all, for a sampling rate that is 8 times" in told


def test_where_correlated_noise_gains_nothing_it_is_told(plan_path):
    found = notes(plan_path, *BANDED, "privacy.epsilon=1", "rounds.number=40")
    assert named(found, "privacy.bands = 8", "gains nothing")


def test_signal_over_noise_is_that_of_the_longest_gradients(plan_path, bert_folder):
    """A step of 0.12 * 0.7 * 8000 units, each of the clip's length, over noise of sigma a number."""
    plan = Plan.load(plan_path, {"privacy.noise": "local"})
    layout = outline(plan, base=str(bert_folder))
    facts = checked(plan_path).facts
    sigma = facts["sites"]["site 1"]["sigma"]
    step, numbers, rounds = signals(plan, layout, {"a": 4000, "b": 4000})["head"]
    assert (numbers, rounds) == (4098, 120)
    assert step == pytest.approx(0.12 * 0.7 * 8000 / (2**0.5 * sigma * 4098**0.5))


def test_sites_beside_the_plan_are_looked_at_too(tmp_path, bert_folder):
    federation = write_federation(tmp_path, bert_folder)
    sets = ["privacy.mode=record", "privacy.epsilon=1.0", "privacy.delta=1e-4", "privacy.clip=1.0"]
    told = shown("json", "plan", "check", str(federation.plan_path), *(f"--set={s}" for s in sets))
    assert told.code == 0, told.errors
    assert named(told.facts["notes"], "far below its noise for what is trained")


def test_what_it_is_at_is_shown_on_a_terminal_and_written_nowhere_else(plan_path, monkeypatch):
    def assess_slowly(*words):
        time.sleep(0.5)  # a terminal shows nothing that lasts a twelfth of a second or less
        return own(*words)

    own = plan_commands.assess
    words = ("plan", "check", str(plan_path), "--sizes=4000,4000")
    with monkeypatch.context() as slower:
        slower.setattr(plan_commands, "assess", assess_slowly)
        screen = shown("terminal", *words).text
    assert "Trying the model" in screen
    assert "Reading the sites' records" in screen
    for form in FORMS[1:]:
        told = shown(form, *words)
        assert "Trying" not in told.text + told.errors


@pytest.mark.parametrize("form", FORMS[:2])
def test_where_rounds_ask_some_sites_only_it_is_told_in_how_many_each_is(plan_path, form):
    sizes = ",".join(["4000"] * 10)
    plain = re.sub(
        r"\x1b\[[0-9;]*m", "", checked(plan_path, "rounds.sites=2", sizes=sizes, form=form).text
    )
    assert "Of these 10 sites each is asked in about 24 rounds" in " ".join(plain.split())
    facts = checked(plan_path, "rounds.sites=2", sizes=sizes).facts
    assert facts["rounds_a_site"] == pytest.approx(120 * 2 / 10)
    assert checked(plan_path, "rounds.sites=20", sizes=sizes).facts["rounds_a_site"] == 120
    # Few sites a round have few sites' noise, and few sites' signal.
    three = checked(plan_path, "rounds.sites=4", sizes=sizes).facts["notes"]
    assert named(three, "the sum of 4 sites has 2.0 times the noise")
