"""From a site's dataset to checked records in memory, by what the site declares, and their split.

What a plan may ask of a dataset (columns, unit, labels, held-out shares) is declared in site.toml, and
`require_declared` judges it from the declaration alone. What then is wrong with a record is no error:
the record is left out, counted in `Records.left_out`, and told at the site. So whether and how a site
answers says nothing about its records. Left out are rows that can't be read; an empty text, label,
unit or group; a label that site.toml or the plan lacks; with ``data.split_by = "group"``, records of
a unit in another group than its first; and what a unit has beyond the site's ``max_records_per_unit``.

The held-out split is a fixed, secret function of one unit's (or group's) name. Each key is hashed with
HMAC-SHA256 under a salt of the site to a point of [0, 1) and falls into test, validation or training by
the plan's shares. The point depends on salt and key alone: not on the plan, the run, the order of the
rows, or on what other records there are. That has three consequences that any cleverer split would lose:

- a unit is on the same side in every run of its site, also after records were added;
- adding or removing one unit never moves another one, so a training set and its neighbour (in the
  sense of differential privacy) differ in that unit alone;
- a larger `test_share` keeps every unit of the smaller one in the test split.

Without the salt everybody could compute a person's side from the name alone, and a plan's shares
would be a question about it. There are two prices. A person with records at two sites may be on one
side here and on the other there, so held-out scores of such people are too good. And shares hold
only on average: with few keys of unequal size (a site with a dozen large groups) the test split can
be noticeably larger or smaller than asked.

The salt comes from a secret of the site's own, which also names the content of records. It is made once,
sealed in the state folder, and never changes: with another one, units that a model was trained on would
become test units.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import cached_property
from hashlib import sha256
from itertools import islice, zip_longest

import numpy as np
from numpy.typing import NDArray

from silotune.data.augmentation import Augmentation
from silotune.data.columns import LABELLED, by_asked
from silotune.data.declared import (
    columns_for,
    identity_role,
    numbers_for,
    require_declared,
    rule_for,
)
from silotune.data.image_files import CONTENT, look_at_images
from silotune.data.roles import Sieve, read_roles
from silotune.data.site import DatasetConfig, SiteConfig
from silotune.data.table import LeftOut, numbered
from silotune.data.targets import number_of
from silotune.plan.plan import Plan
from silotune.plan.sections import TargetSection
from silotune.plan.voted import blocks_at

# Separates these hashes from any other use of the same secret. Changing it would move units that a
# model was trained on into the test split, so it never changes.
_DOMAIN = b"silotune split 2\0"
_TURNS = b"silotune turns\0"
_VOTE_DOMAIN = b"silotune vote 1\0"
SCORED = 0.4
"""Share of a vote's units, or of their groups, that candidates are scored on."""
Unshown = Callable[[Sequence[Mapping[str, str]]], Collection[int]]
"""Of examples, the places of those that the model's chat template can't show."""

_VARIED = ("text", "text_b", "prompt")  # texts that augmentation makes versions of


class Split(IntEnum):
    """The three parts of a dataset."""

    TRAIN = 0
    VALIDATION = 1
    TEST = 2


def salt_for(*, seed: int | None, site: str, secret: bytes) -> bytes:
    """The salt of a site's split.

    Parameters
    ----------
    seed : int or None
        Of the plan. A seeded run is repeatable anywhere and not private: its salt follows the seed.
    site : str
        The site's name.
    secret : bytes
        The site's own, which never changes (`silotune.data.records`).
    """
    key = secret if seed is None else f"seed {seed}".encode()
    return hmac.digest(key, _DOMAIN + site.encode(), hashlib.sha256)


def fractions(keys: Sequence[str], *, salt: bytes) -> NDArray[np.float64]:
    """The point of [0, 1) of each key.

    Parameters
    ----------
    keys : sequence of str, length n
        Names of units or groups.
    salt : bytes
        From `salt_for`.

    Returns
    -------
    float64 array of shape [n]
        The first 64 bits of HMAC-SHA256 under the salt over the key's UTF-8 bytes, read as a
        big-endian integer and divided by 2^64 (to the precision of a float, rounded down).
    """
    digests = b"".join(hmac.digest(salt, key.encode(), hashlib.sha256)[:8] for key in keys)
    # Only 53 bits fit a float: dropping the others rounds down, and so never gives 1.0.
    return (np.frombuffer(digests, dtype=">u8") >> np.uint64(11)) / float(2**53)


def assign(
    keys: Sequence[str], *, test_share: float, validation_share: float, salt: bytes
) -> NDArray[np.uint8]:
    """The split of each key, as values of `Split`.

    Parameters
    ----------
    keys : sequence of str, length n
        Names of units or groups.
    test_share, validation_share : float
        Expected shares of keys; what is left is for training.
    salt : bytes
        From `salt_for`.

    Returns
    -------
    uint8 array of shape [n]
    """
    points = fractions(keys, salt=salt)
    split = np.full(len(keys), Split.TRAIN, dtype=np.uint8)
    split[points < test_share + validation_share] = Split.VALIDATION
    split[points < test_share] = Split.TEST
    return split


Rows = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Ballots:
    """Where each record stands in a vote (`silotune.plan.voted`): what its unit's name alone decides.

    Attributes
    ----------
    block : int64 array of shape [n]
        The block that a record's unit is in; -1 of records that are held out.
    scored : bool array of shape [n]
        Whether candidates are scored on it there, and not trained.
    """

    block: NDArray[np.int64]
    scored: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Records:
    """The records that a plan's task sees.

    Attributes
    ----------
    examples : sequence of mapping, length n
        Strings by role, as the task names them; a list is JSON (`silotune.data.structured`).
    unit_of : int64 array of shape [n]
        The privacy unit of each record: every one of 0 .. `n_units()` - 1 occurs.
    split : uint8 array of shape [n]
        The part each record belongs to, as values of `Split`. All records of a unit are in one.
    left_out : tuple of LeftOut
        What of the source is not among them, and why: private.
    turns : int64 array of shape [n_units()] or None
        In which of ``privacy.bands`` rounds in a row each unit may be drawn, from 0; None where that is
        every round.
    content : str
        SHA-256, in hex, of what was read of the records: the key of anything that is made of them.
        Whoever knows all records but one could test that one on it: it never leaves the process;
        `fingerprint` may be written down.
    ballots : Ballots or None
        Of a plan with a vote.
    """

    examples: Sequence[Mapping[str, str]]
    unit_of: NDArray[np.int64]
    split: NDArray[np.uint8]
    left_out: tuple[LeftOut, ...] = ()
    content: str = ""
    turns: NDArray[np.int64] | None = None
    ballots: Ballots | None = None

    def __post_init__(self) -> None:
        if not len(self.examples) == len(self.unit_of) == len(self.split):
            raise ValueError("examples, unit_of and split must have one length")
        if self.unit_of.size and not np.bincount(self.unit_of).all():
            raise ValueError("units must be numbered without gaps")
        if (self._unit_split[self.unit_of] != self.split).any():
            raise ValueError("a unit is on both sides of the split")
        if self.turns is not None and len(self.turns) != len(self._unit_split):
            raise ValueError("every unit has a turn, or none has")
        self.unit_of.setflags(write=False)
        self.split.setflags(write=False)

    def __len__(self) -> int:
        """Number of records."""
        return len(self.examples)

    def fingerprint(self, secret: bytes) -> str:
        """A name of exactly this content that only who has the site's secret can compute, in hex."""
        return hmac.digest(secret, b"silotune records\0" + self.content.encode(), sha256).hex()

    @property
    def rows_left_out(self) -> int:
        """How many rows of the source were left out."""
        return sum(len(part.rows) for part in self.left_out)

    def n_units(self, split: Split | None = None) -> int:
        """Number of units, of one split or of all. A private number: it must not leave the site."""
        if split is None:
            return len(self._unit_split)
        return int(np.count_nonzero(self._unit_split == split))

    def units(self, split: Split) -> Rows:
        """The units of a split, ascending."""
        return np.flatnonzero(self._unit_split == split)

    def rows(self, split: Split) -> Rows:
        """The rows of a split, ascending."""
        return np.flatnonzero(self.split == split)

    @cached_property
    def _unit_split(self) -> NDArray[np.uint8]:
        n_units = int(self.unit_of.max()) + 1 if len(self.unit_of) else 0
        split = np.zeros(n_units, dtype=np.uint8)
        split[self.unit_of] = self.split
        return split


def load_records(
    site: SiteConfig,
    plan: Plan,
    *,
    roles: Collection[str],
    secret: bytes,
    augment: bool = True,
    unshown: Unshown | None = None,
) -> Records:
    """Read and split the dataset that a plan asks a site for, without what doesn't fit.

    A unit with more records than ``privacy.max_records_per_unit`` of the plan keeps them all here;
    each training step draws that many of them anew.

    What a plan trains on is augmented as the site says: versions of training texts stand behind all
    records, each in the unit of its text.

    Parameters
    ----------
    site, plan : SiteConfig, Plan
        Who offers the dataset on which terms, and what is asked of it.
    roles : collection of str
        What the plan's task reads: ``text`` and ``label``, or ``prompt`` and ``response``.
    secret : bytes
        The site's own, from which the split's salt is derived.
    augment : bool
        False for the records of the source alone.
    unshown : callable, optional
        Finds chats that the model can't be shown: they are left out, too.

    Returns
    -------
    Records
        Rows in the order of the source, perhaps none; units numbered by first appearance.

    Raises
    ------
    DatasetUnknown, UnitMismatch, ColumnMissing, LabelsUnfit, HeldOutTooMuch, TooFewRecords
        By the site's declaration, as `require_declared`.
    DatasetUnreadable, ColumnMissing
        There is no such file or column.
    """
    salt = salt_for(seed=plan.plan.seed, site=site.name, secret=secret)
    require_declared(site, plan, roles=roles)
    dataset = site.dataset(plan.data.dataset)
    columns, numbers = columns_for(dataset, plan, roles), numbers_for(dataset, plan)
    labelled = not LABELLED.isdisjoint(by_asked(columns))
    labels = _labels(dataset, plan) if labelled else frozenset()
    rule = rule_for(dataset, secret)
    named = {**columns, **numbers}
    sieve = Sieve(read_roles(dataset, folder=site.folder, roles=named, labels=labels, rule=rule))
    _drop_unfit(sieve, by_asked(columns), labels)
    if "image" in columns:
        look_at_images(sieve, folder=site.images_of(dataset), column=columns["image"])
    if plan.model.target is not None:
        _drop_beyond(sieve, columns["value"], plan.model.target)
    if "messages" in columns:
        _drop_unanswered(sieve, columns["messages"])
    if unshown is not None:
        _drop_unshown(sieve, sorted(roles), unshown)
    if "split" in columns:
        _drop_torn(sieve, "split", "on another side of the split")
    if plan.data.split_by == "group":
        _drop_torn(sieve, "group", "in another group")
    _drop_surplus(sieve, dataset.max_records_per_unit)
    left = sieve.table()
    values = left.columns
    picked = sorted({*roles, *numbers, *({CONTENT} & set(values))})
    unit_of = _units(values, len(left.rows), plan)
    found = Records(
        examples=[
            dict(zip(picked, row, strict=True))
            for row in zip(*(values[role] for role in picked), strict=True)
        ]
        or [{} for _ in left.rows],  # of a plan that asks for counts alone
        unit_of=unit_of,
        split=_split(values, plan, salt),
        left_out=tuple(left.faults.found),
        content=_content(values),
        turns=_turns(values, unit_of, plan, salt),
    )
    if plan.vote is not None:
        blocks = blocks_at(plan, dataset.declared_units)
        return replace(found, ballots=_ballots(found, values, plan, salt=salt, blocks=blocks))
    if dataset.augmentation is None or plan.statistics is not None or not augment:
        return found
    return augmented(found, Augmentation.of(dataset.augmentation, folder=site.folder, secret=salt))


def augmented(records: Records, augmentation: Augmentation) -> Records:
    """Records with versions of the training texts behind them, each in the unit of its text.

    Of a pair both texts have versions, and the first of one goes with the first of the other.
    """
    roles = [role for role in _VARIED if records.examples and role in records.examples[0]]
    made = [
        (row, {role: text for role, text in zip(roles, texts, strict=True) if text is not None})
        for row in records.rows(Split.TRAIN).tolist()
        for texts in zip_longest(
            *(augmentation.versions(records.examples[row][role]) for role in roles)
        )
    ]
    own = np.array([row for row, _ in made], dtype=np.int64)
    told = f"{records.content} {augmentation.name}"
    return replace(
        records,
        examples=[*records.examples, *({**records.examples[r], **texts} for r, texts in made)],
        unit_of=np.concatenate([records.unit_of, records.unit_of[own]]),
        split=np.concatenate([records.split, records.split[own]]),
        content=sha256(told.encode()).hexdigest(),
    )


def _labels(dataset: DatasetConfig, plan: Plan) -> frozenset[str]:
    """The labels that a record may have; empty if the task has none."""
    return frozenset(dataset.declared_labels or plan.model.labels) & frozenset(plan.model.labels)


def _drop_unfit(sieve: Sieve, columns: Mapping[str, str], labels: Collection[str]) -> None:
    """Rows with something empty, then those with a label that is not among `labels`."""
    for role, column in columns.items():
        found = sieve.column(role)
        if "" in found:
            sieve.drop([row for row in sieve.rows() if not found[row]], f"empty {role}", column)
    if labels and "label" in columns:
        found = sieve.column("label")
        unknown = [row for row in sieve.rows() if found[row] not in labels]
        told = [found[row] for row in unknown]
        sieve.drop(unknown, "label is not one of model.labels", columns["label"], told)


def _drop_beyond(sieve: Sieve, column: str, target: TargetSection) -> None:
    """Rows whose value is no number, then those with one outside of the plan's range."""
    numbers = {row: number_of(sieve.column("value")[row]) for row in sieve.rows()}
    none = [row for row, number in numbers.items() if math.isnan(number)]
    sieve.drop(none, "value is not a number", column)
    beyond = [row for row, n in numbers.items() if not target.lower <= n <= target.upper]
    sieve.drop([*{*beyond} - {*none}], "value is not within model.target", column)


def _drop_unanswered(sieve: Sieve, column: str) -> None:
    """Chats from which nothing would be learned."""
    chats = sieve.column("messages")
    silent = [
        row
        for row in sieve.rows()
        if all(turn["role"] != "assistant" for turn in json.loads(chats[row]))
    ]
    sieve.drop(silent, "a chat without a turn of an assistant", column)


def _drop_unshown(sieve: Sieve, roles: Sequence[str], unshown: Unshown) -> None:
    rows, values = sieve.rows(), [sieve.column(role) for role in roles]
    shown = [dict(zip(roles, (of[row] for of in values), strict=True)) for row in rows]
    dropped = [rows[place] for place in unshown(shown)]
    sieve.drop(dropped, "a chat that the model's chat template can't show")


def _drop_torn(sieve: Sieve, role: str, elsewhere: str) -> None:
    """Records of a unit with another value of a role than its first, so that both stay whole."""
    if "unit" not in sieve:
        return
    first: dict[str, str] = {}
    units, places = sieve.column("unit"), sieve.column(role)
    torn = [row for row in sieve.rows() if first.setdefault(units[row], places[row]) != places[row]]
    sieve.drop(torn, f"the unit has an earlier record {elsewhere}")


def _drop_surplus(sieve: Sieve, most: int) -> None:
    """What a unit has beyond its first `most` records."""
    if "unit" not in sieve:
        return
    seen: dict[str, int] = {}
    units, surplus = sieve.column("unit"), []
    for row in sieve.rows():
        unit = units[row]
        seen[unit] = number = seen.get(unit, 0) + 1
        if number > most:
            surplus.append(row)
    sieve.drop(surplus, f"the unit has {most} earlier records, its max_records_per_unit")


Values = Mapping[str, Sequence[str]]


def _units(values: Values, size: int, plan: Plan) -> NDArray[np.int64]:
    """Dense numbers of units by first appearance."""
    if "unit" not in values or (plan.privacy.unit == "record" and not plan.private):
        return np.arange(size)
    return numbered(values["unit"])[0]


def _turns(
    values: Values, unit_of: NDArray[np.int64], plan: Plan, salt: bytes
) -> NDArray[np.int64] | None:
    """The turn of each unit: like its side of the split, a secret function of its name alone.

    So it is the same after a restart, and whatever other records there are. That a unit has one turn is
    what correlated noise rests on; that it is secret is not.
    """
    bands = plan.privacy.bands
    if bands == 1:
        return None
    names = _unit_names(values)
    first = np.unique(unit_of, return_index=True)[1]
    key = hmac.digest(salt, _TURNS + plan.sha256.encode(), sha256)
    points = fractions([names[row] for row in first.tolist()], salt=key)
    return np.minimum(np.floor(points * bands).astype(np.int64), bands - 1)


def _split(values: Values, plan: Plan, salt: bytes) -> NDArray[np.uint8]:
    """The side of each row: the given one, or what its key says."""
    if "split" in values:
        return np.array([Split[side.upper()] for side in values["split"]], dtype=np.uint8)
    number_of, keys = numbered(_split_keys(values, plan))
    shares = {"test_share": plan.data.test_share, "validation_share": plan.data.validation_share}
    return assign(keys, **shares, salt=salt)[number_of]


def _split_keys(values: Values, plan: Plan) -> Sequence[str]:
    """What the split hashes for each row."""
    if plan.data.split_by == "group":
        return values["group"]
    if plan.statistics is not None:  # nothing is held out, and there may be no text
        return next(iter(values.values()))
    return _unit_names(values)


def _ballots(found: Records, values: Values, plan: Plan, *, salt: bytes, blocks: int) -> Ballots:
    """Blocks by the names of units, and the side in a block by what the plan's own split keeps whole."""
    block, scored = (
        fractions(keys, salt=hmac.digest(salt, _VOTE_DOMAIN + purpose, sha256))
        for keys, purpose in ((_unit_names(values), b"block"), (_split_keys(values, plan), b"side"))
    )
    held_out = found.split != Split.TRAIN
    return Ballots(
        block=np.where(held_out, -1, (block * blocks).astype(np.int64)), scored=scored < SCORED
    )


_HASHED_AT_ONCE = 1_000


def _content(values: Values) -> str:
    """SHA-256 over every value that is used, told apart by role and length."""
    digest = hashlib.sha256()
    for role in sorted(values):
        digest.update(f"{role} {len(values[role])}\n".encode())
        encoded = map(str.encode, values[role])
        while some := list(islice(encoded, _HASHED_AT_ONCE)):
            digest.update(b"".join([b"%d:%b" % (len(value), value) for value in some]))
    return digest.hexdigest()


def _unit_names(values: Values) -> Sequence[str]:
    """The name of each row's unit. A record without one is known by what it says: equals are one."""
    return values["unit"] if "unit" in values else _identities(values)


def _identities(values: Values) -> Sequence[str]:
    """What tells records apart. A prompt alone would not: often it is the same for all of them."""
    for one, other in (("text", "text_b"), ("prompt", "response")):
        if one in values and other in values:
            return [json.dumps(pair) for pair in zip(values[one], values[other], strict=True)]
    role = identity_role(values)
    return values[CONTENT if role == "image" else role]
