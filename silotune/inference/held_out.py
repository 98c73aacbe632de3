"""The parts of a site's dataset that no run of it trains on: its own split, by its own secret.

A file of a site's records doesn't say which of them a model has learned from. Its site.toml and the
secret in its state do: an evaluation on the test part is one on records that the plan held out, and
temperature and threshold are chosen on the validation part.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from silotune.data.declared import SECRET_FILE, new_secret, own_secret
from silotune.data.records import Records, Split, load_records
from silotune.data.site import SiteConfig
from silotune.errors import ColumnMissing, TooFewRecords
from silotune.inference.errors import SplitUnknown
from silotune.inference.records import SomeRecords
from silotune.plan.plan import Plan
from silotune.trust.vault import Vault

_AT_ONCE = 256


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """One part of a site's dataset.

    Attributes
    ----------
    title, digest : str
        As `silotune.inference.records.LabelledRecords` has them.
    records : Records
        The whole dataset, without what the site leaves out.
    split : Split
        Which part.
    unit_column, group_column : str
        The columns of the dataset; "" where it has none.
    """

    title: str
    digest: str
    records: Records
    split: Split
    unit_column: str = ""
    group_column: str = ""

    def some(self) -> Iterator[SomeRecords]:
        """The records of the part, some at a time; numbers count those of the dataset that are used."""
        rows = self.records.rows(self.split)
        for start in range(0, len(rows), _AT_ONCE):
            numbers = rows[start : start + _AT_ONCE].tolist()
            units = [f"unit {self.records.unit_of[row]}" for row in numbers]
            yield SomeRecords(
                examples=[
                    {**self.records.examples[row], "unit": unit}
                    for row, unit in zip(numbers, units, strict=True)
                ],
                rows=[row + 1 for row in numbers],
                records=len(numbers),
                left_out=self.records.left_out if start == 0 else (),
            )

    def size(self) -> int:
        """How many records it has."""
        return len(self.records.rows(self.split))


def held_out(
    site: SiteConfig, plan: Plan, *, run: Path | None = None, group: str = ""
) -> tuple[HeldOut, HeldOut | None]:
    """The test part of a site's dataset, and the validation part if it has one.

    Parameters
    ----------
    site : SiteConfig
        Whose dataset it is.
    plan : Plan
        What was trained: it names the dataset and the shares that are held out.
    run : Path, optional
        The directory of a simulation, which has a split of its own.
    group : str
        The column of the dataset that groups records.

    Raises
    ------
    SplitUnknown
        The secret that splits the records is not here.
    TooFewRecords
        No record was held out as test.
    DataError
        The dataset doesn't fit the plan, or can't be read.
    """
    dataset = site.dataset(plan.data.dataset)
    if group and group != dataset.columns.group:
        raise ColumnMissing(
            f"{site.name}: {group!r} is not columns.group of {plan.data.dataset}",
            remedy="Declare it in site.toml, or evaluate on a file: --data FILE --group COLUMN.",
        )
    secret = split_secret(site, plan, run=run)
    roles = plan.roles | ({"group"} if group else set())
    records = load_records(site, plan, roles=roles, secret=secret, augment=False)
    by_record = plan.privacy.unit == "record" and not plan.private

    def part(split: Split) -> HeldOut:
        return HeldOut(
            title=f"{site.name}: {split.name.lower()} part of {plan.data.dataset}",
            digest=records.fingerprint(secret),
            records=records,
            split=split,
            unit_column="" if by_record else dataset.columns.unit or "",
            group_column=group,
        )

    test, validation = part(Split.TEST), part(Split.VALIDATION)
    if not test.size():
        raise TooFewRecords(
            f"{site.name}: no record of {plan.data.dataset} was held out as test",
            remedy="Evaluate on a file of records that the model did not learn from: --data FILE.",
        )
    return test, validation if validation.size() else None


def split_secret(site: SiteConfig, plan: Plan, *, run: Path | None) -> bytes:
    """The secret by which the records of a run were split at a site. Raises `SplitUnknown`."""
    played = None if run is None else run / "sites" / site.name
    if played is not None and played.is_dir():
        if (played / SECRET_FILE).is_file():
            return own_secret(played, Vault(played))
        raise SplitUnknown(f"{played} has no {SECRET_FILE}")
    state = site.state_folder
    if (state / SECRET_FILE).is_file():
        return own_secret(state, Vault(state, site.at_rest, base=site.folder))
    given = site.dataset(plan.data.dataset).columns.split is not None
    if given or plan.plan.seed is not None:  # the split needs no secret
        return new_secret()
    raise SplitUnknown(f"{state} has no {SECRET_FILE}")
