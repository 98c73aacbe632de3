"""Token classification: what is where in a text, as spans with labels.

The plan's labels are kinds of entities. Each token is told to be outside of all of them, to begin one or
to go on with it (the tags of Ramshaw and Marcus, 1995, as B, I and O): 2 labels + 1 classes, made here.
Tokens are matched with the characters of spans by the tokenizer's own offsets.

A text that is longer than ``data.max_length`` is read in overlapping windows of that length, all in the
one record that it is. Each token is owned by one window, the one where it stands further from an edge:
there it is learned and answered, and elsewhere it is only context. A record's loss is the mean over its
own tokens, each counted once.

What is asked of a word is answered for the whole of it: pieces of a word (letters or digits with nothing
between them) are one answer, by their mean probabilities. Words of one kind side by side are one entity,
unless it is quite sure that the second begins another.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy

from silotune.errors import ModelError
from silotune.models.batching import (
    Batch,
    Encoded,
    Rows,
    batches,
    padding_id,
    surrounding_ids,
    windows_of,
)
from silotune.models.prediction import Prediction
from silotune.models.spans import TextSpan, spans_in, written
from silotune.models.task import LoadedModel, TaskModel
from silotune.plan.plan import Plan

_PREDICT_BATCH = 64
_BLANK = -1  # target of a token that is nothing but spaces: neither learned nor answered
_GOES_ON = 1 << 20  # set in the target of a token that goes on with the word before it
_IGNORED = -100
_LIKELY = 0.5
_SURE = 0.9  # share of "begins" in a kind's probability, from which on another entity begins

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class _Tokens:
    """A text's tokens: their ids, and where each begins and ends, without spaces."""

    ids: list[int]
    places: list[tuple[int, int]]


@dataclass(frozen=True)
class TokenClassification:
    """Cross-entropy of the tag of each token.

    Parameters
    ----------
    threshold : float
        How likely it must be that a word is in any entity, where something is predicted. A lower one
        finds more, and more wrongly.
    """

    threshold: float = _LIKELY

    def example(self, text: str, *, number: int, plan: Plan) -> dict[str, str]:
        """A text whose first word is an entity."""
        labels, word = plan.model.labels, (text.split() or [""])[0]
        start = text.find(word)
        found = [TextSpan(start, start + len(word), labels[number % len(labels)])] if word else []
        return {"text": text, "spans": written(found)}

    def encode(
        self, examples: Sequence[Mapping[str, str]], tokenizer: Any, *, plan: Plan
    ) -> Encoded:
        """Token ids and a tag for each, as many as ``data.max_windows`` windows hold.

        Raises
        ------
        ModelError
            The tokenizer does not say where in a text its tokens are.
        """
        room = plan.data.max_length, plan.data.max_windows
        tokens = _tokens(tokenizer, [example["text"] for example in examples])
        tagged = [
            _tagged(found, example["text"], spans_in(example["spans"]), plan.model.labels)
            for found, example in zip(tokens, examples, strict=True)
        ]
        return _encoded(tokens, tagged, tokenizer, window=room[0], most=room[1])

    def collate(self, encoded: Encoded, rows: Rows, device: torch.device) -> dict[str, Tensor]:
        """A right-padded batch of the windows of some records, in their order.

        Returns
        -------
        dict
            ``input_ids``, ``attention_mask`` [windows, longest]; ``targets`` of the same shape, -100
            where a token is not the window's own; ``goes_on``, whether a token goes on with a word;
            ``row_of`` [windows], the place in `rows` of each window's record; ``rows`` [records].
        """
        chosen = encoded.subset(rows)
        return chosen.whole(device) | _asked(chosen, device)

    def losses(self, model: TaskModel, batch: Batch) -> Tensor:
        """Mean loss of each record's tokens, whatever windows they are in; float32 of shape [n]."""
        return _losses(model(batch), batch)

    def head_losses(
        self, model: TaskModel, features: Tensor, encoded: Encoded, rows: Rows
    ) -> Tensor:
        """The same from the features [windows, tokens, hidden] of the given rows."""
        asked = _asked(encoded.subset(rows), features.device)
        return _losses(model.logits(features), asked)

    def score(self, model: TaskModel, batch: Batch, *, cap: float = math.inf) -> Floats:
        """Of each label the entities found rightly, found, and there; at last the records.

        Shape [3 labels + 1]. An entity is found rightly if all of it is, and nothing else with it. The
        entities of one record have together an L2 norm of at most `cap`: what is beyond counts less.
        """
        with model.inference():
            return _counts(model(batch), batch, cap=cap)

    def head_score(
        self, model: TaskModel, features: Tensor, encoded: Encoded, rows: Rows
    ) -> NDArray[np.float64]:
        """The same counts from the features [windows, tokens, hidden] of the given rows."""
        with model.inference():
            asked = _asked(encoded.subset(rows), features.device)
            return _counts(model.logits(features), asked, cap=math.inf)

    def predict(
        self, model: LoadedModel, examples: Sequence[Mapping[str, str]]
    ) -> list[Prediction]:
        """The spans of each text, in the order of the text."""
        texts = [example["text"] for example in examples]
        found = find_spans(model, texts, threshold=self.threshold)
        return [Prediction(output=[span._asdict() for span in spans]) for spans in found]


def _asked(encoded: Encoded, device: torch.device) -> dict[str, Tensor]:
    """What a batch of all these records has beside what the model is given: see `collate`."""
    marks = encoded.targets_in_batch(fill=_IGNORED)
    own = marks >= 0
    arrays = {
        "targets": np.where(own, marks & (_GOES_ON - 1), _IGNORED),
        "goes_on": own & (marks & _GOES_ON > 0),
        "row_of": np.repeat(np.arange(len(encoded)), encoded.sequences),
        "rows": np.arange(len(encoded)),
    }
    return {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}


def _losses(logits: Tensor, batch: Batch) -> Tensor:
    """Mean loss [n] of each record's own tokens, from logits [windows, tokens, tags]."""
    targets = batch["targets"]
    each = cross_entropy(
        logits.float().transpose(1, 2), targets, reduction="none", ignore_index=_IGNORED
    )
    number = (targets != _IGNORED).sum(1)
    # By a product, whose sums have one order on every device.
    mine = (batch["row_of"] == batch["rows"][:, None]).to(each.dtype)
    return (mine @ each.sum(1)) / (mine @ number.to(each.dtype)).clamp(min=1.0)


def _counts(logits: Tensor, batch: Batch, *, cap: float) -> Floats:
    """The counts [3 labels + 1] of a batch, from logits [windows, tokens, tags]."""
    own = batch["targets"] != _IGNORED
    shares = _finite(logits[own].float().softmax(-1).double().cpu().numpy())
    targets = batch["targets"][own].cpu().numpy()
    goes_on = batch["goes_on"][own].cpu().numpy()
    row_of = batch["row_of"][:, None].expand_as(own)[own].cpu().numpy()
    kinds, n = (logits.shape[-1] - 1) // 2, len(batch["rows"])
    total = np.zeros(3 * kinds + 1)
    for row in range(n):
        mine = row_of == row
        found = set(_entities(_words_tags(shares[mine], goes_on[mine], _LIKELY)))
        there = set(_entities(targets[mine]))
        counts = np.zeros((3, kinds))
        for number, entities in enumerate((found & there, found, there)):
            for _, _, kind in entities:
                counts[number, kind] += 1.0
        norm = float(np.linalg.norm(counts))
        total[:-1] += counts.ravel() * min(1.0, cap / norm if norm else 1.0)
    total[-1] = n
    return total


def find_spans(
    model: LoadedModel, texts: Sequence[str], *, threshold: float = _LIKELY
) -> list[list[TextSpan]]:
    """What a model finds in texts of any length; none of a text is left unread.

    Parameters
    ----------
    model : LoadedModel
        Trained for token classification.
    texts : sequence of str
    threshold : float
        How likely it must be that a word is in any entity. A lower one finds more, and more wrongly.

    Returns
    -------
    list of lists of TextSpan
        One for each text, in the text's order; they don't overlap.
    """
    labels, window = model.plan.model.labels, model.plan.data.max_length
    tokens = _tokens(model.tokenizer, texts)
    outside = [_words(found, text) for found, text in zip(tokens, texts, strict=True)]
    encoded = _encoded(tokens, outside, model.tokenizer, window=window, most=None)
    result: list[list[TextSpan]] = [[] for _ in texts]
    for rows in batches(encoded, range(len(texts)), size=_PREDICT_BATCH):
        batch = model.task.collate(encoded, rows, model.device)
        shares = _own_shares(model.module, batch)
        for row, own in zip(rows, shares, strict=True):
            marks = np.asarray(outside[row], dtype=np.int64)
            places = [place for place in tokens[row].places if place[0] < place[1]]
            tags = _words_tags(own, marks[marks != _BLANK] == _GOES_ON, threshold)
            result[row] = [
                TextSpan(places[first][0], places[last][1], labels[kind])
                for first, last, kind in _entities(tags)
            ]
    return result


def _own_shares(model: TaskModel, batch: Batch) -> list[Floats]:
    """Probabilities [tokens, tags] of each record's tokens, a few windows at a time."""
    parts: list[Floats] = []
    names = ("input_ids", "attention_mask")
    with model.inference():
        for start in range(0, len(batch["input_ids"]), _PREDICT_BATCH):
            some = slice(start, start + _PREDICT_BATCH)
            logits = model({name: batch[name][some] for name in names}).float()
            own = batch["targets"][some] != _IGNORED
            parts.append(_finite(logits[own].softmax(-1).double().cpu().numpy()))
    shares = np.concatenate(parts)
    own = batch["targets"] != _IGNORED
    row_of = batch["row_of"][:, None].expand_as(own)[own].cpu().numpy()
    return [shares[row_of == row] for row in range(len(batch["rows"]))]


def _finite(shares: Floats) -> Floats:
    """Probabilities where the model gave some; outside of everything where it gave none."""
    bad = ~np.isfinite(shares).all(1)
    shares[bad] = np.eye(shares.shape[1])[0]
    return shares


# --- a text's tokens ---


def _tokens(tokenizer: Any, texts: Sequence[str]) -> list[_Tokens]:
    """The tokens of texts, and which characters each is made of."""
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"token_classification needs to know where in a text each token is, which a "
            f"{type(tokenizer).__name__} does not say",
            remedy="Choose a base model with a fast tokenizer (a tokenizer.json in its folder).",
        )
    if not texts:
        return []
    found = tokenizer(
        list(texts),
        add_special_tokens=False,
        split_special_tokens=True,
        return_offsets_mapping=True,
        verbose=False,
    )
    return [
        _Tokens(ids, [_trimmed(text, *place) for place in places])
        for text, ids, places in zip(
            texts, found["input_ids"], found["offset_mapping"], strict=True
        )
    ]


def _trimmed(text: str, start: int, end: int) -> tuple[int, int]:
    """A token's place without the spaces that some tokenizers count to it."""
    while start < end and text[start].isspace():
        start += 1
    while start < end and text[end - 1].isspace():
        end -= 1
    return start, end


def _words(tokens: _Tokens, text: str) -> list[int]:
    """The target of each token if nothing is anywhere: outside, and whether it goes on with a word."""
    targets, last = [], 0
    for start, end in tokens.places:
        if start == end:
            targets.append(_BLANK)
            continue
        # Several tokens may be of one character: those after the first begin before it ended.
        joined = start == last and text[start - 1 : start + 1].isalnum()
        targets.append(_GOES_ON if joined or start < last else 0)
        last = max(end, last)
    return targets


def _tagged(
    tokens: _Tokens, text: str, spans: Sequence[TextSpan], labels: Sequence[str]
) -> list[int]:
    """The target of each token: its tag (0 outside, then begin and inside of each label), its word."""
    targets = _words(tokens, text)
    at = 0
    for span in spans:
        begin = 1 + 2 * labels.index(span.label)
        tag = begin
        for number in range(at, len(targets)):
            start, end = tokens.places[number]
            if start >= span.end:
                break
            at = number + 1
            if end > span.start and start < end:
                targets[number] |= tag
                tag = begin + 1
    return targets


def _encoded(
    tokens: Sequence[_Tokens],
    targets: Sequence[Sequence[int]],
    tokenizer: Any,
    *,
    window: int,
    most: int | None,
) -> Encoded:
    """Texts in windows, each with what the tokenizer puts around a text; at most `most` of them."""
    before, behind = surrounding_ids(tokenizer)
    capacity = window - len(before) - len(behind)
    examples = []
    for found, target in zip(tokens, targets, strict=True):
        windows = []
        for part in windows_of(len(found.ids), capacity)[:most]:
            ids = [*before, *found.ids[part.start : part.end], *behind]
            marks = [_IGNORED] * len(ids)
            for place in range(part.own_start, part.own_end):
                marks[len(before) + place - part.start] = target[place]
            # A sequence needs one position.
            windows.append((ids, marks) if ids else ([padding_id(tokenizer)], [_IGNORED]))
        examples.append(windows)
    return Encoded.of_tokens(examples, padding_id(tokenizer))


# --- entities ---


def _words_tags(shares: Floats, goes_on: NDArray[np.bool_], threshold: float) -> Ints:
    """The tags of tokens [tokens], one decision a word, by probabilities [tokens, tags]."""
    size = len(shares)
    if not size:
        return np.zeros(0, dtype=np.int64)
    starts = np.flatnonzero(~goes_on | (np.arange(size) == 0))
    lengths = np.diff(starts, append=size)
    begins, inside = shares[:, 1::2], shares[:, 2::2]
    kinds = np.add.reduceat(begins + inside, starts) / lengths[:, None]
    best = kinds.argmax(1)
    entity = kinds.sum(1) >= threshold
    rows = np.arange(len(starts))
    either = (begins + inside)[starts][rows, best]
    new = begins[starts][rows, best] >= _SURE * either
    first = np.where(entity, 1 + 2 * best + np.where(new, 0, 1), 0)
    later = np.where(entity, 2 + 2 * best, 0)
    tags = np.repeat(later, lengths)
    tags[starts] = first
    return tags.astype(np.int64)


def _entities(tags: Sequence[int] | Ints) -> list[tuple[int, int, int]]:
    """First token, last token and kind of each entity; one that goes on with nothing begins there."""
    found: list[tuple[int, int, int]] = []
    for place, tag in enumerate(np.asarray(tags).tolist()):
        if not tag:
            continue
        kind, begins = (tag - 1) // 2, tag % 2 == 1
        if not begins and found and found[-1][1] == place - 1 and found[-1][2] == kind:
            found[-1] = (found[-1][0], place, kind)
        else:
            found.append((place, place, kind))
    return found
