"""What a site declares of a dataset, against what a plan asks of it: no record is looked at here.

A site's daemon judges plans by this alone, and so it needs no reader of records. The site's own secret,
from which the split of its records follows, is kept here too.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from silotune.data.columns import LABELLED, STANDS_FOR, by_asked
from silotune.data.site import DatasetConfig, SiteConfig
from silotune.data.values import Rule
from silotune.errors import (
    CalibrationImpossible,
    ColumnMissing,
    HeldOutTooMuch,
    LabelsUnfit,
    SilotuneError,
    TooFewRecords,
    UnitMismatch,
)
from silotune.plan.counted import number_key, units_with_room
from silotune.plan.plan import Plan
from silotune.trust.files import create_file, create_private_folder
from silotune.trust.vault import Vault

SECRET_FILE = "split.secret.sealed"  # noqa: S105 - a file's name
"""Its name in the state folder."""

_BYTES = 32

# In front of the random bytes of a secret: by which rule the values of its site become text. One that
# was made before there was a second rule has nothing in front.
_BY_RULE_2 = b"silotune values 2\0"


def new_secret() -> bytes:
    """A new secret of a site, under the newest rule of values."""
    return _BY_RULE_2 + os.urandom(_BYTES)


def rule_for(dataset: DatasetConfig, secret: bytes) -> Rule:
    """By which rule the values of a dataset become text (`silotune.data.values`).

    Another rule may give a unit another text, and so another side of the split: a site keeps the rule
    that its secret was made under, unless its site.toml says otherwise.
    """
    return dataset.values or (2 if secret.startswith(_BY_RULE_2) else 1)


def own_secret(state: Path, vault: Vault, *, new: bytes | None = None) -> bytes:
    """The secret in a state folder, made (or taken from `new`) if there is none yet.

    Raises
    ------
    SealBroken, FileExposed
        The file was changed, or other accounts of the machine may read it.
    """
    path = state / SECRET_FILE
    if not path.exists():
        create_private_folder(state, to_disk=vault.to_disk)
        sealed = vault.seal(new or new_secret(), name=path.name)
        create_file(path, sealed, to_disk=vault.to_disk)
    return vault.read(path)


def secret_for_a_look(site: SiteConfig, purpose: bytes) -> bytes:
    """A secret for whoever looks at a site's records without a run.

    Values become text as they do for the site's own runs, and the split is another one: no page and no
    terminal should tell on which side a unit is.
    """
    own = new_secret()  # also where the site's can't be opened here
    if (site.state_folder / SECRET_FILE).exists():
        with suppress(SilotuneError):
            vault = Vault(site.state_folder, site.at_rest, base=site.folder)
            own = own_secret(site.state_folder, vault)
    return (_BY_RULE_2 if own.startswith(_BY_RULE_2) else b"") + purpose


_LEAST_UNITS = 1.0


def require_declared(site: SiteConfig, plan: Plan, *, roles: Collection[str]) -> None:
    """Judge a plan by what the site declares of its dataset, without a look at any record.

    Raises
    ------
    DatasetUnknown
        The site has no dataset of this name.
    UnitMismatch
        The plan protects another unit than the one that the site offers the dataset under.
    ColumnMissing
        A role that the plan needs has no column.
    LabelsUnfit
        The site declares a label that the plan lacks.
    HeldOutTooMuch, TooFewRecords
        The plan holds out more than the site allows, or than leaves a declared unit to train on.
    CalibrationImpossible
        A plan that counts has no room for so many units.
    """
    dataset = site.dataset(plan.data.dataset)
    _check_unit_name(dataset, plan)
    columns_for(dataset, plan, roles)
    numbers_for(dataset, plan)
    _require_room(dataset, plan)
    lacking = [label for label in dataset.declared_labels if label not in plan.model.labels]
    named = not LABELLED.isdisjoint(roles)
    if lacking and named:
        raise LabelsUnfit(
            f"model.labels of the plan lacks {', '.join(map(repr, lacking))}, which labels of "
            f"[datasets.{plan.data.dataset}] declares"
        )
    if named and (same := dataset.same_label(plan.model.labels)) is not None:
        raise LabelsUnfit(f"model.labels of the plan: {same} in [datasets.{plan.data.dataset}]")
    held_out = plan.data.test_share + plan.data.validation_share
    if held_out > dataset.max_held_out + 1e-9:
        raise HeldOutTooMuch(
            f"the plan holds out {held_out:g}, max_held_out of the dataset is "
            f"{dataset.max_held_out:g}"
        )
    if plan.training_units(dataset.declared_units) < _LEAST_UNITS:
        raise TooFewRecords(
            f"of {dataset.declared_units} declared units a plan that holds out {held_out:g} leaves "
            "none to train on"
        )


def _check_unit_name(dataset: DatasetConfig, plan: Plan) -> None:
    # Declared units, budget and rate all count the site's unit: a plan with another one would give
    # a guarantee about something else than what the site agreed to. Without privacy there is none.
    if plan.private and dataset.unit != plan.privacy.unit:
        raise UnitMismatch(
            f"the site offers {plan.data.dataset!r} by {dataset.unit!r}, "
            f"but privacy.unit of the plan is {plan.privacy.unit!r}"
        )


def columns_for(dataset: DatasetConfig, plan: Plan, roles: Collection[str]) -> dict[str, str]:
    """The columns to read, by role: the task's, and those of unit, group and split."""
    named = {str(role): column for role, column in dataset.columns.by_role().items()}
    offered = by_asked(named)
    needed: set[str] = set(roles)
    if plan.data.split_by == "group":
        needed.add("group")
    missing = sorted(needed - set(offered))
    if missing:
        raise ColumnMissing(
            f"the plan needs the roles {', '.join(missing)}, for which "
            f"[datasets.{plan.data.dataset}.columns] in site.toml names no column"
        )
    needed.update({"unit", "split"} & set(offered))
    needed.add(identity_role(offered))
    return {role: column for role, column in named.items() if STANDS_FOR.get(role, role) in needed}


def numbers_for(dataset: DatasetConfig, plan: Plan) -> dict[str, str]:
    """The columns of numbers that the plan's statistics ask for; none of them need have a value."""
    asked = [] if plan.statistics is None else sorted(plan.statistics.numbers)
    if missing := [name for name in asked if name not in dataset.numbers]:
        raise ColumnMissing(
            f"the plan asks for statistics of {', '.join(missing)}, for which "
            f"[datasets.{plan.data.dataset}.numbers] in site.toml names no column"
        )
    return {number_key(name): dataset.numbers[name] for name in asked}


def _require_room(dataset: DatasetConfig, plan: Plan) -> None:
    """Units beyond what a sum has room for would silently not be counted."""
    declared, room = dataset.declared_units, units_with_room(plan)
    if plan.only_sums and declared > room:
        raise CalibrationImpossible(
            f"the site declares {declared} units, the sum of the plan has room for {room:.0f} of a site",
            remedy="Raise aggregation.update_bound of the plan.",
        )


def identity_role(columns: Collection[str]) -> str:
    """The role whose text tells records apart where the record itself is the unit."""
    return next(role for role in ("text", "image", "prompt", "messages") if role in columns)
