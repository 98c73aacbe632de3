"""Writing the folders of simulated sites, and dividing one data file into them.

Whole units are dealt out, never single records of one; every record ends up at exactly one site.
The same file, partitioner and seed give the same sites.

References
----------
Hsu, Qi and Brown, "Measuring the Effects of Non-Identical Data Distribution for Federated Visual
Classification", 2019 (label skew). Li, Diao, Chen and He, "Federated Learning on Non-IID Data Silos:
An Experimental Study", ICDE 2022 (quantity skew).
"""

from __future__ import annotations

import csv
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from silotune.data.columns import LISTS, Role
from silotune.data.site import BudgetConfig, Format
from silotune.data.sources import read_file
from silotune.data.table import Table, numbered
from silotune.data.values import without_missing
from silotune.errors import ColumnMissing, DatasetUnreadable, FolderOccupied, TooFewRecords
from silotune.plan.plan import Plan
from silotune.plan.written import toml_text

DECLARED_ROUNDING = 50
_MINILM = "sentence-transformers/all-MiniLM-L6-v2"
_MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


@dataclass(frozen=True)
class CommonTerms:
    """What all sites of a written federation have in common.

    Attributes
    ----------
    dataset : str
        The name under which each site offers its records.
    columns : mapping of role to str
        The column of each role.
    budget : BudgetConfig
        The privacy budget of each site's dataset.
    unit : str
        ``record``, or what one value of the unit column is.
    max_records_per_unit : int
        The bound that each site declares.
    labels : tuple of str
        The labels that each site declares; none if the records have none.
    plan : Plan or None
        The plan that was written with the sites: their policies let it pass.
    images : str or None
        The folder of the images that the role ``image`` names.
    """

    dataset: str
    columns: Mapping[Role, str]
    budget: BudgetConfig
    unit: str = "record"
    max_records_per_unit: int = 1
    labels: tuple[str, ...] = ()
    plan: Plan | None = None
    images: str | None = None


def read_template(name: str) -> Template:
    """A text of ``silotune/data/templates`` with ``$$name`` places to fill."""
    text = resources.files("silotune.data").joinpath("templates", name).read_text("utf-8")
    return Template(text)


def declare(units: int) -> int:
    """The public number of a site with so many units: rounded to 50, and never below 50."""
    nearest = (units + DECLARED_ROUNDING // 2) // DECLARED_ROUNDING * DECLARED_ROUNDING
    return max(DECLARED_ROUNDING, nearest)


def refuse_other_sites(folder: Path, names: Collection[str]) -> None:
    """Raise `FolderOccupied` if `folder` has sites other than those that will be (re)written."""
    present = {path.parent.name for path in folder.glob("*/site.toml")}
    others = sorted(present - set(names))
    if others:
        raise FolderOccupied(f"{folder} already holds the sites {', '.join(others)}")


def write_site(
    folder: Path,
    *,
    title: str,
    offer: CommonTerms,
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    units: int,
) -> None:
    """Write one site: ``records.csv`` and ``site.toml``; the site is named like the folder.

    Parameters
    ----------
    folder : Path
        The site's folder; made if needed.
    title : str
        A line about the site, for the head of its site.toml.
    offer : CommonTerms
        What the site's dataset is and on which terms it is offered.
    header, rows
        The records, one sequence of fields each, in the order of `header`.
    units : int
        The true number of units; only its rounding is written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "records.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
    filled = read_template("site.toml").substitute(
        title=title,
        name=toml_text(folder.name),
        dataset=offer.dataset,
        unit=toml_text(offer.unit),
        declared=declare(units),
        rounding=DECLARED_ROUNDING,
        bound=offer.max_records_per_unit,
        columns="\n".join(f"{role} = {toml_text(name)}" for role, name in offer.columns.items()),
        epsilon=offer.budget.epsilon,
        delta=offer.budget.delta,
        labels=f"labels = {toml_text(offer.labels)}" if offer.labels else "# labels = []",
        images=f"\nimages = {toml_text(offer.images)}" if offer.images else "",
        **_policy(offer.plan),
    )
    (folder / "site.toml").write_text(filled, encoding="utf-8")


def _policy(plan: Plan | None) -> dict[str, str]:
    """The clauses of the written policy that hang on a plan: what it asks, or usual values."""
    weights, base = _MINILM_SHA256, _MINILM
    asked: dict[str, Any] = {
        "secure": False,
        "cohort": 3,
        "tasks": ["text_classification"],
        "modules": ["query", "value"],
        "strategies": ["fedavg"],
        "rounds": 500,
    }
    if plan is not None:
        weights, base = plan.model.sha256 or "", plan.model.base
        modules = plan.lora.target_modules
        asked = {
            "secure": plan.aggregation.secure,
            "cohort": plan.rounds.min_sites,
            "tasks": [plan.model.task],
            "modules": [modules] if isinstance(modules, str) else modules,
            "strategies": [plan.aggregation.strategy],
            "rounds": plan.rounds.number,
        }
    written = {key: toml_text(value) for key, value in asked.items()}
    return {**written, "base_model": f"{toml_text(weights)} = {toml_text(base)}"}


Ints = NDArray[np.int64]

_SUFFIXES: dict[str, Format] = {
    ".csv": "csv",
    ".jsonl": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".xlsx": "excel",
}
_PACKED = frozenset({".gz", ".zst"})


@dataclass(frozen=True)
class Units:
    """The units of a table, as a partitioner sees them.

    Attributes
    ----------
    unit_of : int64 array of shape [n]
        The unit of each record, numbered densely by first appearance.
    table : Table
        The records.
    label : str or None
        The column of the label role.
    """

    unit_of: Ints
    table: Table
    label: str | None

    @property
    def count(self) -> int:
        """Number of units."""
        return int(self.unit_of.max()) + 1

    def majority(self, column: str) -> tuple[Ints, list[str]]:
        """The most frequent value of a column in each unit; the value seen first wins a tie.

        Returns
        -------
        codes : int64 array of shape [count]
            For each unit an index into `values`.
        values : list of str
            The distinct values of the column, in order of appearance.
        """
        cells, values = numbered(self.table.columns[column])
        counts = np.zeros((self.count, len(values)), dtype=np.int64)
        np.add.at(counts, (self.unit_of, cells), 1)
        return counts.argmax(axis=1).astype(np.int64), values


class Partitioner(Protocol):
    """Deals out units to sites."""

    def deal(self, units: Units, rng: np.random.Generator) -> tuple[Ints, list[str]]:
        """The site of each unit [count] as an index into the sites' names, and these names."""


@dataclass(frozen=True)
class ByColumn:
    """One site for each value of a column, named after it.

    A unit with records under several values goes where most of its records are.
    """

    column: str

    def deal(self, units: Units, rng: np.random.Generator) -> tuple[Ints, list[str]]:
        """See `Partitioner.deal`; nothing is drawn at random."""
        if self.column not in units.table.columns:
            raise ColumnMissing(f"{units.table.source} has no column {self.column!r}")
        codes, values = units.majority(self.column)
        used, site_of = np.unique(codes, return_inverse=True)
        return site_of.astype(np.int64), _names_from([values[code] for code in used])


@dataclass(frozen=True)
class Iid:
    """Sites of equal size (to one unit), each a random sample."""

    sites: int

    def deal(self, units: Units, rng: np.random.Generator) -> tuple[Ints, list[str]]:
        """See `Partitioner.deal`."""
        _check_enough(units, self.sites)
        return rng.permutation(np.arange(units.count) % self.sites), _numbered(self.sites)


@dataclass(frozen=True)
class DirichletLabels:
    """Sites of equal size (to one unit) with label skew, after Hsu et al. (2019).

    Each site draws its label distribution from Dir(alpha * prior), with the labels' overall
    distribution as the prior, and then units by it without replacement; a label that is used up is
    left out from then on. A small `alpha` makes sites of one label, a large one makes them alike.
    """

    sites: int
    alpha: float

    def deal(self, units: Units, rng: np.random.Generator) -> tuple[Ints, list[str]]:
        """See `Partitioner.deal`. A unit's label is that of most of its records."""
        _check_enough(units, self.sites)
        if units.label is None:
            raise ColumnMissing("label skew needs the column of the role 'label'")
        labels, values = units.majority(units.label)
        piles = [rng.permutation(np.flatnonzero(labels == code)) for code in range(len(values))]
        left = np.array([len(pile) for pile in piles])
        prior = left / left.sum()
        site_of = np.empty(units.count, dtype=np.int64)
        for site, size in enumerate(_equal_sizes(units.count, self.sites)):
            taken = _draw(_dirichlet(self.alpha * prior, rng), left, size, rng)
            for code in np.flatnonzero(taken):
                end = left[code]
                site_of[piles[code][end - taken[code] : end]] = site
            left = left - taken
        return site_of, _numbered(self.sites)


@dataclass(frozen=True)
class QuantitySkew:
    """Random samples of unequal size, after Li et al. (2022).

    The sites' shares are drawn from a symmetric Dir(alpha); each site has at least one unit. A small
    `alpha` makes few large and many tiny sites.
    """

    sites: int
    alpha: float

    def deal(self, units: Units, rng: np.random.Generator) -> tuple[Ints, list[str]]:
        """See `Partitioner.deal`."""
        _check_enough(units, self.sites)
        shares = _dirichlet(np.full(self.sites, self.alpha), rng)
        exact = shares * (units.count - self.sites)
        sizes = np.floor(exact).astype(np.int64)
        short = units.count - self.sites - int(sizes.sum())
        sizes[np.argsort(sizes - exact, kind="stable")[:short]] += 1  # largest remainders
        site_of = np.repeat(np.arange(self.sites), sizes + 1)
        return rng.permutation(site_of), _numbered(self.sites)


@dataclass(frozen=True)
class Part:
    """A written site: its folder and how many records and units it got."""

    folder: Path
    records: int
    units: int


def partition_file(
    source: Path,
    folder: Path,
    *,
    partitioner: Partitioner,
    columns: Mapping[Role, str],
    budget: BudgetConfig,
    dataset: str = "records",
    unit: str = "record",
    seed: int = 0,
) -> tuple[Part, ...]:
    """Divide one data file into site folders, each with ``records.csv`` and ``site.toml``.

    Parameters
    ----------
    source : Path
        A file whose name ends in ``.csv``, ``.jsonl``, ``.json``, ``.parquet``, ``.arrow`` or ``.xlsx``,
        perhaps packed (``.gz``, ``.zst``). All its columns are kept.
    folder : Path
        Where to; made if needed. Its site folders are overwritten.
    partitioner : Partitioner
        Who gets what.
    columns : mapping of role to str
        The column of each role, for the site.toml files. With a unit column, units stay whole.
    budget, dataset, unit
        Terms of every site: see `silotune.data.partition.CommonTerms`.
    seed : int
        Of everything that is drawn at random.

    Raises
    ------
    DatasetUnreadable, ColumnMissing, RecordInvalid, TooFewRecords
        The file can't be read, lacks a named column, or has fewer units than there are sites.
    FolderOccupied
        The folder holds other sites.
    """
    units = _read_units(source, columns)
    site_of, names = partitioner.deal(units, np.random.default_rng(seed))
    refuse_other_sites(folder, names)
    offer = CommonTerms(
        dataset=dataset,
        columns=columns,
        budget=budget,
        unit=unit,
        max_records_per_unit=int(np.bincount(units.unit_of).max()),
        labels=_labels(units),
    )
    return tuple(
        _write_part(folder / name, units, site_of == site, offer) for site, name in enumerate(names)
    )


def _read_units(source: Path, columns: Mapping[Role, str]) -> Units:
    name = Path(source.stem) if source.suffix.lower() in _PACKED else source
    kind = _SUFFIXES.get(name.suffix.lower())
    if kind is None:
        raise DatasetUnreadable(f"{source}: expected a name that ends in {', '.join(_SUFFIXES)}")
    lists = [column for role, column in columns.items() if role in LISTS]
    table = read_file(source, kind=kind, lists=lists)
    missing = [name for name in columns.values() if name not in table.columns]
    if missing:
        raise ColumnMissing(f"{source} has no column {', '.join(map(repr, missing))}")
    if not len(table.rows):
        raise TooFewRecords(f"{source}: no records")
    if "unit" not in columns:
        return Units(np.arange(len(table.rows)), table, columns.get("label"))
    column = columns["unit"]
    values = without_missing([value.strip() for value in table.columns[column]])
    nobody = [row for row, value in zip(table.rows, values, strict=True) if not value]
    table.faults.add("empty unit", nobody, column=column)
    table.faults.check()  # records of nobody are no unit of their own
    unit_of, _ = numbered(values)
    return Units(unit_of, table, columns.get("label"))


def _labels(units: Units) -> tuple[str, ...]:
    """Every label of the file: what each site declares, also one that has only some of them."""
    values = units.table.columns[units.label] if units.label is not None else ()
    return tuple(sorted({value.strip() for value in values} - {""}))


def _write_part(folder: Path, units: Units, own: NDArray[np.bool_], offer: CommonTerms) -> Part:
    """Write the site that has the units of the mask `own` [count]."""
    rows = np.flatnonzero(own[units.unit_of])
    columns = list(units.table.columns.values())
    count = int(np.count_nonzero(own))
    write_site(
        folder,
        title=f"A simulated site: a part of {Path(units.table.source).name}.",
        offer=offer,
        header=list(units.table.columns),
        rows=([column[row] for column in columns] for row in rows.tolist()),
        units=count,
    )
    return Part(folder=folder, records=len(rows), units=count)


def _check_enough(units: Units, sites: int) -> None:
    if not 1 <= sites <= units.count:
        raise TooFewRecords(f"{units.count} units can't make {sites} sites")


def _equal_sizes(total: int, parts: int) -> list[int]:
    return [total // parts + (part < total % parts) for part in range(parts)]


def _dirichlet(alpha: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """A draw from Dir(alpha) that survives a tiny alpha, where every gamma variate underflows.

    Log-gamma variates by the boost G(a) = G(a + 1) * U^(1/a) (Marsaglia and Tsang, 2000), which keeps
    their order of magnitude; a zero in `alpha` gets a zero share.
    """
    if not (alpha >= 0).all() or not alpha.any():
        raise ValueError("alpha must be positive")
    shares = np.zeros(len(alpha), dtype=np.float64)
    live = alpha > 0
    uniform = 1.0 - rng.random(int(live.sum()))  # never 0, whose logarithm is infinite
    logs = np.log(rng.standard_gamma(alpha[live] + 1)) + np.log(uniform) / alpha[live]
    shares[live] = np.exp(logs - logs.max())
    shares /= shares.sum()
    return shares


def _draw(shares: NDArray[np.float64], left: Ints, size: int, rng: np.random.Generator) -> Ints:
    """How many units of each label a site takes: `size` in all, none beyond what is left."""
    taken = np.zeros_like(left)
    while size > 0:
        open_ = np.where(taken < left, shares, 0.0)
        if open_.sum() == 0.0:  # the site's own labels are used up
            open_ = (left - taken).astype(np.float64)
        drawn = np.minimum(rng.multinomial(size, open_ / open_.sum()), left - taken)
        taken = taken + drawn
        size -= int(drawn.sum())
    return taken


def _numbered(sites: int) -> list[str]:
    width = len(str(sites))
    return [f"site-{number:0{width}}" for number in range(1, sites + 1)]


def _names_from(values: Sequence[str]) -> list[str]:
    """A valid and unique site name for each value of a column."""
    names: list[str] = []
    for value in values:
        plain = re.sub(r"[^a-z0-9_-]+", "-", value.strip().lower()).strip("-_")[:50] or "site"
        name, again = plain, 1
        while name in names:
            again += 1
            name = f"{plain}-{again}"
        names.append(name)
    return names
