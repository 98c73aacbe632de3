"""What sites have for a plan, told to whoever looks at them from the same machine.

At a real site that is its own team; in a simulation, whoever simulates. Nothing of it is ever sent.

Told are held-out texts that have a look-alike among the training texts. A split by record or by unit
puts near-copies of a text (a template, left for right, a copied note) on both sides: the model is
then tested on what it was trained on, and scores flatter. `silotune.data.duplicates` says what a
look-alike is; here both have one label. At most so many texts are compared, in the order of the
records, that it takes a few seconds; `silotune data check` compares them all.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from silotune.data.duplicates import Sketches, find_twins
from silotune.data.image_files import CONTENT
from silotune.data.records import Records, Split, load_records
from silotune.data.site import SiteConfig
from silotune.data.targets import kind_of
from silotune.errors import SilotuneError
from silotune.percents import percent
from silotune.plan.plan import Plan

_MOST_HELD_OUT, _MOST_TRAINED = 2_000, 20_000
_WORTH_TELLING = 0.05
_MOST_NAMED = 8  # sites in a sentence


@dataclass(frozen=True)
class LookAlikes:
    """What was found at one site: private.

    Attributes
    ----------
    compared : int
        Held-out texts that were looked at.
    found : int
        How many of them have a look-alike among the training texts.
    """

    compared: int
    found: int

    @property
    def share(self) -> float:
        """Found of compared."""
        return self.found / self.compared if self.compared else 0.0

    @property
    def worth_telling(self) -> bool:
        """Whether scores are flattered by more than a little."""
        return self.share >= _WORTH_TELLING

    def __str__(self) -> str:
        return f"{percent(self.share)} ({self.found:,} of {self.compared:,})"


def find_look_alikes(records: Records, plan: Plan) -> LookAlikes:
    """Compare the held-out texts of some records with the training texts of the same label."""
    held_out = records.split != Split.TRAIN
    tested = np.flatnonzero(held_out)[:_MOST_HELD_OUT]
    if not len(tested):
        return LookAlikes(0, 0)
    rows = np.concatenate([tested, np.flatnonzero(~held_out)[:_MOST_TRAINED]])
    examples = [records.examples[row] for row in rows.tolist()]
    reads = (CONTENT,) if plan.task.sees else plan.task.reads
    texts = ["\n".join(example[role] for role in reads) for example in examples]
    labels = [kind_of(example, plan) for example in examples]
    twins = find_twins(Sketches.of(texts, labels=labels), held_out[rows])
    return LookAlikes(len(tested), int(np.count_nonzero(twins.in_training >= 0)))


@dataclass(frozen=True)
class Surveyed:
    """One site's records, seen with a plan.

    Attributes
    ----------
    site : str
        Its name.
    records : Records or None
        What it would train and test on; None if it refuses the plan or can't read its dataset.
    look_alikes : LookAlikes or None
        Across its split; None of a vote.
    problem : SilotuneError or None
        Why there are no records.
    """

    site: str
    records: Records | None
    look_alikes: LookAlikes | None = None
    problem: SilotuneError | None = None

    @property
    def trains(self) -> bool:
        """Whether there is anything to train on."""
        return self.records is not None and self.records.n_units(Split.TRAIN) > 0

    @property
    def notes(self) -> list[str]:
        """What somebody at the site should know before the run, in sentences; look-alikes apart."""
        if self.problem is not None:
            return [f"{self.site} can't take part: {self.problem.code} {self.problem.detail}"]
        assert self.records is not None
        notes = [f"{self.site} leaves out {part.told}" for part in self.records.left_out]
        if not self.trains:
            notes.append(f"{self.site} has no record to train on: it would add noise alone")
        return notes


def notes_on_sites(found: Sequence[Surveyed], *, split_by: str) -> list[str]:
    """What should be known of sites' records before a run, in sentences; look-alikes in one for all."""
    notes = [note for one in found for note in one.notes]
    alike = {
        one.site: one.look_alikes
        for one in found
        if one.trains and one.look_alikes is not None and one.look_alikes.worth_telling
    }
    if not alike:
        return notes
    where = ", ".join(f"{seen} at {site}" for site, seen in alike.items())
    if len(alike) > _MOST_NAMED:
        shares = [seen.share for seen in alike.values()]
        where = f"{percent(min(shares))} to {percent(max(shares))} at {len(alike)} sites"
    hint = '; data.split_by = "group" keeps a group on one side' * (split_by == "unit")
    return [
        *notes,
        "scores will flatter: of the held-out texts that were looked at "
        f"{where} are a training text again, or nearly{hint}",
    ]


def survey(
    sites: Sequence[SiteConfig], plan: Plan, *, roles: Collection[str], secrets: Mapping[str, bytes]
) -> tuple[Surveyed, ...]:
    """Read what each site has for a plan.

    Parameters
    ----------
    sites, plan
        Who is asked, and for what.
    roles : collection of str
        What the plan's task reads.
    secrets : mapping of site to bytes
        Each site's own, which decides its split.
    """
    return tuple(_look(site, plan, roles=roles, secret=secrets[site.name]) for site in sites)


def _look(site: SiteConfig, plan: Plan, *, roles: Collection[str], secret: bytes) -> Surveyed:
    try:
        records = load_records(site, plan, roles=roles, secret=secret)
    except SilotuneError as exc:
        return Surveyed(site.name, None, problem=exc)
    # A vote measures nothing on held-out records.
    found = None if plan.vote is not None else find_look_alikes(records, plan)
    return Surveyed(site.name, records, found)
