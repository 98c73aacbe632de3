"""The verdict's words never say more than the numbers: the opposite of each sentence would fail here."""

import re
from dataclasses import replace
from statistics import fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from silotune.report.figures import summarise
from silotune.report.verdict import (
    personal_verdict,
    sides,
    site_verdict,
    trivial_verdict,
    verdict,
    worth,
)
from silotune.rounds.run_directory import read_record
from tests.simulation.synthetic_run import VARIANTS, Synthetic

SCORES = st.integers(0, 1000).map(lambda n: n / 1000)
ANYTHING = settings(deadline=None, max_examples=50)  # other processes share this machine


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The summary of a variant."""
    made = {}

    def get(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            made[name] = summarise(read_record(Synthetic(**VARIANTS[name]).write(folder)))
        return made[name]

    return get


@pytest.fixture(scope="module")
def found(runs):
    return runs("private")


def with_scores(found, *, metric="macro_f1", also_accuracy=True, **scores):
    """The summary with these test scores, and gains to match."""
    keys = [metric, *(["accuracy"] if also_accuracy and metric == "macro_f1" else [])]
    rows = [
        replace(row, test={**row.test, **dict.fromkeys(keys, scores[row.key])})
        if row.key in scores
        else row
        for row in found.methods
    ]
    probe = next((r.test[metric] for r in rows if r.key == "probe_federated"), None)
    if probe is not None:
        rows = [replace(row, gain_over_probe=row.test[metric] - probe) for row in rows]
    return replace(found, methods=tuple(rows))


def at_home(found, gains, accuracy=None):
    """The summary with these gains on the sites' own data."""
    accuracy = gains if accuracy is None else accuracy
    rows = tuple(
        replace(row, gain=gain, gain_accuracy=by_accuracy)
        for row, gain, by_accuracy in zip(found.by_site, gains, accuracy, strict=True)
    )
    return replace(
        found,
        by_site=rows,
        sites_worse=tuple(r.site for r in rows if r.gain < 0),
        sites_worse_by_accuracy=tuple(r.site for r in rows if r.gain_accuracy < 0),
    )


def luck(found):
    """Two binomial standard errors of the federated accuracy, by the formula of any textbook."""
    n, accuracy = sum(row.n for row in found.by_site), found.method("federated").test["accuracy"]
    return 2 * (accuracy * (1 - accuracy) / n) ** 0.5


@ANYTHING
@given(federated=SCORES, own=SCORES, probe=SCORES)
def test_better_and_worse_are_said_of_the_right_side(found, federated, own, probe):
    changed = with_scores(found, federated=federated, own=own, probe_federated=probe)
    text = " ".join(verdict(changed))
    gap = f"{abs(federated - own):.3f}"
    against = {
        federated > own: f"{gap} better than a site's own data",
        federated < own: f"{gap} worse than a site's own data",
        federated == own: "level with a site's own data",
    }[True]
    assert against in text
    assert ("LoRA beats the head-only probe" in text) == (federated > probe)
    assert ("LoRA did not beat the head-only probe" in text) == (federated <= probe)
    assert ("which may be chance" in text) == (0 < federated - probe < luck(changed))


@ANYTHING
@given(federated=SCORES, accuracy=SCORES, trivial=SCORES, trivial_accuracy=SCORES)
def test_a_model_that_is_no_better_than_none_says_so_before_anything_else(
    found, federated, accuracy, trivial, trivial_accuracy
):
    rows = {"federated": (federated, accuracy), "majority": (trivial, trivial_accuracy)}
    methods = tuple(
        replace(row, test=dict(zip(("macro_f1", "accuracy"), rows[row.key], strict=True)))
        if row.key in rows
        else row
        for row in found.methods
    )
    changed = replace(found, methods=methods)
    chance = luck(changed)
    fails = [
        name
        for name, new, old in (
            ("accuracy", accuracy, trivial_accuracy),
            ("macro-F1", federated, trivial),
        )
        if new - old <= chance
    ]
    said, first = trivial_verdict(changed), verdict(changed)[0]
    assert bool(said) == bool(fails)
    if fails:
        assert first == said[0]
        counted = "" if len(fails) == 2 else f", counted by {fails[0]}"
        assert f"no better than no model{counted}: always “acute” has" in first
        assert f"accuracy {trivial_accuracy:.3f} (the model {accuracy:.3f})" in first
        assert f"macro-F1 {trivial:.3f} (the model {federated:.3f})" in first
    assert ("macro-F1" in fails) <= (worth(changed) == [])


def test_a_classifier_that_calls_every_applicant_good_gets_a_word(found):
    constant = {
        "test": {"accuracy": 0.725, "macro_f1": 0.420},
        "recall": {"good": 1.0, "bad": 0.0},
    }
    rows = [
        replace(row, **constant) if row.key in {"federated", "majority"} else row
        for row in found.methods
    ]
    said = verdict(replace(found, methods=tuple(rows)))
    assert said[0].startswith("The model is no better than no model: always “acute” has accuracy")
    assert "It finds none of the held-out records labelled “bad”." in said


@ANYTHING
@given(share=SCORES)
def test_labels_are_said_to_be_missed_exactly_when_none_of_theirs_is_found(found, share):
    rows = [
        replace(row, recall={"acute": share, "chronic": 0.5}) if row.key == "federated" else row
        for row in found.methods
    ]
    text = " ".join(verdict(replace(found, methods=tuple(rows))))
    assert ("finds none of the held-out records labelled “acute”" in text) == (share == 0)
    assert "labelled “chronic”" not in text


@ANYTHING
@given(before=st.integers(1000, 4000), after=st.integers(1000, 4000))
def test_a_language_model_that_learned_next_to_nothing_says_so_first(runs, before, after):
    losses = {"base": before / 1000, "federated": after / 1000}
    changed = with_scores(runs("causal"), metric="loss", **losses)
    first = verdict(changed)[0]
    little = before - after <= 10  # a hundredth of a nat: one per cent of perplexity
    assert first.startswith("The run taught the model next to nothing") == little
    if little:
        assert (
            f"is {after / 1000:.3f}, that of the base model as it came {before / 1000:.3f}" in first
        )


@ANYTHING
@given(
    federated=SCORES,
    own=SCORES,
    gains=st.lists(st.integers(-300, 300).map(lambda n: n / 1000), min_size=7, max_size=7),
    accuracy=st.lists(st.integers(-300, 300).map(lambda n: n / 1000), min_size=7, max_size=7),
)
def test_whether_it_is_worth_it_and_for_whom_follows_from_both_tables(
    found, federated, own, gains, accuracy
):
    scores = {"federated": federated, "own": own, "majority": -1.0}
    changed = at_home(with_scores(found, **scores), gains, accuracy)
    (said,) = worth(changed)
    assert verdict(changed)[0] == said  # the reader's question is answered first
    gain, losers = federated - own, [g < 0 or a < 0 for g, a in zip(gains, accuracy, strict=True)]
    assert said.startswith("Federating is not worth it here") == (gain <= 0)
    assert said.startswith("Whether federating is worth it here can't be told") == (
        0 < gain <= luck(changed)
    )
    pays = gain > max(0.0, luck(changed))
    assert said.startswith("Federating is worth it for every site") == (pays and not any(losers))
    some = said.startswith("Federating is worth it for a site that meets everybody's")
    assert some == (pays and any(losers))
    if some:
        assert f"better by macro-F1 or accuracy at {sum(losers)} of 7 sites" in said
        named = {row.site for row, loses in zip(changed.by_site, losers, strict=True) if loses}
        assert all((row.site in said) == (row.site in named) for row in changed.by_site) or all(
            losers
        )
    assert f"reaches macro-F1 {federated:.3f}, the sites' own models {own:.3f} on average" in said


def test_without_own_models_nobody_is_told_what_it_is_worth(runs):
    (said,) = worth(runs("alone"))
    assert said.startswith("Whether federating is worth it to a site can't be told from this run")


@ANYTHING
@given(
    gains=st.lists(st.integers(-2, 2).map(float), min_size=7, max_size=7),
    accuracy=st.lists(st.integers(-2, 2).map(float), min_size=7, max_size=7),
)
def test_sites_that_lose_are_counted_by_every_score_of_the_table(found, gains, accuracy):
    """Federating can raise macro-F1 at every site and lower accuracy at most of them."""
    (said,) = site_verdict(at_home(found, gains, accuracy))
    for title, column in (("macro-F1", gains), ("accuracy", accuracy)):
        losers = sum(gain < 0 for gain in column)
        assert f"{losers or 'none'} of 7 sites by {title}" in said


@ANYTHING
@given(
    low=st.integers(0, 100), high=st.integers(0, 100), home=SCORES, away=SCORES, loses=st.booleans()
)
def test_the_sites_labels_explain_what_they_can_and_no_more(found, low, high, home, away, loses):
    labels = {row.site: {"acute": 0.5, "chronic": 0.5} for row in found.by_site}
    one, other = (row.site for row in found.by_site[:2])
    labels[one] = {"acute": 1 - low / 100, "chronic": low / 100}
    labels[other] = {"acute": 1 - high / 100, "chronic": high / 100}
    changed = at_home(replace(found, labels=labels), [-0.1 if loses else 0.1] * 7)
    scored = {"own": {"macro_f1": home}, "own_everywhere": {"macro_f1": away}}
    rows = tuple(replace(row, **scored) for row in changed.by_site)
    said = sides(replace(changed, by_site=rows))
    shares = [low / 100, high / 100, 0.5]
    spread = max(shares) - min(shares)
    assert bool(said) == (spread >= 0.2 and loses and home > away)
    if said:
        shown = [int(n) for n in re.findall(r"(\d+)% ", said[0])]
        assert shown[1] - shown[0] == pytest.approx(100 * spread, abs=1)
        assert f"{home:.3f} on their sites' own cases and {away:.3f} on everybody's" in said[0]


@ANYTHING
@given(
    personal=st.lists(SCORES, min_size=7, max_size=7), own=st.lists(SCORES, min_size=7, max_size=7)
)
def test_a_head_of_ones_own_is_compared_site_by_site(found, personal, own):
    rows = tuple(
        replace(row, personal={"macro_f1": p}, own={"macro_f1": o})
        for row, p, o in zip(found.by_site, personal, own, strict=True)
    )
    (said,) = personal_verdict(replace(found, by_site=rows))
    better = sum(p > o for p, o in zip(personal, own, strict=True))
    assert f"better than the own model at {better} of 7 sites" in said
    assert f"reaches macro-F1 {fmean(personal):.3f} on its own cases" in said
    assert f"its own model reaches {fmean(own):.3f}" in said


def test_privacy_is_claimed_only_where_it_is_given(found):
    assert verdict(found)[-1].startswith("Privacy: ε = 7.98 at δ = 1e-5 for each record")

    def last(**facts):
        return verdict(replace(found, privacy=replace(found.privacy, **facts)))[-1]

    seeded = last(guarantee="seeded", private=False, statement="seeded: not private")
    assert seeded.startswith("Not private (seeded")
    assert last(guarantee="none", budget=None) == "The run gives no differential privacy."
    trusted = last(guarantee="coordinator", private=False, statement="all but the coordinator")
    assert trusted == "Privacy: all but the coordinator."
    assert "for all records of a site together" in last(protects="all records of a site together")


@pytest.mark.parametrize("variant", VARIANTS)
def test_progress_counts_the_rounds_and_the_sites_that_are_there(runs, variant):
    found = runs(variant)
    (said,) = (s for s in verdict(found) if "simulated site" in s)
    assert ("not finished" in said or "no round has finished" in said) == (not found.finished)
    assert f"{found.rounds_finished}" in said or not found.rounds_finished
    assert f"{len(found.sites)} simulated" in said


def test_a_head_that_was_trained_alone_is_not_called_an_adapter(found):
    said = " ".join(verdict(replace(found, trained="head")))
    assert "trained one head together" in said
    assert "adapter together" not in said
