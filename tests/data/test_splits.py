from __future__ import annotations

import hashlib
import hmac

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from silotune.data.records import Split, assign, fractions, salt_for

names = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
shares = st.floats(0.0, 0.45)
SALT = b"s" * 32


def slow_fraction(key: str) -> float:
    """The documented definition, with Python's own big integers."""
    digest = hmac.new(SALT, key.encode("utf-8"), hashlib.sha256).hexdigest()
    return (int(digest[:16], 16) >> 11) / 2**53


@given(st.lists(names, max_size=30))
def test_fractions_follow_their_definition(keys):
    assert fractions(keys, salt=SALT).tolist() == [slow_fraction(key) for key in keys]


@given(st.lists(names, min_size=1, max_size=30), st.randoms(use_true_random=False), shares, shares)
def test_a_key_is_on_the_same_side_whatever_else_is_there(keys, random, test, validation):
    sides = dict(
        zip(
            keys, assign(keys, test_share=test, validation_share=validation, salt=SALT), strict=True
        )
    )
    some = random.sample(keys, random.randint(1, len(keys)))
    again = assign(some, test_share=test, validation_share=validation, salt=SALT)
    assert [sides[key] for key in some] == again.tolist()


@given(st.lists(names, min_size=1, max_size=30), shares, shares)
def test_a_larger_test_share_keeps_what_a_smaller_one_held_out(keys, one, other):
    less, more = sorted([one, other])
    small = assign(keys, test_share=less, validation_share=0.0, salt=SALT) == Split.TEST
    large = assign(keys, test_share=more, validation_share=0.0, salt=SALT) == Split.TEST
    assert (large[small]).all()


def test_the_split_of_a_name_under_a_secret_never_changes():
    # Models were trained on what this put into the training part: it may never move.
    salt = salt_for(seed=None, site="north", secret=b"0" * 32)
    assert fractions(["patient-1", "a"], salt=salt).tolist() == [
        0.9933494233063593,
        0.19310245558201034,
    ]


@given(st.integers(0, 2**63 - 1), st.binary(min_size=32, max_size=32), st.text("abc", min_size=1))
def test_a_seeded_split_follows_from_seed_and_site_and_another_from_the_secret(seed, secret, site):
    seeded = salt_for(seed=seed, site=site, secret=secret)
    assert seeded == salt_for(seed=seed, site=site, secret=b"another")
    assert seeded != salt_for(seed=seed, site=site + "x", secret=secret)
    own = salt_for(seed=None, site=site, secret=secret)
    assert own != salt_for(seed=None, site=site, secret=secret + b"x")


def test_shares_hold_on_average():
    keys = [str(number) for number in range(20_000)]
    counts = np.bincount(assign(keys, test_share=0.2, validation_share=0.1, salt=SALT)) / len(keys)
    # The keys are fixed, so this can't fail by chance; 0.01 is 3.5 standard deviations.
    assert np.allclose(counts, [0.7, 0.1, 0.2], atol=0.01)


def test_shares_of_zero_hold_out_nothing():
    keys = [str(number) for number in range(1_000)]
    assert not assign(keys, test_share=0.0, validation_share=0.0, salt=SALT).any()
