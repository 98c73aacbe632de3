"""Parquet and Arrow files, which know the types of their columns."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from silotune.data.blocks import texts_of
from silotune.data.nested import finder, root_of
from silotune.data.parts import most_unpacked, unpacks_too_far
from silotune.data.shape import Shape
from silotune.data.table import Faults, Table, as_table, choose, of_texts
from silotune.data.values import of_float
from silotune.errors import DatasetUnreadable

if TYPE_CHECKING:
    import pyarrow as pa

_STATE = "state.json"
_FILE_FORMAT = b"ARROW1"

# Rows that are unpacked at once.
_AT_ONCE = 16_384


def read_parquet(path: Path, wanted: Collection[str] | None, shape: Shape) -> Table:
    """Some columns of a Parquet file, or all of them; records are numbered from 1.

    Raises
    ------
    DatasetUnreadable
        It is no Parquet file, or a column holds no plain values.
    ColumnMissing
        A wanted column is not there.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            names = _roots(file.schema_arrow.names, wanted, path)
            batches = file.iter_batches(_AT_ONCE, columns=names)
            return _as_text(path, batches, wanted or names, shape)
    except pa.ArrowException:
        raise DatasetUnreadable(f"{path}: not a Parquet file, or a damaged one") from None


def read_arrow(path: Path, wanted: Collection[str] | None, shape: Shape) -> Table:
    """Some columns of an Arrow file or stream, as Hugging Face ``datasets`` keeps them.

    Raises
    ------
    DatasetUnreadable, ColumnMissing
        As `read_parquet`.
    """
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as source:
            in_file = source.read(len(_FILE_FORMAT)) == _FILE_FORMAT
            source.seek(0)
            reader = pa.ipc.open_file(source) if in_file else pa.ipc.open_stream(source)
            names = _roots(reader.schema.names, wanted, path)
            batches = map(reader.get_batch, range(reader.num_record_batches)) if in_file else reader
            selected = (batch.select(names) for batch in batches)
            return _as_text(path, selected, wanted or names, shape)
    except pa.ArrowException:
        raise DatasetUnreadable(f"{path}: not an Arrow file, or a damaged one") from None


def arrow_parts(folder: Path) -> list[Path] | None:
    """The files of a folder that ``Dataset.save_to_disk`` wrote; None if it is no such folder.

    Raises
    ------
    DatasetUnreadable
        It has several splits, or rows by an index.
    """
    if (folder / "dataset_dict.json").is_file():
        raise DatasetUnreadable(
            f"{folder} has several splits",
            remedy="Name the folder of one of them as path in site.toml.",
        )
    try:
        state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        names = [entry["filename"] for entry in state["_data_files"]]
        by_index = bool(state.get("_indices_files") or state.get("_indices_data_files"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        raise DatasetUnreadable(f"{folder / _STATE} is not what `datasets` writes") from None
    if by_index or any(Path(name).name != name for name in names):
        raise DatasetUnreadable(
            f"{folder}: its rows stand in other files",
            remedy="Write it again: dataset.flatten_indices().save_to_disk(FOLDER).",
        )
    return [folder / name for name in names]


def _roots(present: Sequence[str], wanted: Collection[str] | None, path: Path) -> list[str]:
    """The columns of the file that what is wanted is in."""
    roots = None if wanted is None else [root_of(name, present) for name in wanted]
    return choose(present, roots, str(path))


def _as_text(
    path: Path, batches: Iterable[pa.RecordBatch], names: Collection[str], shape: Shape
) -> Table:
    """All batches, unless they are far more than the file: columns may be packed, or repeat."""
    import pyarrow as pa

    limit, size, rows = most_unpacked(path.stat().st_size), 0, 0
    columns: dict[str, list[Any]] = {name: [] for name in names}
    nested = False
    for batch in batches:
        size, rows = size + batch.nbytes, rows + batch.num_rows
        if size > limit:
            raise unpacks_too_far(path, limit)
        for name, column in columns.items():
            if name in batch.schema.names and not (
                name in shape.lists and pa.types.is_nested(batch.schema.field(name).type)
            ):
                column.extend(_texts(path, name, batch.column(name), shape))
                continue
            nested = True
            root = root_of(name, batch.schema.names)
            find = finder(name, whole=name in shape.lists)
            column.extend(find({root: value}) for value in batch.column(root).to_pylist())
    numbers, faults = range(1, rows + 1), Faults(str(path))
    if nested:
        return as_table(str(path), numbers, columns, faults, shape.rule, lists=shape.lists)
    return of_texts(str(path), numbers, columns, faults, shape.rule)


def _texts(path: Path, name: str, column: pa.Array, shape: Shape) -> list[str]:
    import pyarrow as pa

    kind: Any = column.type
    if not shape.strict and pa.types.is_binary(kind):  # one record's bytes may be no text
        values = column.to_pylist()
        return [(value or b"").decode("utf-8", "surrogateescape") for value in values]
    try:
        texts = texts_of(pa.chunked_array([column.cast(pa.string()).fill_null("")]))
    except pa.ArrowException:
        raise DatasetUnreadable(
            f"{path}: column {name!r} of type {kind} can't be read as text"
        ) from None
    if shape.rule > 1 and pa.types.is_floating(kind):
        return [text and of_float(float(text)) for text in texts]
    return texts
