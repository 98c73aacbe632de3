"""What was found in a dataset before anybody trains on it: for the site's own people, and nobody else.

Only counts, shares and declared labels are in it; no text, no name of a unit, no label that nobody
declared and few records have. Counts are exact, and small ones can point at a person: nothing of this
leaves the site.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from silotune.data.flattery import Flattery
from silotune.data.identifiers import Sighting

Level = Literal["wrong", "warning", "note"]


@dataclass(frozen=True)
class Remark:
    """Something that the site's people should know.

    Attributes
    ----------
    level : Level
        "wrong" where training would be wrong or in vain, "warning" where scores or people suffer.
    about : str
        A word for machines.
    sentence : str
        What is so, in numbers.
    remedy : str
        What can be done.
    """

    level: Level
    about: str
    sentence: str
    remedy: str = ""


@dataclass(frozen=True)
class LabelCount:
    """Records and units of one label; a record's split is in the order of `Split`."""

    label: str
    records: int
    units: int
    by_split: tuple[int, int, int]


@dataclass(frozen=True)
class Histogram:
    """Counts between edges, one more edge than counts."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Lengths:
    """How long texts are.

    Attributes
    ----------
    measure : str
        "tokens" of the plan's tokenizer, or "words".
    quantiles : mapping of str to int
        Shortest, quartiles, 90th and 99th percentile, longest.
    limit : int or None
        ``data.max_length`` of the plan.
    cut : int or None
        Records that are longer.
    lost : float or None
        Which share of all tokens is cut off.
    histogram : Histogram
        How many records are how long; the last bar has the longest hundredth.
    """

    measure: str
    quantiles: Mapping[str, int]
    limit: int | None
    cut: int | None
    lost: float | None
    histogram: Histogram


@dataclass(frozen=True)
class Resemblance:
    """Texts that resemble others.

    Attributes
    ----------
    copies, repeats : int
        Records whose text, or a look-alike of it, stands in an earlier one; copies are among repeats.
    contradicting : int
        Copies with another label than their first.
    held_out : mapping of str to (int, int)
        For "validation" and "test": units with a text that resembles one of training, and all units.
    flattery : Flattery or None
        What that is worth to two simple models.
    """

    copies: int
    repeats: int
    contradicting: int
    held_out: Mapping[str, tuple[int, int]]
    flattery: Flattery | None

    @property
    def share(self) -> float:
        """Of the held-out units, those that resemble a training text."""
        found = sum(part[0] for part in self.held_out.values())
        return found / max(1, sum(part[1] for part in self.held_out.values()))


@dataclass(frozen=True)
class Examination:
    """Everything that was found in one dataset: private.

    Attributes
    ----------
    site, dataset, unit : str
        Whose it is, its name, and whose privacy its unit is.
    plan : str or None
        Name of the plan that it was read for; None if there is none.
    rows, records, units : int
        Rows of the source, and what of them a run would use.
    declared_units : int or None
        What site.toml says; None where a plan without privacy counts another unit.
    by_split : mapping of str to (int, int)
        Units and records of "training", "validation" and "test".
    per_unit : mapping of int to int
        How many units have how many records.
    bound : int
        Most records of a unit that a step uses.
    over_bound : int
        Units with more.
    labels : tuple of LabelCount
        The most frequent first.
    of_spans : bool
        Whether labels are those of spans: a record may then have several, or none.
    other_labels : tuple of (int, int)
        Labels that are not shown, and their records.
    lacking : tuple of str
        Labels of the plan or site.toml that no record has.
    lengths, resemblance, identifiers
        See there.
    left_out : tuple of str
        Rows that are not used, and why.
    versions : int or None
        Versions of training texts that augmentation adds; None where site.toml asks for none.
    """

    site: str
    dataset: str
    unit: str
    plan: str | None
    rows: int
    records: int
    units: int
    declared_units: int | None
    by_split: Mapping[str, tuple[int, int]]
    per_unit: Mapping[int, int]
    bound: int
    over_bound: int
    labels: tuple[LabelCount, ...]
    other_labels: tuple[int, int]
    lacking: tuple[str, ...]
    lengths: Lengths | None
    resemblance: Resemblance
    identifiers: tuple[Sighting, ...]
    left_out: tuple[str, ...]
    versions: int | None = None
    of_spans: bool = False
    remarks: tuple[Remark, ...] = ()

    @property
    def worst(self) -> Level:
        """The gravest level of its remarks."""
        levels: tuple[Level, ...] = ("wrong", "warning")
        return next((at for at in levels if any(r.level == at for r in self.remarks)), "note")
