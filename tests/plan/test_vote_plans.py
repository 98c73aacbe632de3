"""Plans that have a vote: what they exclude, what candidates may be, what their readers are told."""

import pytest

from silotune.errors import PlanInvalid
from silotune.plan.counted import counted_parts, part_scale
from silotune.plan.plan import Plan, candidates_of, plan_in_words
from silotune.plan.voted import MOST_STEPS, blocks_at, vote_tables
from silotune.plan.written import plan_toml
from tests.vote_sites import CANDIDATES, trained, voting

REFUSED = [
    ({"privacy.mode": "none"}, "privacy.mode: must be 'record' in a vote"),
    ({"privacy.rate": 0.5}, "privacy.rate: must be 1 in a vote"),
    ({"privacy.clip": 2.0}, "privacy.clip: must be 1 in a vote"),
    ({"privacy.metrics_share": 0.1}, "privacy.metrics_share: must be 0"),
    ({"rounds.number": 2}, "rounds.number: must be 1"),
    ({"rounds.evaluate_every": 1}, "rounds.evaluate_every: must be 0"),
    ({"aggregation.weights": "equal"}, "aggregation.weights: must be 'declared'"),
    ({"optimizer.site.head_lr": 0.2}, "optimizer: the vote itself trains nothing"),
    ({"privacy.unit": "patient"}, "vote.plan.privacy.unit: must be privacy.unit"),
    ({"vote.candidates": [{}]}, "vote.candidates: expected"),
    ({"vote.candidates": [{}, {}]}, "number 2: the same as an earlier one"),
    ({"vote.candidates": [{}, {"privacy.epsilon": 9.0}]}, "privacy.epsilon can't be voted on"),
    ({"vote.candidates": [{}, {"plan.seed": 1}]}, "plan.seed can't be voted on"),
    ({"vote.candidates": [{}, {"optimizer.site.head_lr": -1.0}]}, "number 2: optimizer.site.head_lr"),
    ({"vote.candidates": [{}, {"optimizer.site.head_rate": 1.0}]}, "number 2: optimizer.site.head_rate"),
    ({"vote.candidates": [{}, {"optimizer.site.head_lr.x": 1.0}]}, "head_lr is a value, not a table"),
    ({"vote.candidates": [{}, {"optimizer.site.adapter_lr": 1.0}]}, "candidates train a head alone"),
    ({"vote.candidates": [{}, {"rounds.number": MOST_STEPS}]}, "steps together"),
    ({"vote.plan.rounds.local_steps": 4, "vote.plan.privacy.noise": "local"}, "local_steps: must be 1"),
    ({"lora.target_modules": "auto"}, "trains an adapter; candidates train a head alone"),
    ({"model.task": "causal_lm", "model.labels": []}, "vote: causal_lm has no head to train alone"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "said"), REFUSED)
def test_what_a_vote_excludes_is_refused_by_name(changes, said):
    with pytest.raises(PlanInvalid) as error:
        voting(trained()).override(changes)
    assert said in error.value.detail


def test_what_is_wrong_with_several_candidates_is_told_once():
    rates = [{"optimizer.site.head_lr": rate} for rate in (0.1, 0.2, -1.0, 0.3)]
    wrong = [{**one, "privacy.epsilon": 9.0, "plan.seed": 1} for one in rates]
    with pytest.raises(PlanInvalid) as error:
        voting(trained()).override({"vote.candidates": wrong})
    assert error.value.detail.count("privacy.epsilon") == 1
    assert "vote.candidates: numbers 1, 2, 3, 4: privacy.epsilon can't" in error.value.detail
    wrong = [{**one, "privacy.rate": 2.0} for one in rates]
    with pytest.raises(PlanInvalid) as error:
        voting(trained()).override({"vote.candidates": wrong})
    assert error.value.detail.count("privacy.rate") == 1
    assert "numbers 1, 2, 3, 4: privacy.rate" in error.value.detail
    assert "number 3: optimizer.site.head_lr" in error.value.detail


def test_a_vote_is_the_same_after_its_canonical_text_and_its_file(tmp_path):
    made = voting(trained())
    again = Plan.from_canonical(made.canonical())
    assert (again, again.sha256) == (made, made.sha256)
    path = tmp_path / "vote.toml"
    path.write_text(plan_toml(made))
    assert Plan.load(path).sha256 == made.sha256


def test_candidates_are_the_plan_with_their_own_settings_and_a_head_alone():
    made = candidates_of(voting(trained()))
    assert [plan.optimizer.site.head_lr for plan in made] == [0.3, 1e-6, 0.1]
    assert [plan.rounds.number for plan in made] == [6, 6, 3]
    for plan in made:
        assert plan.privacy == trained().privacy
        assert plan.head_rounds == plan.rounds.number
        assert plan.plan.name == "small"


def test_what_a_vote_sends_is_one_number_a_candidate_and_a_unit_moves_it_by_one():
    made = voting(trained())
    assert counted_parts(made) == (("votes", 3),)
    moved = part_scale(made) * 2**0.5
    assert 1.0 - 1e-5 < moved <= 1.0


def test_how_many_blocks_there_are_follows_from_public_numbers_alone():
    made = voting(trained(), block_units=50)
    assert blocks_at(made, 1000) == 14  # of 700 that train
    assert blocks_at(made, 10) == 1


def test_the_words_say_what_is_done_and_what_leaves():
    words = dict(plan_in_words(voting(trained(), epsilon=0.5)))
    for part in (
        "Settings of the plan 'small' are chosen by votes",
        "by every one of 3 candidates",
        "Released for all sites together: the number of votes of each candidate, with noise",
        "One record is in one block and can change one vote",
        "2: site.head_lr 1e-06",
        "3: site.head_lr 0.1, rounds.number 3",
    ):
        assert part in words["Vote"]
    assert words["Privacy"].startswith(
        "At most epsilon 0.5 at delta 0.0001 for each record; this pays"
    )
    assert "Held-out records take no part" in words["Data"]


def test_other_plans_have_the_text_they_had_before_there_were_votes():
    assert '"vote"' not in trained().canonical()
    assert vote_tables(trained(), CANDIDATES, epsilon=1.0, units=9)["vote"]["units"] == 9
