"""Votes of one site's blocks: what one unit can change, whatever it is, and what a block votes for."""

import csv
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from silotune.client.model_cache import ModelCache
from silotune.client.votes import block_scores, shares_of, site_votes
from silotune.data.records import Split, load_records
from silotune.data.site import SiteConfig
from silotune.models.tasks.text_classification import TextClassification
from silotune.plan.counted import part_scale
from tests.federation import CHOICES
from tests.vote_sites import SECURE, sites_of, voting, write_voters

SECRET = b"s" * 32


@pytest.fixture(scope="module")
def voters(tmp_path_factory, bert_folder):
    return write_voters(tmp_path_factory.mktemp("voters"), bert_folder, seed=3)


@pytest.fixture(scope="module")
def models():
    return ModelCache(CHOICES)


def read_rows(site):
    with (site.folder / "notes.csv").open(newline="") as file:
        return list(csv.reader(file))


def with_rows(site, folder, rows):
    """The same site, which declares the same, with other rows."""
    folder.mkdir(parents=True)
    text = (site.folder / "site.toml").read_text()
    (folder / "site.toml").write_text(text)
    with (folder / "notes.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return SiteConfig.load(folder / "site.toml")


def voted(site, plan, models, *, of=site_votes):
    records = load_records(site, plan, roles=plan.roles, secret=SECRET)
    return of(
        records,
        plan,
        site=site.name,
        declared_units=site.units_for(plan),
        trainable=models.for_plan,
    )


def scores(site, plan, models):
    return voted(site, plan, models, of=block_scores)


def same(one, other):
    return np.array_equal(one, other, equal_nan=True)


ODD = (
    ["", "yes"], ["x", "scurvy"], ["\x00\u202e", "no"], ["w " * 5_000, "yes"], ["🦴", "yes"],
    ["gout of the left side 3", "no"],
)  # fmt: skip


def test_a_unit_more_or_less_changes_one_vote_at_most_to_the_last_bit(voters, models, tmp_path):
    """Each of some units taken away, and odd ones added, one at a time; all other blocks score alike."""
    made, _, plan = voters
    site = sites_of(made)[0]
    head, *rows = read_rows(site)
    whole, base = scores(site, plan, models), voted(site, plan, models)
    neighbours = [rows[:n] + rows[n + 1 :] for n in range(0, len(rows), 15)]
    neighbours += [[*rows, [*odd, "alpha-odd"]] for odd in ODD]
    changed = 0
    for number, other in enumerate(neighbours):
        near = with_rows(site, tmp_path / str(number) / "alpha", [head, *other])
        found = scores(near, plan, models)
        assert found.shape == whole.shape
        touched = [n for n in range(len(whole)) if not same(whole[n], found[n])]
        assert len(touched) <= 1
        changed += len(touched)
        moved = np.linalg.norm(voted_of(found, plan) - base)
        assert moved <= 1.0
    assert changed >= 2  # the neighbours were no copies


def voted_of(found, plan):
    return shares_of(found).sum(axis=0) / 2**30 * part_scale(plan)


def test_a_patient_is_in_one_block_with_all_of_its_records(tmp_path, bert_folder):
    made, _, plan = write_voters(tmp_path, bert_folder, patients=True, block_units=10, units=110)
    for site in sites_of(made):
        records = load_records(site, plan, roles=plan.roles, secret=SECRET)
        ballots = records.ballots
        for unit in range(records.n_units()):
            own = np.flatnonzero(records.unit_of == unit)
            assert len(set(ballots.block[own].tolist())) == 1
            assert len(set(ballots.scored[own].tolist())) == 1
        held_out = records.split != Split.TRAIN
        assert (ballots.block[held_out] == -1).all()
        assert (ballots.block[~held_out] >= 0).all()


def test_every_block_votes_also_one_without_a_unit(voters, models, tmp_path):
    made, _, plan = voters
    site = sites_of(made)[0]
    head, *rows = read_rows(site)
    blocks = int(site.units_for(plan) * 0.7 / 10)
    for kept in (rows, rows[:3], []):
        near = with_rows(site, tmp_path / str(len(kept)) / "alpha", [head, *kept])
        votes = voted(near, plan, models) / part_scale(plan)
        assert votes.sum() == pytest.approx(blocks)
    assert votes == pytest.approx(np.full(3, blocks / 3))  # nobody is there: nobody is preferred


def test_equals_share_a_vote_and_what_scores_no_number_has_none():
    found = np.array([[np.nan, 0.5, 0.7], [np.nan] * 3, [0.2, np.nan, 0.2], [-np.inf, -1.0, -2.0]])
    shares = shares_of(found) / 2**30
    expected = [[0, 0, 1], [1 / 3] * 3, [0.5, 0, 0.5], [0, 1, 0]]
    assert shares == pytest.approx(np.array(expected))


@given(
    st.lists(
        st.sampled_from([0.1, 0.5, 0.9, math.nan, math.inf, -math.inf]), min_size=4, max_size=4
    ),
    st.lists(
        st.sampled_from([0.1, 0.5, 0.9, math.nan, math.inf, -math.inf]), min_size=4, max_size=4
    ),
)
def test_no_two_votes_of_a_block_are_further_apart_than_the_root_of_two(one, other):
    """Exactly, in whole numbers: whatever the scores, what a unit can do is at most one whole vote."""
    first, second = shares_of(np.array([one, other]))
    assert int(((first - second) ** 2).sum()) <= 2 * (1 << 30) ** 2
    assert min(first.min(), second.min()) >= 0
    assert 0 < first.sum() <= 1 << 30


def test_a_record_that_no_block_can_be_encoded_with_costs_that_block_its_say(
    voters, models, monkeypatch
):
    made, _, plan = voters
    site = sites_of(made)[0]
    whole, real = scores(site, plan, models), TextClassification.encode
    records = load_records(site, plan, roles=plan.roles, secret=SECRET)
    block = records.ballots.block
    row = int(np.flatnonzero(block >= 0)[0])
    poison = records.examples[row]["text"]

    def encode(self, examples, tokenizer, *, plan):
        if any(example["text"] == poison for example in examples):
            raise RuntimeError("of this record")
        return real(self, examples, tokenizer, plan=plan)

    monkeypatch.setattr(TextClassification, "encode", encode)
    found = scores(site, plan, models)
    assert np.isnan(found[block[row]]).all()
    others = [n for n in range(len(whole)) if n != block[row]]
    assert same(whole[others], found[others])


def test_blocks_vote_against_a_candidate_that_learns_nothing(voters, models):
    """Two in three blocks or more: by chance, at random among three, once in some thousand."""
    made, trained, _ = voters
    plan = voting(trained, block_units=20)
    found = [scores(site, plan, models) for site in sites_of(made)]
    votes = shares_of(np.concatenate(found)).sum(axis=0)
    assert votes[1] <= votes.sum() / 3
    assert np.nanmean(np.concatenate(found)[:, 0]) > np.nanmean(np.concatenate(found)[:, 1])


def test_steps_in_a_block_have_the_federations_signal_and_noise(voters, monkeypatch, models):
    """Noise over expected units is that of the whole step, which the sites share."""
    made, trained, plan = voters
    seen = []
    monkeypatch.setattr(
        "silotune.client.votes._tried",
        lambda block, model, *, name, units, sigma: seen.append(sigma / units) or 0.0,
    )
    site = sites_of(made)[0]
    scores(site, plan, models)
    from silotune.client.terms import sigma_for

    whole = trained.expected_batch(230)
    sigma = sigma_for(trained, site.units_for(plan))
    assert seen[0] == pytest.approx(sigma / whole)
    assert SECURE["privacy.noise"] == trained.privacy.noise
