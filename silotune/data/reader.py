"""From a site's dataset to checked records, or to an error that says where and never what.

What is checked, in this order: the columns of the needed roles are there; no text, label, unit or
group is empty; every label is one of the plan's; no unit has more records than the site allows; with
``data.split_by = "group"``, no unit has records in two groups.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from silotune.data.errors import UnitMismatch, UnitTooLarge
from silotune.data.faults import Faults, rows_in_words
from silotune.data.records import Records
from silotune.data.site import DatasetConfig, SiteConfig
from silotune.data.sources import Table, read_dataset
from silotune.data.splits import Split, assign
from silotune.errors import ColumnMissing, TooFewRecords
from silotune.plan import Plan


def load_records(site: SiteConfig, plan: Plan, *, roles: Collection[str]) -> Records:
    """Read, check and split the dataset that a plan asks a site for.

    A unit with more records than ``privacy.max_records_per_unit`` of the plan keeps them all here;
    each training step draws that many of them anew.

    Parameters
    ----------
    site, plan : SiteConfig, Plan
        Who offers the dataset on which terms, and what is asked of it.
    roles : collection of str
        What the plan's task reads: ``text`` and ``label``, or ``prompt`` and ``response``.

    Returns
    -------
    Records
        Rows in the order of the source; units numbered by first appearance.

    Raises
    ------
    DatasetUnknown, DatasetUnreadable, ColumnMissing
        There is no such dataset, file or column.
    RecordInvalid
        Some rows are not usable; the message has their numbers and columns, never their content.
    UnitMismatch
        The plan's privacy unit is not the one that the site offers the dataset under.
    UnitTooLarge
        A unit has more records than the site's own ``max_records_per_unit``.
    TooFewRecords
        Nothing is left to train on.
    """
    dataset = site.dataset(plan.data.dataset)
    _check_unit_name(dataset, plan)
    columns = _columns(dataset, plan, roles)
    table = read_dataset(dataset, folder=site.folder, columns=list(columns.values()))
    values = {role: _stripped(table.columns[column]) for role, column in columns.items()}
    _check_values(table, values, columns, plan)
    unit_of = _units(table, values, dataset)
    keys = _split_keys(table, values, unit_of, plan)
    split = assign(
        keys,
        test_share=plan.data.test_share,
        validation_share=plan.data.validation_share,
    )
    if not (split == Split.TRAIN).any():
        raise TooFewRecords(f"{table.source}: no record is left for training after the split")
    picked = sorted(roles)
    examples = [{role: values[role][row] for role in picked} for row in range(len(keys))]
    return Records(examples=examples, unit_of=unit_of, split=split)


def _check_unit_name(dataset: DatasetConfig, plan: Plan) -> None:
    # Declared units, budget and rate all count the site's unit: a plan with another one would give
    # a guarantee about something else than what the site agreed to.
    if dataset.unit != plan.privacy.unit:
        raise UnitMismatch(
            f"the site offers {plan.data.dataset!r} by {dataset.unit!r}, "
            f"but privacy.unit of the plan is {plan.privacy.unit!r}"
        )


def _columns(dataset: DatasetConfig, plan: Plan, roles: Collection[str]) -> dict[str, str]:
    """The columns to read, by role: the task's, and those of unit, group and split."""
    named = dataset.columns.by_role()
    needed: set[str] = set(roles)
    if plan.data.split_by == "group":
        needed.add("group")
    missing = sorted(needed - set(named))
    if missing:
        raise ColumnMissing(
            f"the plan needs the roles {', '.join(missing)}, for which "
            f"[datasets.{plan.data.dataset}.columns] in site.toml names no column"
        )
    if "unit" in named:
        needed.add("unit")
    needed.add(_identity_role(named))
    return {str(role): column for role, column in named.items() if role in needed}


def _identity_role(columns: Collection[str]) -> str:
    """The role whose text tells records apart where the record itself is the unit."""
    return "text" if "text" in columns else "prompt"


def _stripped(values: Sequence[str]) -> list[str]:
    return [value.strip() for value in values]


def _check_values(
    table: Table,
    values: dict[str, list[str]],
    columns: dict[str, str],
    plan: Plan,
) -> None:
    faults = Faults(table.source)
    for role, column in columns.items():
        empty = [table.rows[i] for i, value in enumerate(values[role]) if not value]
        faults.add(f"empty {role}", empty, column=column)
    if "label" in columns and plan.model.labels:
        known = {*plan.model.labels, ""}  # an empty label was told already
        unknown = [table.rows[i] for i, v in enumerate(values["label"]) if v not in known]
        faults.add("label is not one of model.labels", unknown, column=columns["label"])
    faults.check()


def _units(table: Table, values: dict[str, list[str]], dataset: DatasetConfig) -> NDArray[np.int64]:
    """Dense numbers of units by first appearance. Raises `TooFewRecords`, `UnitTooLarge`."""
    if not len(table.rows):
        raise TooFewRecords(f"{table.source}: no records")
    if "unit" not in values:  # every record is a unit, and its place in the file identifies it
        return np.arange(len(table.rows))
    numbers: dict[str, int] = {}
    unit_of = np.array([numbers.setdefault(unit, len(numbers)) for unit in values["unit"]])
    over = np.flatnonzero(np.bincount(unit_of) > dataset.max_records_per_unit)
    if over.size:
        _, first = np.unique(unit_of, return_index=True)
        rows = sorted(table.rows[row] for row in first[over])
        raise UnitTooLarge(
            f"{table.source}: {over.size} of the units have more than "
            f"{dataset.max_records_per_unit} records; they start in {rows_in_words(rows)}"
        )
    return unit_of


def _split_keys(
    table: Table, values: dict[str, list[str]], unit_of: NDArray[np.int64], plan: Plan
) -> list[str]:
    """What the split hashes for each row."""
    if plan.data.split_by == "unit":
        # A record without a unit is known by its text: equal texts then stay together.
        return values["unit"] if "unit" in values else values[_identity_role(values)]
    groups = values["group"]
    group_of: dict[int, str] = {}
    torn = [
        table.rows[row]
        for row, (unit, group) in enumerate(zip(unit_of.tolist(), groups, strict=True))
        if group_of.setdefault(unit, group) != group
    ]
    faults = Faults(table.source)
    faults.add("the unit has an earlier record in another group, so it can't stay whole", torn)
    faults.check()
    return groups
