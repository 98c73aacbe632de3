"""Reads a dataset as a site does: by its entry in site.toml."""

import json

from silotune.data.site import DatasetConfig
from silotune.data.sources import read_dataset


def read(path, columns, *, strict=False, **keys):
    """The table of a file or folder, of which `keys` say the rest (``format=...``)."""
    entry = {"path": path.name, "columns": {"text": "text"}, "declared_units": 10, **keys}
    dataset = DatasetConfig.model_validate_json(json.dumps(entry))
    return read_dataset(dataset, folder=path.parent, columns=columns, strict=strict)


def faults(table):
    """What was left out, by reason, with the rows."""
    return {fault.problem: list(fault.rows) for fault in table.faults.found}
