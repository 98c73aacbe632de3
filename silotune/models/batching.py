"""Texts as token ids, in one place: for training, for `predict`, and for the code of an adapter's card.

Examples of like length come into one micro-batch, so that little of it is padding.

What stands in a text is text. A literal ``</s>`` in a note becomes the tokens of its characters, never
the control token of that name; the only control tokens of a sequence are those that are put around
texts here. A record whose prompt a chat template has rendered is therefore text too: its markers are
no markers, and none is doubled.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from silotune.errors import ModelError
from silotune.models.preparation import Preparation

Batch = Mapping[str, Tensor]
Rows = Sequence[int] | NDArray[np.integer[Any]]


@dataclass(frozen=True, eq=False)
class Encoded:
    """Token ids of every example, ragged, and a target each, as its task has it.

    Attributes
    ----------
    ids : int32 array [tokens], or uint8 of images
        The token ids of all sequences, one after the other.
    offsets : int64 array [sequences + 1]
        Sequence ``i`` is ``ids[offsets[i]:offsets[i + 1]]``; mostly it is example ``i``.
    targets : int64 array [n] or [tokens], or float32 array [n, k]
        What is learned of each: an integer (the label's index; of a causal LM the number of prompt
        tokens) or k numbers; where examples may have several sequences, an integer a token.
    pad_id : int
        Token that fills up a batch; its positions are masked, so any id will do.
    first : int64 array [n + 1] or None
        Where examples may have several sequences, those of example ``i`` are ``first[i]`` up to
        ``first[i + 1]``.
    images : Preparation or None
        Of images, whose `ids` are their prepared bytes: what a batch of them goes through.
    types : int8 array [tokens] or None
        The token type of each id, of a pair of texts.
    """

    ids: NDArray[np.integer[Any]]
    offsets: NDArray[np.int64]
    targets: NDArray[np.int64] | NDArray[np.float32]
    pad_id: int
    first: NDArray[np.int64] | None = None
    images: Preparation | None = None
    types: NDArray[np.int8] | None = None

    @classmethod
    def of_tokens(
        cls, examples: Sequence[Sequence[tuple[Sequence[int], Sequence[int]]]], pad_id: int
    ) -> Encoded:
        """From the sequences of each example, each as token ids and a target for each of them."""
        pairs = [pair for sequences in examples for pair in sequences]
        plain = cls.of([ids for ids, _ in pairs], [0] * len(pairs), pad_id)
        flat = (target for _, targets in pairs for target in targets)
        by_token = np.fromiter(flat, dtype=np.int64, count=len(plain.ids))
        first = np.cumsum([0, *map(len, examples)])
        return cls(plain.ids, plain.offsets, by_token, pad_id, first)

    @classmethod
    def of(
        cls,
        sequences: Sequence[Sequence[int]],
        targets: Sequence[int] | NDArray[np.int64] | NDArray[np.float32],
        pad_id: int,
        *,
        types: Sequence[Sequence[int]] | None = None,
    ) -> Encoded:
        """From one list of token ids an example, and its target: integers, or rows of numbers."""
        offsets = np.zeros(len(sequences) + 1, dtype=np.int64)
        np.cumsum([len(s) for s in sequences], out=offsets[1:])
        ids = np.fromiter((t for s in sequences for t in s), dtype=np.int32, count=int(offsets[-1]))
        found = np.asarray(targets)
        found = found.astype(np.int64 if found.ndim == 1 else np.float32)
        kinds = None
        if types is not None:
            kinds = np.fromiter((t for s in types for t in s), dtype=np.int8, count=len(ids))
        return cls(ids, offsets, found, pad_id, types=kinds)

    def __len__(self) -> int:
        return len(self._bounds) - 1

    @cached_property
    def _bounds(self) -> NDArray[np.int64]:
        """The first sequence of each example, and how many there are."""
        return np.arange(len(self.offsets)) if self.first is None else self.first

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each example, shape [n]."""
        return np.diff(self.offsets[self._bounds])

    @cached_property
    def sequences(self) -> NDArray[np.int64]:
        """How many sequences of a batch each example takes, shape [n]."""
        return np.diff(self._bounds)

    def tokens(self, row: int) -> NDArray[np.integer[Any]]:
        """Token ids of one example."""
        return self.ids[self._span(row)]

    def _span(self, row: int) -> slice:
        first, last = self._bounds[row], self._bounds[row + 1]
        return slice(int(self.offsets[first]), int(self.offsets[last]))

    def places(self, rows: Rows) -> NDArray[np.int64]:
        """The sequences of some examples, in their order."""
        if self.first is None:
            return np.asarray(rows, dtype=np.int64)
        own = [np.arange(self.first[row], self.first[row + 1]) for row in rows]
        return np.concatenate([np.zeros(0, dtype=np.int64), *own])

    def beginning(self, row: int, length: int) -> Encoded:
        """One example alone, of which only the first tokens of its first sequence are left."""
        first = self.subset([row])
        ids = first.ids[: min(length, int(first.offsets[1]))].tolist()
        if self.first is None:
            types = None if first.types is None else [first.types[: len(ids)].tolist()]
            return Encoded.of([ids], first.targets, self.pad_id, types=types)
        return Encoded.of_tokens([[(ids, first.targets[: len(ids)].tolist())]], self.pad_id)

    def subset(self, rows: Rows) -> Encoded:
        """The given examples, in the given order."""
        chosen, places = np.asarray(rows, dtype=np.int64), self.places(rows)
        offsets = np.zeros(len(places) + 1, dtype=np.int64)
        np.cumsum(np.diff(self.offsets)[places], out=offsets[1:])

        def taken(by_token: NDArray[Any]) -> NDArray[Any]:
            parts = [by_token[self._span(int(row))] for row in chosen]
            return np.concatenate([by_token[:0], *parts])

        each = self.first is None
        return replace(
            self,
            ids=taken(self.ids),
            offsets=offsets,
            targets=self.targets[chosen] if each else taken(self.targets),
            first=None if each else np.cumsum([0, *self.sequences[chosen]]),
            types=None if self.types is None else taken(self.types),
        )

    @classmethod
    def joined(cls, parts: Sequence[Encoded]) -> Encoded:
        """The examples of several, made alike, one after the other."""

        def end_to_end(bounds: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
            starts = np.cumsum([0, *(part[-1] for part in bounds)])
            moved = [part[:-1] + start for part, start in zip(bounds, starts, strict=False)]
            return np.concatenate([*moved, starts[-1:]])

        first = [part.first for part in parts if part.first is not None]
        types = [part.types for part in parts if part.types is not None]
        return replace(
            parts[0],
            ids=np.concatenate([part.ids for part in parts]),
            offsets=end_to_end([part.offsets for part in parts]),
            targets=np.concatenate([part.targets for part in parts]),
            first=end_to_end(first) if first else None,
            types=np.concatenate(types) if types else None,
        )

    def padded(self, rows: Rows, device: torch.device) -> dict[str, Tensor]:
        """The given examples as a batch, in the given order: `whole` of their `subset`."""
        return self.subset(rows).whole(device)

    def whole(self, device: torch.device) -> dict[str, Tensor]:
        """All examples as one batch padded on the right, as long as its longest sequence.

        Returns
        -------
        dict
            ``input_ids`` and ``attention_mask``, int64 of shape [sequences, longest], of pairs also
            ``token_type_ids``; of images ``pixel_values``, float32 [n, channels, height, width].
        """
        if self.images is not None:
            return {"pixel_values": self.images.batch(self.ids.reshape(len(self), -1), device)}
        arrays = {
            "input_ids": self._in_batch(self.ids, fill=self.pad_id),
            "attention_mask": self.real.astype(np.int64),
        }
        if self.types is not None:
            arrays["token_type_ids"] = self._in_batch(self.types, fill=0)
        return {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}

    def targets_in_batch(self, *, fill: int) -> NDArray[np.int64]:
        """The targets of tokens, one each, as `whole` has the tokens; `fill` where there is none."""
        return self._in_batch(self.targets, fill=fill)

    def _in_batch(self, by_token: NDArray[Any], *, fill: int) -> NDArray[np.int64]:
        real = self.real
        found = np.full(real.shape, fill, dtype=np.int64)
        found[real] = by_token
        return found

    @cached_property
    def real(self) -> NDArray[np.bool_]:
        """Where `whole` has tokens, shape [sequences, longest]."""
        lengths = np.diff(self.offsets)
        return np.arange(int(lengths.max(initial=0)))[None, :] < lengths[:, None]


def record_of(batch: Batch, records: int) -> Tensor:
    """The record that each sequence of a task's batch is of, int64 [sequences]; mostly one each."""
    if (found := batch.get("row_of")) is not None:
        return found
    return torch.arange(records, device=next(iter(batch.values())).device)


def batches(
    encoded: Encoded, rows: Rows, *, size: int, units: NDArray[np.integer[Any]] | None = None
) -> list[list[int]]:
    """Split rows into micro-batches, shortest examples first.

    Parameters
    ----------
    encoded : Encoded
        Where the lengths come from.
    rows : sequence of int
        Rows of `encoded`; each ends up in exactly one batch.
    size : int
        Most sequences a batch may have, at least 1: an example is one, or as many as it has windows.
    units : int array [len(rows)], optional
        Privacy unit of each of `rows`. The rows of a unit then stay in one batch, because a unit's
        gradient is clipped as a whole. A unit of more than `size` is a batch of its own.

    Returns
    -------
    list of lists of int
        The same input gives the same batches; ties keep the order of `rows`. Without units the
        batches are of equal size to within one row.
    """
    chosen = np.asarray(rows, dtype=np.int64)
    if not len(chosen):
        return []
    lengths, sequences = encoded.lengths[chosen], encoded.sequences[chosen]
    if units is None and encoded.first is not None:
        units = np.arange(len(chosen))
    if units is None:
        ordered = chosen[np.argsort(lengths, kind="stable")]
        parts = np.array_split(ordered, -(-len(ordered) // size))
        return [part.tolist() for part in parts]
    return _whole_units(chosen, lengths, np.asarray(units), sequences, size)


def _whole_units(
    rows: NDArray[np.int64],
    lengths: NDArray[np.int64],
    units: NDArray[np.integer[Any]],
    sequences: NDArray[np.int64],
    size: int,
) -> list[list[int]]:
    _, first, unit = np.unique(units, return_index=True, return_inverse=True)
    longest = np.zeros(len(first), dtype=np.int64)
    np.maximum.at(longest, unit, lengths)
    # Units by their longest example, ties by first appearance; rows of a unit side by side.
    order = np.lexsort((np.arange(len(rows)), first[unit], longest[unit]))
    ends = np.flatnonzero(np.diff(unit[order], append=-1)) + 1
    before = np.concatenate([[0], np.cumsum(sequences[order])])
    result: list[list[int]] = []
    start = taken = 0
    for end in ends.tolist():
        if before[end] - before[start] > size and taken > start:
            result.append(rows[order[start:taken]].tolist())
            start = taken
        taken = end
    result.append(rows[order[start:]].tolist())
    return result


PROMPT_END = "\n"  # between prompt and response, part of the prompt
_PROBE = "a"


def text_ids(tokenizer: Any, texts: Sequence[str], *, limit: int) -> list[list[int]]:
    """Ids of whole texts, with what the tokenizer puts around each, at most `limit` of them."""
    if not texts:
        return []
    found: list[list[int]] = tokenizer(
        list(texts), truncation=True, max_length=limit, split_special_tokens=True
    )["input_ids"]
    # A tokenizer without special tokens may find nothing in a text; a row needs one position.
    return [row or [padding_id(tokenizer)] for row in found]


def pair_ids(
    tokenizer: Any, pairs: Sequence[tuple[str, str]], *, limit: int
) -> tuple[list[list[int]], list[list[int]] | None]:
    """Ids of two texts each, as the tokenizer puts them together, at most `limit` of them.

    The longer text is cut first, token by token, until both together fit.

    Returns
    -------
    ids : list of lists of int
        A tokenizer that puts nothing between two texts gets `PROMPT_END` behind the first.
    types : list of lists of int, or None
        The token type of each id, where the tokenizer has them.
    """
    if not pairs:
        return [], None
    firsts, seconds = ([pair[place] for pair in pairs] for place in (0, 1))
    end = pair_end(tokenizer)
    firsts = [first + end for first in firsts]
    made = tokenizer(
        firsts, seconds, truncation="longest_first", max_length=limit, split_special_tokens=True
    )
    ids: list[list[int]] = [row or [padding_id(tokenizer)] for row in made["input_ids"]]
    types: list[list[int]] | None = made.get("token_type_ids")
    return ids, None if types is None else [row or [0] for row in types]


def pair_end(tokenizer: Any) -> str:
    """What is put behind the first of two texts: nothing, where the tokenizer puts something."""
    between = added_ids(tokenizer, texts=2) > added_ids(tokenizer, texts=1)
    return "" if between else PROMPT_END


def added_ids(tokenizer: Any, *, texts: int) -> int:
    """How many ids the tokenizer puts around, and between, so many texts: one or two."""
    whole = tokenizer(*([_PROBE] for _ in range(texts)))["input_ids"][0]
    return len(whole) - texts * len(bare_ids(tokenizer, [_PROBE])[0])


def prompt_ids(tokenizer: Any, prompts: Sequence[str]) -> list[list[int]]:
    """Ids of prompts: what the tokenizer puts before a text, the prompt, and `PROMPT_END`."""
    lead = leading_ids(tokenizer)
    found = bare_ids(tokenizer, [prompt + PROMPT_END for prompt in prompts])
    return [lead + row or [end_id(tokenizer)] for row in found]


def bare_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Ids of texts with nothing around them; the tokenizer's warning about long ones is not wanted."""
    if not texts:
        return []
    found: list[list[int]] = tokenizer(
        list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False
    )["input_ids"]
    return found


def keep_end(prompt: list[int], room: int, *, lead: int) -> list[int]:
    """At most `room` ids of a prompt: the `lead` first ones, as far as they fit, and the last ones."""
    if len(prompt) <= room:
        return prompt
    start = min(lead, room)
    return prompt[:start] + prompt[len(prompt) - (room - start) :]


def leading_ids(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before every text, a begin-of-sequence token mostly; perhaps nothing.

    What it puts behind a text is left out: a response has an end of its own, and a prompt none.
    """
    return surrounding_ids(tokenizer)[0]


def surrounding_ids(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and behind every text."""
    (whole,) = tokenizer([_PROBE])["input_ids"]
    (bare,) = bare_ids(tokenizer, [_PROBE])
    places = range(len(whole) - len(bare) + 1)
    start = next((i for i in places if whole[i : i + len(bare)] == bare), 0)
    ids = [int(token) for token in whole]
    return ids[:start], ids[start + len(bare) :]


class TextWindow(NamedTuple):
    """A part of a text's tokens that is read at once, and what of it nothing else answers."""

    start: int
    end: int
    own_start: int
    own_end: int


def windows_of(length: int, capacity: int) -> list[TextWindow]:
    """Windows of `capacity` tokens over `length` of them, at least one, by a fixed rule.

    Each begins three quarters of a window behind the one before; the last ends where the text does. Of
    what two have in common each owns the half on its side.
    """
    starts = [0]
    while starts[-1] + capacity < length:
        starts.append(min(starts[-1] + _stride(capacity), length - capacity))
    ends = [min(start + capacity, length) for start in starts]
    middles = [(start + end) // 2 for start, end in zip(starts[1:], ends[:-1], strict=True)]
    return [*map(TextWindow, starts, ends, [0, *middles], [*middles, length])]


def room_in(number: int, capacity: int) -> int:
    """Most tokens that `windows_of` puts into so many windows."""
    return capacity + (number - 1) * _stride(capacity)


def _stride(capacity: int) -> int:
    return capacity - capacity // 4


def padding_id(tokenizer: Any) -> int:
    """Token to fill a batch with. Padding is masked, so without one any token serves."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def end_id(tokenizer: Any) -> int:
    """Token that ends a response. Raises `ModelError` where there is none."""
    if tokenizer.eos_token_id is None:
        raise ModelError(
            "the tokenizer has no end-of-sequence token, so the model can't learn where to stop",
            remedy="Set eos_token in the base model's tokenizer_config.json.",
        )
    return int(tokenizer.eos_token_id)


def end_ids(tokenizer: Any, model: Any) -> list[int]:
    """Where a response is over: at its own end, or at any that the base model was taught before."""
    stated = model.generation_config.eos_token_id
    more: Iterable[int] = stated if isinstance(stated, list) else [stated]
    found = [end_id(tokenizer), *(int(token) for token in more if token is not None)]
    return list(dict.fromkeys(found))
