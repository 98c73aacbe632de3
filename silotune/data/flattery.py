"""What it is worth to a score that a held-out text has look-alikes among the training texts.

Two simple models answer the same held-out texts twice: with all training texts, and each without its own
look-alikes. One remembers (the label of the nearest text), one does not (naive Bayes over words): what a
fine-tuned model gains lies between the two, nearer to the first the longer it trains.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from silotune.data.duplicates import Bools, Rows, Sketches, Twins, words_of

_MOST_ASKED, _MOST_TRAINED, _BUCKETS = 1_000, 20_000, 1 << 18


@dataclass(frozen=True)
class Flattery:
    """Accuracy with and without look-alikes in training: private.

    Attributes
    ----------
    asked : int
        Held-out texts that were asked for.
    nearest, nearest_without : float
        Accuracy of the label of the most similar training text.
    nearest_error : float
        Two standard errors of the difference.
    words, words_without, words_error : float
        The same of naive Bayes over words.
    """

    asked: int
    nearest: float
    nearest_without: float
    nearest_error: float
    words: float
    words_without: float
    words_error: float


def measure_flattery(
    texts: Sequence[str],
    labels: Sequence[str],
    held_out: Bools,
    *,
    sketches: Sketches,
    twins: Twins,
) -> Flattery | None:
    """Ask two simple models for labels, with and without look-alikes; None where there are none.

    At most 1,000 held-out texts are asked for, of at most 20,000 training texts and those that they
    resemble.

    Parameters
    ----------
    texts, labels : sequence of str, length n
        The records.
    held_out : bool array of shape [n]
        Which are on the side that is tested.
    sketches, twins
        Of the same texts.
    """
    asked = _some(np.flatnonzero(held_out), _MOST_ASKED)
    seen = twins.in_training[asked]
    rest = _some(np.flatnonzero(~held_out), _MOST_TRAINED)
    trained = np.union1d(rest, seen[seen >= 0])
    if not len(asked) or (seen < 0).all():
        return None
    names, kind = np.unique(np.array(labels, dtype=np.str_), return_inverse=True)
    counts = _word_counts([texts[row] for row in np.concatenate([asked, trained])])
    alike = sketches.resembling(asked, trained)
    questions, lessons = counts[: len(asked)], counts[len(asked) :]
    of_kind = np.eye(len(names))[kind[trained]]
    right = [
        found == kind[asked]
        for model in (_nearest, _bayes)
        for found in model(questions, lessons, of_kind, alike)
    ]
    nearest, nearest_without, words, words_without = (float(r.mean()) for r in right)
    return Flattery(
        asked=len(asked),
        nearest=nearest,
        nearest_without=nearest_without,
        nearest_error=_two_errors(right[0], right[1]),
        words=words,
        words_without=words_without,
        words_error=_two_errors(right[2], right[3]),
    )


def _two_errors(one: Bools, other: Bools) -> float:
    """Two standard errors of the mean difference of paired answers."""
    deviation = float(np.std(one.astype(float) - other.astype(float)))
    return 2.0 * deviation / math.sqrt(len(one))


def _some(rows: Rows, most: int) -> Rows:
    """At most so many of the rows, evenly spaced."""
    if len(rows) <= most:
        return rows
    return rows[np.linspace(0, len(rows) - 1, most).astype(np.int64)]


def _word_counts(texts: Sequence[str]) -> Any:
    """How often each text has each word, a sparse matrix of shape [texts, buckets]."""
    from scipy.sparse import csr_matrix

    words = [[crc32(word.encode()) % _BUCKETS for word in words_of(text)] for text in texts]
    offsets = np.cumsum([0, *map(len, words)])
    columns = np.fromiter((w for own in words for w in own), dtype=np.int64, count=offsets[-1])
    counts = csr_matrix((np.ones(len(columns)), columns, offsets), shape=(len(texts), _BUCKETS))
    counts.sum_duplicates()
    return counts


def _nearest(
    questions: Any, lessons: Any, of_kind: NDArray[np.float64], alike: Bools
) -> tuple[Rows, Rows]:
    """The label of the text with the largest cosine of weighted words, with and without look-alikes."""
    weight = np.log((1 + lessons.shape[0]) / (1 + lessons.getnnz(axis=0)))
    weighted = lessons.multiply(weight).tocsr()
    lengths = np.sqrt(np.asarray(weighted.power(2).sum(axis=1)).ravel())
    kinds, across = of_kind.argmax(axis=1), weighted.T.tocsc()
    found = []
    for start in range(0, questions.shape[0], 100):
        part = slice(start, start + 100)
        products = (questions[part].multiply(weight).tocsr() @ across).toarray()
        cosines = products / np.maximum(lengths, 1e-9)
        with_all = cosines.argmax(axis=1)
        found.append((with_all, np.where(alike[part], -1.0, cosines).argmax(axis=1)))
    with_all, without = (np.concatenate(rows) for rows in zip(*found, strict=True))
    return kinds[with_all], kinds[without]


def _bayes(
    questions: Any, lessons: Any, of_kind: NDArray[np.float64], alike: Bools
) -> tuple[Rows, Rows]:
    """The likeliest label by the words' frequencies, with and without look-alikes."""
    totals, prior = np.asarray(lessons.T @ of_kind), of_kind.sum(axis=0)
    sizes = np.asarray(lessons.sum(axis=1)).ravel()
    of_all = sizes @ of_kind
    answers = np.zeros((2, questions.shape[0]), dtype=np.int64)
    for number in range(questions.shape[0]):
        question, own = questions[number], np.flatnonzero(alike[number])
        words, kinds = question.indices, of_kind[own]
        theirs = lessons[own][:, words].T @ kinds
        for gone in (0, 1):
            seen = totals[words] - gone * theirs + 1.0
            every = of_all - gone * (sizes[own] @ kinds) + _BUCKETS
            logs = question.data @ np.log(seen / every)
            logs += np.log(prior - gone * kinds.sum(axis=0) + 1.0)
            answers[gone, number] = logs.argmax()
    return answers[0], answers[1]
