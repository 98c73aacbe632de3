"""The summary's figures follow from the run's files by plain arithmetic."""

import json
import math
import statistics
from collections import Counter

import pytest
from typer.testing import CliRunner

from silotune.cli import app
from silotune.errors import RunDirectoryInvalid
from silotune.privacy.accounting import epsilon
from silotune.privacy.events import step_event
from silotune.report.figures import summarise
from silotune.report.page import method_table
from silotune.report.report import print_summary, summary
from silotune.rounds.run_directory import RunDirectory, read_record
from tests.consoles import console
from tests.simulation.synthetic_run import BY_SITE, HOSPITALS, VARIANTS, Synthetic


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(run directory, summary) of a variant."""

    def get(name, **more):
        root = Synthetic(**{**VARIANTS[name], **more}).write(tmp_path_factory.mktemp(name))
        return RunDirectory(root), summary(root)

    return get


def rows(found, key="key"):
    return {row[key]: row for row in found["methods" if key == "key" else "by_site"]}


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_is_plain_json_data(made, variant):
    _, found = made(variant)
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_gains_are_differences_of_the_scores_in_results_json(made):
    run, found = made("private")
    scores = {m["key"]: m["test"]["macro_f1"] for m in run.read_json("results.json")["methods"]}
    for key, row in rows(found).items():
        over_own = None if key == "own" else pytest.approx(scores[key] - scores["own"])
        over_probe = scores[key] - scores["probe_federated"]
        assert row["gain_over_own"] == over_own
        expected = None if key == "probe_federated" else pytest.approx(over_probe)
        assert row["gain_over_probe"] == expected


def test_a_lower_loss_is_a_gain(made):
    _, found = made("causal")
    assert rows(found)["federated"]["gain_over_own"] == pytest.approx(2.752 - 2.366)
    assert found["metric"]["key"] == "loss"


def test_sites_that_lose_are_exactly_those_whose_own_score_is_higher(made):
    _, found = made("private")
    expected = [s for s, (own, fed, _) in zip(HOSPITALS, BY_SITE, strict=True) if fed < own]
    assert found["sites_worse"] == expected


def test_bytes_and_seconds_are_sums_over_the_events(made):
    run, found = made("private")
    finished = [event for event in run.events if event["event"] == "round_finished"]
    assert found["bytes_up"] == sum(event["bytes_up"] for event in finished)
    assert found["bytes_down"] == sum(event["bytes_down"] for event in finished)
    replies = [event for event in run.events if event["event"] == "site_replied"]
    split = found["time"]
    trained = math.fsum(event["train_seconds"] for event in replies)
    assert split["train_all_sites"] == pytest.approx(trained)
    assert split["train"] == pytest.approx(trained / 2)  # two workers
    parts = sum(split[name] for name in ("train", "wait", "aggregate", "other"))
    assert parts == pytest.approx(split["rounds"])


def test_sites_that_never_replied_are_not_counted_as_trained(made):
    _, found = made("private")
    assert set(found["sites"]) - set(found["sites_trained"]) == {"Orthopaedics"}


def test_epsilon_is_the_largest_of_the_sites(made):
    run, found = made("private")
    stated = {s: f["epsilon"] for s, f in run.read_json("privacy.json")["sites"].items()}
    assert found["privacy"]["epsilon_by_site"] == stated
    assert found["privacy"]["epsilon"] == max(stated.values())


def test_an_unfinished_run_has_the_epsilon_of_the_rounds_each_site_replied_in(made):
    run, found = made("partial")
    replies = Counter(e["site"] for e in run.events if e["event"] == "site_replied")
    assert set(replies.values()) == {21, 23}
    for site, number in replies.items():
        spent = epsilon([step_event(rate=0.06, sigma=0.704, steps=number)], delta=1e-5)
        told = found["privacy"]["epsilon_by_site"][site]
        assert spent * (1 - 1e-9) <= told <= 1.2 * spent  # the next certified point of the curve
    assert not found["finished"]
    assert (found["rounds_finished"], found["rounds_planned"]) == (23, 72)


def test_a_seeded_plan_is_not_private_even_before_privacy_json_says_so(made):
    _, found = made("partial", seeded=True)
    assert not found["privacy"]["private"]
    assert found["privacy"]["statement"] == "seeded: not private"


def test_the_probe_is_compared_only_at_the_same_epsilon(made, tmp_path):
    run, found = made("private")
    assert found["probe_at_same_epsilon"]
    results = run.read_json("results.json")
    results["methods"][-1]["epsilon"] = 3.0
    run.write_json("results.json", results)
    found = summary(run.root)
    assert not found["probe_at_same_epsilon"]
    assert any("but at another ε" in sentence for sentence in found["verdict"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_printed_summary_fits_80_columns_and_has_the_verdict(made, variant):
    run, found = made(variant)
    drawn = console()
    print_summary(run.root, drawn)
    lines = drawn.file.getvalue().splitlines()
    assert all(len(line) <= 80 for line in lines)
    text = " ".join(" ".join(lines).split())
    for sentence in found["verdict"]:
        assert " ".join(sentence.split()) in text
    for row in found["methods"]:
        assert f"{row['test'][found['metric']['key']]:.3f}" in text


def test_no_digit_of_the_sites_table_is_cut_where_a_name_is_too_long_for_80_columns(made):
    run, found = made("private")
    drawn = console()
    print_summary(run.root, drawn)
    lines = [line.strip() for line in drawn.file.getvalue().splitlines()]
    first = next(n for n, line in enumerate(lines) if line.startswith("site, own test data")) + 1
    shown = lines[first : first + len(found["by_site"])]
    assert any("\N{HORIZONTAL ELLIPSIS}" in line for line in shown)
    for line, row in zip(shown, found["by_site"], strict=True):
        assert line.split()[-1].lstrip("+\N{MINUS SIGN}") == f"{abs(row['gain_everywhere']):.3f}"


def test_what_is_not_private_is_printed_as_such(made):
    drawn = console()
    print_summary(made("seeded")[0].root, drawn)
    assert "NOT PRIVATE: seeded: not private" in drawn.file.getvalue()


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(RunDirectoryInvalid):
        summary(tmp_path)


def with_score(folder, score, *, seed=None, plan=None):
    root = Synthetic(faults=False).write(folder)
    run = RunDirectory(root)
    results = run.read_json("results.json")
    results["methods"][0]["test"]["macro_f1"] = score
    run.write_json("results.json", results)
    facts = run.read_json("resolved.json")
    facts["plan"]["plan"]["seed"] = seed
    facts["plan"]["privacy"] |= plan or {}
    run.write_json("resolved.json", facts)
    return root


def test_runs_of_one_plan_show_their_spread_side_by_side(tmp_path):
    scores = (0.80, 0.82, 0.87)
    first, *others = [with_score(tmp_path / f"{s}", s, seed=n) for n, s in enumerate(scores)]
    beside = [word for other in others for word in ("--beside", str(other))]
    done = CliRunner().invoke(app, ["report", str(first), *beside, "--json"])
    row = rows(json.loads(done.output))["federated"]
    assert row["spread"] == {
        "runs": 3,
        "mean": pytest.approx(statistics.fmean(scores)),
        "deviation": pytest.approx(statistics.stdev(scores)),
    }
    record = read_record(first)
    found = summarise(record, beside=[read_record(other) for other in others])
    table = method_table(found)
    assert "0.830 ± 0.036 (3)" in table.rows[0]
    assert all(len(row) == len(table.head) == len(table.short) for row in table.rows)


def test_a_run_of_another_plan_or_the_run_itself_has_no_place_beside_it(tmp_path):
    first = with_score(tmp_path / "one", 0.8)
    other = with_score(tmp_path / "other", 0.8, plan={"epsilon": 3.0})
    for wrong, word in ((other, "another plan"), (first, "the run itself")):
        with pytest.raises(RunDirectoryInvalid, match=word):
            summary(first, beside=[wrong])
