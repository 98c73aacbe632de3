"""A look at records for the doctor, where a run would read them: inside a confined trainer."""

from __future__ import annotations

import json
from contextlib import suppress
from functools import partial
from pathlib import Path

from silotune.client.training import messages as m
from silotune.data.augmentation import Augmentation
from silotune.data.columns import by_asked
from silotune.data.roles import read_roles
from silotune.data.site import SiteConfig
from silotune.errors import DatasetUnreadable, RecordInvalid


def look(asked: m.AskLook) -> m.Looked:
    """Read the one dataset of a site as a run would, without a plan; the trainer's side.

    Raises
    ------
    DatasetUnreadable, ColumnMissing, SiteConfigInvalid
        What would stop a run too, or there is no record.
    """
    site = SiteConfig.from_mapping(json.loads(asked.site), folder=Path(asked.folder))
    (dataset,) = site.datasets.values()
    columns = {str(role): column for role, column in dataset.columns.by_role().items()}
    rule = asked.rule
    read = partial(read_roles, dataset, folder=site.folder, roles=columns, rule=rule)
    with suppress(RecordInvalid):  # of single rows; a file that is not what it should be fails
        read(strict=True)
    table = read()
    if not table.rows:  # such as CSV that is read as JSON lines
        left_out = "".join(f"; left out: {fault.told}" for fault in table.faults.found)
        raise DatasetUnreadable(f"{table.source}: there is no record in it{left_out}")
    faults = table.faults.again()
    for role, column in by_asked(columns).items():
        values = table.columns[role]
        empty = [row for row, value in zip(table.rows, values, strict=True) if not value]
        faults.add(f"empty {role}", empty, column=column)
        if role == "label" and dataset.declared_labels:
            pairs = zip(table.rows, values, strict=True)
            other = [(row, v) for row, v in pairs if v and v not in dataset.declared_labels]
            rows, labels = [row for row, _ in other], [label for _, label in other]
            faults.add("label is not declared", rows, column=column, values=labels)
    if dataset.augmentation is not None:  # its list of synonyms can be read
        Augmentation.of(dataset.augmentation, folder=site.folder, secret=b"")
    return m.Looked(
        records=len(table.rows), left_out=m.few(tuple(fault.told for fault in faults.found))
    )
