"""Writing site folders: what a simulation reads as one site each."""

from __future__ import annotations

import csv
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from string import Template

from silotune.data.site import BudgetConfig, Role
from silotune.errors import FolderOccupied
from silotune.plan import Plan

DECLARED_ROUNDING = 50
_MINILM = "sentence-transformers/all-MiniLM-L6-v2"
_MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


@dataclass(frozen=True)
class Offer:
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
    """

    dataset: str
    columns: Mapping[Role, str]
    budget: BudgetConfig
    unit: str = "record"
    max_records_per_unit: int = 1
    labels: tuple[str, ...] = ()
    plan: Plan | None = None


def read_template(name: str) -> Template:
    """A text of ``silotune/data/templates`` with ``$$name`` places to fill."""
    text = resources.files("silotune.data").joinpath("templates", name).read_text("utf-8")
    return Template(text)


def toml_value(value: str | bool | float | Sequence[str]) -> str:
    """A plain value or list of strings as TOML, whose basic strings are those of JSON."""
    return json.dumps(value, ensure_ascii=False)


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
    offer: Offer,
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    units: int,
) -> Path:
    """Write one site: ``records.csv`` and ``site.toml``; the site is named like the folder.

    Parameters
    ----------
    folder : Path
        The site's folder; made if needed.
    title : str
        A line about the site, for the head of its site.toml.
    offer : Offer
        What the site's dataset is and on which terms it is offered.
    header, rows
        The records, one sequence of fields each, in the order of `header`.
    units : int
        The true number of units; only its rounding is written.

    Returns
    -------
    Path
        The written site.toml.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "records.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
    filled = read_template("site.toml").substitute(
        title=title,
        name=toml_value(folder.name),
        dataset=offer.dataset,
        unit=toml_value(offer.unit),
        declared=declare(units),
        rounding=DECLARED_ROUNDING,
        bound=offer.max_records_per_unit,
        columns="\n".join(f"{role} = {toml_value(name)}" for role, name in offer.columns.items()),
        epsilon=offer.budget.epsilon,
        delta=offer.budget.delta,
        labels=f"labels = {toml_value(offer.labels)}" if offer.labels else "# labels = []",
        **_policy(offer.plan),
    )
    path = folder / "site.toml"
    path.write_text(filled, encoding="utf-8")
    return path


def _policy(plan: Plan | None) -> dict[str, str]:
    """The clauses of the written policy that hang on a plan: what it asks, or usual values."""
    if plan is None:
        weights, base = _MINILM_SHA256, _MINILM
        return {
            "secure": "false",
            "cohort": "3",
            "tasks": toml_value(["text_classification"]),
            "modules": toml_value(["query", "value"]),
            "strategies": toml_value(["fedavg"]),
            "rounds": "500",
            "base_model": f"{toml_value(weights)} = {toml_value(base)}",
        }
    modules = plan.lora.target_modules
    return {
        "secure": toml_value(plan.aggregation.secure),
        "cohort": str(plan.rounds.min_sites),
        "tasks": toml_value([plan.model.task]),
        "modules": toml_value([modules] if isinstance(modules, str) else list(modules)),
        "strategies": toml_value([plan.aggregation.strategy]),
        "rounds": str(plan.rounds.number),
        "base_model": f"{toml_value(plan.model.sha256 or '')} = {toml_value(plan.model.base)}",
    }
