"""Looking at a dataset as training would read it, and counting what is in it.

Records are read as training reads them (`silotune.data.records`), so what is counted is what a run would
see. The split is one of the plan's shares, but not the site's own, which no page should tell.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from silotune.data.columns import by_asked
from silotune.data.declared import rule_for, secret_for_a_look
from silotune.data.duplicates import Sketches, Twins, find_twins
from silotune.data.examination import Examination, Histogram, LabelCount, Lengths, Resemblance
from silotune.data.flattery import measure_flattery
from silotune.data.identifiers import Sighting, find_identifiers
from silotune.data.image_files import CONTENT
from silotune.data.names import find_names
from silotune.data.records import Records, Split, Unshown, load_records
from silotune.data.remarks import remarks_on
from silotune.data.roles import read_roles
from silotune.data.site import DatasetConfig, SiteConfig
from silotune.data.targets import bins, has_kinds, kind_of, labels_in, number_of, read_of
from silotune.errors import ColumnMissing, ModelNotFound
from silotune.plan.plan import Plan
from silotune.plan.tasks import SEVERAL, TASKS, of_chats

Advance = Callable[[], None]
Stage = Callable[[str, int], Advance]
"""Told what begins and of how many steps; gives what is called after each."""

_PURPOSE = b"silotune data check"
_MOST_LABELS, _LONGEST_LABEL, _LEAST_OF_A_LABEL = 50, 60, 5
_CHUNK, _MOST_KINDS = 1_000, 200
_BARS = 24


def examine(
    site: SiteConfig,
    name: str,
    *,
    plan: Plan | None,
    names: Path | None = None,
    stage: Stage = lambda title, steps: lambda: None,
) -> Examination:
    """Look at one dataset.

    Parameters
    ----------
    site : SiteConfig
        Whose it is.
    name : str
        Of the dataset; the plan's own, if there is one.
    plan : Plan or None
        What it is read for: labels, split, length, bound. Without one, all labels and the usual shares.
    names : Path or None
        The folder of a spaCy model that looks for names, too.
    stage : callable
        Is told how far this has come.

    Raises
    ------
    DataError
        The site can't serve the plan, or the dataset can't be read.
    """
    dataset = site.dataset(name)
    secret = secret_for_a_look(site, _PURPOSE)
    asked = plan or _usual_plan(site, name, dataset, secret)
    roles = asked.roles
    done = stage("reading", 1)
    unshown = _unshown(site, plan)
    records = load_records(site, asked, roles=roles, secret=secret, augment=False, unshown=unshown)
    done()
    looked = _Look(site, asked, records, stage, given=plan is not None, names=names)
    found = looked.examination(name, dataset)
    if dataset.augmentation is not None:
        done = stage("making versions", 1)
        every = load_records(site, asked, roles=roles, secret=secret, unshown=unshown)
        found = replace(found, versions=len(every) - len(records))
        done()
    return replace(found, remarks=tuple(remarks_on(found)))


def _unshown(site: SiteConfig, plan: Plan | None) -> Unshown | None:
    """Finds chats that the plan's model can't be shown, if its tokenizer is here."""
    if plan is None or (chat := plan.model.chat) is None or (t := _tokenizer(site, plan)) is None:
        return None
    from silotune.models.chat import unshown

    return lambda examples: unshown(examples, t, chat, limit=plan.data.max_length)


def _tokenizer(site: SiteConfig, plan: Plan) -> Any:
    """The plan's; None if it isn't here."""
    from silotune.models.pretrained import load_tokenizer, locate

    try:
        return load_tokenizer(locate(site.model_place(plan)))
    except ModelNotFound:
        return None


def _usual_plan(site: SiteConfig, name: str, dataset: DatasetConfig, secret: bytes) -> Plan:
    """A plan that takes every record: what its roles allow, with every label there is."""
    columns = {str(role): column for role, column in dataset.columns.by_role().items()}
    named = by_asked(columns)
    every = [(task, False, facts) for task, facts in TASKS.items()]
    every += [(task, True, facts) for task, facts in SEVERAL.items()]
    every += [("causal_lm", False, of_chats(TASKS["causal_lm"]))]
    fitting = [found for found in every if found[2].roles <= set(named)]
    if not fitting:
        known = ", or ".join(" and ".join(sorted(facts.roles)) for _, _, facts in every)
        raise ColumnMissing(f"[datasets.{name}.columns] needs {known}")
    # Of several that it would do for, the one that needs most: it says most of the columns.
    task, several, facts = max(fitting, key=lambda found: len(found[2].roles))
    model: dict[str, Any] = {"base": "none", "task": task, "multi_label": several}
    if "messages" in facts.roles:
        model["chat"] = {}
    labels, values = list(dataset.declared_labels), list[str]()
    if not labels and not facts.generates:
        rule = rule_for(dataset, secret)
        read = read_roles(dataset, folder=site.folder, roles=columns, rule=rule)
        values = sorted(set(read.columns[facts.target]) - {""})
    if facts.has_labels:
        model["labels"] = labels or sorted({n for v in values for n in labels_in(v, facts)})
        # A plan has two at least.
        model["labels"] += [f"no label {n}" for n in range(len(model["labels"]), 2)]
    elif facts.target == "value":
        numbers = [n for n in map(number_of, values) if not math.isnan(n)] or [0.0]
        least, most = min(numbers), max(numbers)
        model["target"] = {"lower": least, "upper": most if most > least else least + 1.0}
    held_out = min(0.15, dataset.max_held_out / 2)
    return Plan.from_mapping(
        {
            "plan": {"name": "data-check", "purpose": "a look at the records"},
            "model": model,
            "data": {"dataset": name, "test_share": held_out, "validation_share": held_out},
            "rounds": {"number": 1},
            "privacy": {
                "mode": "none",
                "unit": dataset.unit,
                "max_records_per_unit": dataset.max_records_per_unit,
                "rate": 0.5,
            },
            "aggregation": {"strategy": "fedavg"},
        }
    )


class _Look:
    """Counts one dataset's records."""

    def __init__(
        self,
        site: SiteConfig,
        plan: Plan,
        records: Records,
        stage: Stage,
        *,
        given: bool,
        names: Path | None,
    ) -> None:
        self._site, self._plan, self._records, self._stage = site, plan, records, stage
        self._given, self._names = given, names

    def examination(self, name: str, dataset: DatasetConfig) -> Examination:
        records, plan = self._records, self._plan
        sizes = np.bincount(records.unit_of) if len(records) else np.zeros(0, dtype=np.int64)
        bound = plan.privacy.max_records_per_unit
        shown, other, lacking = self._labels(dataset)
        return Examination(
            site=self._site.name,
            dataset=name,
            unit=plan.privacy.unit,
            plan=plan.plan.name if self._given else None,
            rows=len(records) + records.rows_left_out,
            records=len(records),
            units=records.n_units(),
            declared_units=(dataset.declared_units if plan.privacy.unit == dataset.unit else None),
            by_split={
                part: (records.n_units(split), len(records.rows(split)))
                for part, split in zip(("training", "validation", "test"), Split, strict=True)
            },
            per_unit=dict(sorted(Counter(sizes.tolist()).items())),
            bound=bound,
            over_bound=int(np.count_nonzero(sizes > bound)),
            labels=shown,
            of_spans=self._plan.task.target == "spans",
            other_labels=other,
            lacking=lacking,
            lengths=self._lengths(),
            resemblance=self._resemblance(),
            identifiers=self._identifiers(),
            left_out=tuple(str(part) for part in records.left_out),
        )

    @cached_property
    def _kinds(self) -> list[str]:
        return [kind_of(example, self._plan) for example in self._records.examples]

    @cached_property
    def _given_labels(self) -> list[Collection[str]]:
        """The labels of each record: its own, those of its spans, or the bin of its number."""
        plan = self._plan
        if plan.model.target is not None:
            return [[kind] for kind in self._kinds]
        return [
            labels_in(example[plan.task.target], plan.task) for example in self._records.examples
        ]

    def _labels(
        self, dataset: DatasetConfig
    ) -> tuple[tuple[LabelCount, ...], tuple[int, int], tuple[str, ...]]:
        records, plan = self._records, self._plan
        if plan.task.generates or not plan.task.trains:
            return (), (0, 0), ()
        declared = set(dataset.declared_labels) if plan.task.has_labels else set[str]()
        declared |= set(plan.model.labels) if self._given else set()
        declared |= set(bins(plan.model.target)) if plan.model.target is not None else set()
        holders: dict[str, list[int]] = {}
        for row, labels in enumerate(self._given_labels):
            for label in labels:
                holders.setdefault(label, []).append(row)
        # More than these are hardly labels: perhaps the wrong column was named, one of names.
        few = len({*holders} - declared) <= _MOST_LABELS
        shown: list[LabelCount] = []
        hidden = [0, 0]
        for label, own in sorted(holders.items(), key=lambda found: -len(found[1])):
            count = len(own)
            told = few and len(label) <= _LONGEST_LABEL and count >= _LEAST_OF_A_LABEL
            if label not in declared and not told:
                hidden = [hidden[0] + 1, hidden[1] + count]
                continue
            split = np.bincount(records.split[own], minlength=3).tolist()
            units = len(np.unique(records.unit_of[own]))
            shown.append(LabelCount(label, count, units, (split[0], split[1], split[2])))
        lacking = tuple(sorted(declared - {*holders})) if plan.task.has_labels else ()
        return tuple(shown), (hidden[0], hidden[1]), lacking

    def _texts(self) -> list[str]:
        """What the model is given of each record."""
        roles = (CONTENT,) if self._plan.task.sees else self._plan.task.reads
        return ["\n".join(example[role] for role in roles) for example in self._records.examples]

    def _whole(self) -> list[str]:
        """All that a model reads of each record."""
        return [read_of(example, self._plan) for example in self._records.examples]

    def _lengths(self) -> Lengths | None:
        if not len(self._records) or self._plan.task.sees:
            return None
        measure, counts = "words", self._tokens() if self._given else None
        if counts is None:
            counts = np.array([len(text.split()) for text in self._whole()])
            limit = None
        else:
            measure, limit = "tokens", self._limit()
        over = None if limit is None else np.maximum(counts - limit, 0)
        names = {"shortest": 0, "quarter": 25, "half": 50, "three quarters": 75, "nine tenths": 90}
        names |= {"99 of 100": 99, "longest": 100}
        return Lengths(
            measure=measure,
            quantiles={name: int(np.percentile(counts, at)) for name, at in names.items()},
            limit=limit,
            cut=None if over is None else int(np.count_nonzero(over)),
            lost=None if over is None else float(over.sum() / max(1, counts.sum())),
            histogram=_histogram(counts),
        )

    def _limit(self) -> int:
        """Most tokens of a record that are trained on."""
        from silotune.models.batching import room_in

        data = self._plan.data
        windows = data.max_windows if self._plan.task.each_token else 1
        return room_in(windows, data.max_length)

    def _tokens(self) -> NDArray[np.int64] | None:
        """How many tokens the plan's tokenizer makes of each record; None if it isn't here."""
        from silotune.models.batching import added_ids, bare_ids, prompt_ids
        from silotune.models.chat import whole_sizes

        if (tokenizer := _tokenizer(self._site, self._plan)) is None:
            return None
        advance, found = self._stage("counting tokens", len(self._records)), []
        reads, chat = self._plan.task.reads, self._plan.model.chat
        around = added_ids(tokenizer, texts=len(reads))
        for start in range(0, len(self._records), _CHUNK):
            part = self._records.examples[start : start + _CHUNK]
            if not self._plan.task.generates:
                ids = (bare_ids(tokenizer, [e[role] for e in part]) for role in reads)
                found += [sum(map(len, texts)) + around for texts in zip(*ids, strict=True)]
            elif chat is not None:
                found += whole_sizes(part, tokenizer, chat)
            else:
                prompts = prompt_ids(tokenizer, [e["prompt"] for e in part])
                responses = bare_ids(tokenizer, [e["response"] for e in part])
                found += [len(p) + len(r) + 1 for p, r in zip(prompts, responses, strict=True)]
            for _ in part:
                advance()
        return np.array(found, dtype=np.int64)

    def _resemblance(self) -> Resemblance:
        records, texts = self._records, self._texts()
        held_out = records.split != Split.TRAIN
        advance = self._stage("looking for duplicates", len(texts))
        sketches = Sketches.of(texts, advance=advance)
        twins = find_twins(sketches, held_out)
        found = twins.in_training >= 0
        parts = {"validation": Split.VALIDATION, "test": Split.TEST}
        flattery = None
        if has_kinds(self._plan) and not self._plan.task.sees and found.any():
            done = self._stage("asking two simple models", 1)
            flattery = measure_flattery(
                texts, _frequent(self._kinds), held_out, sketches=sketches, twins=twins
            )
            done()
        return Resemblance(
            copies=int(np.count_nonzero(twins.copies)),
            repeats=int(np.count_nonzero(twins.repeats)),
            contradicting=self._contradicting(sketches, twins),
            held_out={
                part: (
                    len(np.unique(records.unit_of[found & (records.split == split)])),
                    records.n_units(split),
                )
                for part, split in parts.items()
            },
            flattery=flattery,
        )

    def _contradicting(self, sketches: Sketches, twins: Twins) -> int:
        if not has_kinds(self._plan) or not twins.copies.any():
            return 0
        _, first, group = np.unique(sketches.exact, return_index=True, return_inverse=True)
        labels = np.array(self._kinds, dtype=object)
        return int(np.count_nonzero(labels != labels[first[group]]))

    def _identifiers(self) -> tuple[Sighting, ...]:
        if self._plan.task.sees:
            return ()  # what is written in an image is not read
        advance = self._stage("looking for identifiers", len(self._records))
        texts, unit_of = self._whole(), self._records.unit_of
        found = find_identifiers(texts, unit_of, advance=advance)
        if self._names is None:
            return found
        advance = self._stage("looking for names", len(texts))
        return (*find_names(texts, unit_of, model=self._names, advance=advance), *found)


def _frequent(kinds: Sequence[str]) -> list[str]:
    """Kinds of records, the rarer ones as one: of several labels there may be as many as records."""
    often = {kind for kind, _ in Counter(kinds).most_common(_MOST_KINDS)}
    return [kind if kind in often else "" for kind in kinds]


def _histogram(counts: NDArray[Any]) -> Histogram:
    """Bars of whole width up to the 99th percentile; the last has all that is longer."""
    top = max(int(np.percentile(counts, 99)) + 1, 2)
    width = max(1, -(-top // _BARS))
    edges = np.arange(0, top + width, width)
    numbers = np.bincount(np.minimum(counts // width, len(edges) - 2), minlength=len(edges) - 1)
    return Histogram(tuple(edges.astype(float).tolist()), tuple(numbers.tolist()))
