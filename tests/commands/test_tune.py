"""`silotune tune` as an engineer runs it: searched, interrupted, gone on with, and what comes out."""

import json
import tomllib

import optuna
import pytest

from silotune.plan.plan import Plan
from silotune.plan.ranges import Range
from silotune.rounds.run_directory import RunDirectory
from silotune.simulation import run, tuning
from silotune.simulation.grid import WorkerGrid
from tests.commands.terminal import shown
from tests.federation import PRIVATE, write_federation

HEAD = ("--set=rounds.number=3", "--set=optimizer.site.head_rounds=3")
RATE = "--vary=optimizer.site.head_lr=0.0001:0.5"


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    monkeypatch.setattr(run, "WorkerGrid", lambda *a, **k: WorkerGrid(*a, **{**k, "workers": 0}))


@pytest.fixture
def federation(tmp_path, bert_folder):
    return write_federation(tmp_path, bert_folder)


def words(federation, *others):
    return ("tune", str(federation.plan_path), *HEAD, *others)


def test_the_plan_comes_first_and_nothing_worse_is_called_best(federation):
    found = shown("json", *words(federation, RATE, "--trials=3", "--keep"))
    assert found.code == 0, found.errors
    facts = found.facts
    first, *others = facts["trials"]
    own = Plan.load(federation.plan_path).optimizer.site.head_lr
    assert first["settings"] == {"optimizer.site.head_lr": own}
    assert len(others) == 2
    assert all(1e-4 <= each["settings"]["optimizer.site.head_lr"] <= 0.5 for each in others)
    scores = [each["score"] for each in facts["trials"] if each["score"] is not None]
    assert facts["best"]["score"] == max(scores)
    assert facts["paid_in_epsilon"] is False


def test_the_score_is_that_of_the_last_round_on_validation_data(federation):
    found = shown("json", *words(federation, RATE, "--trials=1", "--keep"))
    (tried,) = found.facts["trials"]
    directory = RunDirectory.open(federation.folder / "plan-tune" / "runs" / tried["runs"][0])
    looks = [e for e in directory.events if e["event"] == "evaluated" and e["view"] == "simulator"]
    last = [e for e in looks if e["split"] == "validation" and e["round"] == 3]
    assert tried["score"] == last[-1]["pooled"]["macro_f1"]


def test_the_best_plan_is_a_file_that_simulates(federation):
    found = shown("json", *words(federation, RATE, "--trials=2", "--vary=rounds.deadline=500,600"))
    path = federation.folder / "plan-tune" / "best.toml"
    assert found.facts["plan"] == str(path)
    best = found.facts["best"]["settings"]
    plan = Plan.load(path)
    assert plan.optimizer.site.head_lr == best["optimizer.site.head_lr"]
    assert plan.rounds.deadline == best["rounds.deadline"]
    own = {"rounds.number": 3, "optimizer.site.head_rounds": 3, **best}
    same = Plan.load(federation.plan_path, own)
    assert plan.sha256 == same.sha256
    again = shown("plain", "simulate", str(path), f"--sites={federation.folder}")
    assert again.code == 0, again.errors


def test_only_the_best_ones_run_is_kept(federation):
    found = shown("json", *words(federation, RATE, "--trials=3"))
    runs = [path.name for path in (federation.folder / "plan-tune" / "runs").iterdir()]
    assert runs == found.facts["best"]["runs"]


def test_a_folder_with_runs_of_no_study_is_left_alone(federation):
    other = federation.folder / "runs" / "dear"
    other.mkdir(parents=True)
    found = shown("plain", *words(federation, RATE, "--trials=1", f"--study={federation.folder}"))
    assert "ST-" in found.errors and "of no study" in " ".join(found.errors.split())
    assert other.is_dir() and not (federation.folder / tuning.STUDY_FILE).exists()


def test_a_search_without_one_score_is_told_and_writes_no_plan(federation, monkeypatch):
    whole = run.simulate

    def diverging(*args, listener, **kwargs):
        def unscored(event):
            pooled = dict.fromkeys(event.get("pooled", {}), float("nan"))
            listener({**event, "pooled": pooled} if pooled else event)

        return whole(*args, listener=unscored, **kwargs)

    monkeypatch.setattr(run, "simulate", diverging)
    found = shown("json", *words(federation, RATE, "--trials=2"))
    assert found.code == 0, found.errors
    assert [each["state"] for each in found.facts["trials"]] == ["failed", "failed"]
    assert (found.facts["best"], found.facts["plan"]) == (None, None)
    assert not (federation.folder / "plan-tune" / "best.toml").exists()


def test_all_runs_hold_the_same_units_out(federation):
    found = shown("json", *words(federation, RATE, "--trials=2", "--keep"))
    runs = federation.folder / "plan-tune" / "runs"
    names = [each["runs"][0] for each in found.facts["trials"]]
    first, second = (json.loads((runs / name / "records.json").read_text()) for name in names)
    assert first == second  # fingerprints are keyed with the secret that splits


def test_an_interrupted_search_goes_on_with_what_was_cut_off(federation, monkeypatch):
    whole, calls = run.simulate, []

    def cut(*args, **kwargs):
        calls.append(kwargs["overrides"]["optimizer.site.head_lr"])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(*args, **kwargs)

    monkeypatch.setattr(run, "simulate", cut)
    found = shown("plain", *words(federation, RATE, "--trials=3"))
    assert found.code == 130
    found = shown("json", *words(federation, RATE, "--trials=3"))
    assert found.code == 0, found.errors
    assert len(calls) == 4  # one, the one that was cut off and made again, and the third
    assert calls[1] == calls[2]
    assert len(found.facts["trials"]) == 3


def test_another_plan_or_other_ranges_need_another_folder(federation):
    assert shown("plain", *words(federation, RATE, "--trials=1")).code == 0
    found = shown("plain", *words(federation, "--vary=privacy.rate=0.1:0.4", "--trials=2"))
    assert found.code != 0
    assert "other ranges" in found.errors
    found = shown("plain", *words(federation, RATE, "--trials=2", "--set=privacy.rate=0.3"))
    assert "other plan" in found.errors


def test_a_proposal_that_fails_is_told_and_the_search_goes_on(federation, monkeypatch):
    whole, calls = run.simulate, []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise tuning.PlanInvalid("no such luck")
        return whole(*args, **kwargs)

    monkeypatch.setattr(run, "simulate", failing)
    found = shown("json", *words(federation, RATE, "--trials=3"))
    assert [each["state"] for each in found.facts["trials"]] == ["finished", "failed", "finished"]
    assert "no such luck" in found.facts["trials"][1]["reason"]


def test_a_plan_that_fails_is_the_first_again_when_what_was_wrong_is_mended(
    federation, monkeypatch
):
    whole, calls = run.simulate, []

    def failing_once(*args, **kwargs):
        calls.append(kwargs["overrides"]["optimizer.site.head_lr"])
        if len(calls) == 1:
            raise tuning.PlanInvalid("no such luck")
        return whole(*args, **kwargs)

    monkeypatch.setattr(run, "simulate", failing_once)
    found = shown("plain", *words(federation, RATE, "--trials=1"))
    assert "no such luck" in found.errors
    found = shown("json", *words(federation, RATE, "--trials=1"))
    assert calls == [Plan.load(federation.plan_path).optimizer.site.head_lr] * 2
    assert [each["state"] for each in found.facts["trials"]] == ["finished"]


def test_runs_that_looked_are_counted_and_no_others(federation, monkeypatch):
    whole, calls = run.simulate, []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:  # the first of two runs of the second proposal
            raise tuning.PlanInvalid("no such luck")
        return whole(*args, **kwargs)

    monkeypatch.setattr(run, "simulate", failing)
    found = shown("plain", *words(federation, RATE, "--trials=2", "--repeats=2"))
    assert "looked at the sites' records 3 times" in " ".join(found.text.split())


def test_what_falls_behind_is_stopped_early(federation, monkeypatch):
    monkeypatch.setattr(
        optuna.pruners, "MedianPruner", lambda **_: optuna.pruners.ThresholdPruner(lower=2.0)
    )
    found = shown("json", *words(federation, RATE, "--trials=1", "--set=rounds.evaluate_every=1"))
    (tried,) = found.facts["trials"]
    assert (tried["state"], tried["score"]) == ("stopped", None)
    assert found.facts["best"] is None


def test_repeats_are_runs_of_their_own_and_their_mean_counts(federation):
    found = shown("json", *words(federation, RATE, "--trials=1", "--repeats=2", "--keep"))
    (tried,) = found.facts["trials"]
    runs = [federation.folder / "plan-tune" / "runs" / name for name in tried["runs"]]
    scores = [list(RunDirectory.open(each).metrics)[-1]["validation"]["macro_f1"] for each in runs]
    assert len(scores) == 2
    assert tried["score"] == pytest.approx(sum(scores) / 2)


@pytest.mark.parametrize(
    ("vary", "told"),
    [
        ("optimizer.site.head_lr", "expected key=low:high"),
        ("optimizer.site.head_lr=2:1", "expected key=low:high"),
        ("optimizer.site.nothing=1:2", "nothing"),
        ("privacy.rate=0.5:7", "privacy.rate"),
    ],
)
def test_a_range_that_the_plan_could_not_take_is_told_at_once(federation, vary, told):
    found = shown("plain", *words(federation, f"--vary={vary}"))
    assert found.code != 0
    assert told in found.errors


def test_a_plan_without_validation_data_is_refused(federation):
    found = shown("plain", *words(federation, RATE, "--set=data.validation_share=0"))
    assert "never by test data" in found.errors


def test_a_terminal_shows_the_run_and_says_what_was_not_paid(federation):
    found = shown("terminal", *words(federation, RATE, "--trials=2"))
    assert found.code == 0, found.text
    assert "2/2: macro-F1" in found.text
    assert "no ledger paid" in found.text
    assert "Best plan:" in found.text


def test_ranges_without_words_are_around_the_plans_own_rates_and_clip(federation):
    plan = Plan.load(
        federation.plan_path, {**PRIVATE, "privacy.clip": {"head": 1.0, "adapter": 2.0}}
    )
    ranges = {each.key: each for each in tuning.usual_ranges(plan)}
    assert set(ranges) >= {"optimizer.site.head_lr", "privacy.clip.head", "privacy.clip.adapter"}
    assert ranges["privacy.clip.adapter"].ends == (0.5, 8.0)
    assert all(each.by_logarithm for each in ranges.values())


def test_whole_numbers_choices_and_logarithms_are_read_from_what_is_typed():
    parse = Range.parse
    whole = tuning.distribution(parse("a=1:20"))
    assert isinstance(whole, optuna.distributions.IntDistribution)
    assert parse("a=1:20").by_logarithm
    assert not parse("a=0.5:2.0").by_logarithm
    assert not parse("a=0:20").by_logarithm
    assert parse('a="x","y"').choices == ("x", "y")
    assert tomllib.loads("v = 0.5")["v"] in parse("a=0.5:2.0").ends
