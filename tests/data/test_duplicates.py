"""Look-alikes: who they are, how surely they are found, and what they are worth to a score."""

import random

import numpy as np
import pytest

from silotune.data.duplicates import Sketches, find_twins, words_of
from silotune.data.flattery import measure_flattery

RNG = random.Random(7)
WORDS = ["".join(RNG.choice("abcdefghijklmnop") for _ in range(7)) for _ in range(3_000)]


def note(length, seed):
    return " ".join(random.Random(seed).choices(WORDS, k=length))


def alike(one, other, **labels):
    """Whether the second of two texts is seen as a repetition of the first."""
    sketches = Sketches.of([one, other], **labels)
    return bool(find_twins(sketches, np.zeros(2, dtype=bool)).repeats[1])


BASE = "pain of the left knee since march"


@pytest.mark.parametrize(
    "other",
    [
        "Pain of the LEFT knee, since March 2021.",
        "pain of the right knee since march",
        "severe pain of the left knee since march",
        "pain of the knee since march",
        "pain of the left knee march since",
    ],
    ids=["case, digits, stops", "replaced", "added", "left out", "moved"],
)
def test_short_texts_that_differ_in_a_word_are_alike(other):
    assert alike(BASE, other)


@pytest.mark.parametrize(
    "other", ["pain of the right hip since march", "no pain", "", "fever and cough since march"]
)
def test_short_texts_that_differ_in_more_are_not(other):
    assert not alike(BASE, other)


def test_very_short_texts_are_alike_only_if_they_are_the_same():
    assert not alike("left knee", "right knee")
    assert alike("left knee", "Left knee!")


def test_with_labels_only_texts_of_one_label_are_alike():
    long = note(60, 1)
    for text in (BASE, long):
        assert alike(text, text, labels=["a", "a"])
        assert not alike(text, text, labels=["a", "b"])


def test_characters_of_chinese_count_as_words():
    assert words_of("左膝疼痛 MRI") == ["左", "膝", "疼", "痛", "mri"]
    assert alike("左膝疼痛三月来", "右膝疼痛三月来")


def changed(text, share, seed):
    rng, words = random.Random(seed), text.split()
    for place in rng.sample(range(len(words)), round(share * len(words))):
        words[place] = rng.choice(WORDS)
    return " ".join(words)


def jaccard(one, other):
    a, b = (
        {tuple(w[i : i + 3]) for i in range(len(w) - 2)} for w in (words_of(one), words_of(other))
    )
    return len(a & b) / len(a | b)


def test_long_texts_are_found_by_the_share_that_they_have_in_common():
    """Seeded, with hashes that are the same in every process: no false alarm."""
    found = {"near": [], "far": []}
    for seed in range(150):
        one = note(120, seed)
        for kind, share in (("near", 0.02), ("far", 0.12)):
            other = changed(one, share, seed)
            same = jaccard(one, other)
            if kind == "near" and same >= 0.86:
                found[kind].append(alike(one, other))
            if kind == "far" and same <= 0.68:
                found[kind].append(alike(one, other))
    assert min(map(len, found.values())) > 100
    assert np.mean(found["near"]) >= 0.97
    assert np.mean(found["far"]) <= 0.02


def test_a_copied_note_with_a_new_first_sentence_is_alike():
    long = note(200, 3)
    assert alike(long, f"Seen again today without change. {long}")


def test_twins_across_the_split_are_found_whatever_the_order():
    texts = [BASE, note(80, 1), "other words that nobody repeats here", BASE, note(80, 1)]
    for held_out in ([0, 0, 0, 1, 1], [1, 1, 1, 0, 0]):
        held = np.array(held_out, dtype=bool)
        twins = find_twins(Sketches.of(texts), held)
        assert (twins.in_training >= 0).tolist() == [
            bool(h) and at != 2 for at, h in enumerate(held)
        ]
        assert all(not held[twins.in_training[at]] for at in range(5) if twins.in_training[at] >= 0)
        assert twins.copies.tolist() == [False, False, False, True, True]


def test_a_crowd_of_copies_is_no_matter():
    texts = [note(60, 1)] * 300 + [BASE] * 300
    held = np.arange(600) % 3 == 0
    twins = find_twins(Sketches.of(texts), held)
    assert np.count_nonzero(twins.repeats) == 598
    assert (twins.in_training[held] >= 0).all()


def test_nothing_to_compare_is_no_matter():
    for texts in ([], [""], ["a b c d e"]):
        twins = find_twins(Sketches.of(texts), np.zeros(len(texts), dtype=bool))
        assert not twins.repeats.any()


@pytest.mark.parametrize("length", [12, 60])
def test_what_look_alikes_are_worth_is_measured(length):
    """Labels are coins: without look-alikes a half is right. Seeded; bounds are four deviations."""
    rng = random.Random(9)
    texts = [note(length, seed) for seed in range(900)]
    labels = [rng.choice("ab") for _ in texts]
    for seed in range(150):  # copies with the label of their first, on the other side
        texts.append(changed(texts[seed], 1 / length, seed))
        labels.append(labels[seed])
    held = np.arange(len(texts)) >= 750
    sketches = Sketches.of(texts)
    twins = find_twins(sketches, held)
    gain = measure_flattery(texts, labels, held, sketches=sketches, twins=twins)
    assert gain.asked == 300
    assert gain.nearest == pytest.approx(0.75, abs=0.115)  # half are copies, the others are coins
    assert gain.nearest_without == pytest.approx(0.5, abs=0.115)
    assert gain.nearest - gain.nearest_without > gain.nearest_error > 0
    assert gain.words - gain.words_without > gain.words_error


def test_without_look_alikes_nothing_is_measured():
    texts = [note(12, seed) for seed in range(40)]
    held = np.arange(40) >= 30
    sketches = Sketches.of(texts)
    twins = find_twins(sketches, held)
    assert measure_flattery(texts, ["a", "b"] * 20, held, sketches=sketches, twins=twins) is None
