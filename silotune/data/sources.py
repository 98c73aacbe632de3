"""Reading tables of strings: CSV, JSON, Parquet, Arrow, Excel, or a SQL query.

A value is one text whatever the source (`silotune.data.values`); a missing one is the empty string.
Messages name files, rows and columns, and never show what a row holds: not even the header, which in a
file that lacks one is a record.

Rows are numbered as the reader of the source counts them: in a CSV file and a workbook as a spreadsheet
does (the header is row 1, blank rows count), in JSON lines by line, elsewhere from 1. A folder is read
file by file, and a row is named with its file.

There are two ways to read. `read_file` refuses a table with a bad row, for somebody who can mend it.
`read_dataset` is what a site trains on: a bad row is left out and noted in `Table.faults`, because
whether a site can answer must not depend on what one record holds. What is wrong with rows is told by
place and count, never by content.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from silotune.data.columnar import arrow_parts, read_arrow, read_parquet
from silotune.data.delimited import read_csv
from silotune.data.formats import READERS
from silotune.data.json_records import read_array, read_lines
from silotune.data.parts import partition_values, parts_of, told
from silotune.data.shape import Shape
from silotune.data.site import DatasetConfig, Format, expand_url, sqlite_file
from silotune.data.table import Faults, Table, as_table, choose, joined
from silotune.data.values import NEWEST, Rule
from silotune.data.workbook import read_excel
from silotune.errors import DatasetUnreadable

if TYPE_CHECKING:
    import os

    import sqlalchemy as sa

# Rows that a query gives at once.
_AT_ONCE = 500

Reader = Callable[[Path, Collection[str] | None, Shape], Table]

_READERS: dict[Format, Reader] = {
    "csv": read_csv,
    "jsonl": read_lines,
    "json": read_array,
    "parquet": read_parquet,
    "arrow": read_arrow,
    "excel": read_excel,
}


def read_dataset(
    dataset: DatasetConfig,
    *,
    folder: Path,
    columns: Collection[str],
    strict: bool = False,
    rule: Rule = NEWEST,
    lists: Collection[str] = (),
) -> Table:
    """Some columns of a dataset, without its bad rows; relative paths start from `folder`.

    In the columns `lists` a list or an object is its JSON. With `strict` a file is read as by
    `read_file`, and its first trouble raised.

    Raises
    ------
    DatasetUnreadable, ColumnMissing
        The source can't be read at all, or is without a column: not for what a record holds.
    SiteConfigInvalid
        The URL needs an environment variable that is not set.
    """
    if dataset.format == "sql":
        assert dataset.url is not None
        assert dataset.query is not None  # validated
        url = expand_url(dataset.url)
        return _read_query(url, dataset.query, folder, columns, rule=rule, lists=lists)
    assert dataset.path is not None  # validated
    shape = Shape(
        delimiter=dataset.delimiter,
        encoding=dataset.encoding,
        skip_rows=dataset.skip_rows,
        decimal=dataset.decimal,
        sheet=dataset.sheet,
        resource=dataset.resource,
        lists=frozenset(lists),
        rule=rule,
        strict=strict,
    )
    table = _read(folder / dataset.path, dataset.format, columns, shape)
    if strict:
        table.faults.check()
    return table


def read_file(
    path: Path,
    *,
    kind: Format,
    columns: Collection[str] | None = None,
    delimiter: str = ",",
    lists: Collection[str] = (),
) -> Table:
    """Some columns of a file or folder, or all of them when `columns` is None.

    In the columns `lists` a list or an object is its JSON.

    Raises
    ------
    DatasetUnreadable
        The file is missing, not readable, not of its format, or not UTF-8.
    ColumnMissing
        A wanted column is not there, or is there twice.
    RecordInvalid
        A row has another number of fields than the header, or a value is not plain text.
    """
    table = _read(
        path, kind, columns, Shape(delimiter=delimiter, lists=frozenset(lists), strict=True)
    )
    table.faults.check()
    return table


def _parts(path: Path, kind: Format) -> list[Path]:
    found = arrow_parts(path) if kind == "arrow" and path.is_dir() else None
    return parts_of(path) if found is None else found


def _read(path: Path, kind: Format, columns: Collection[str] | None, shape: Shape) -> Table:
    if kind in READERS:
        with told(path):
            return READERS[kind](path, columns, shape)
    read = _READERS[kind]
    with told(path):
        parts = _parts(path, kind)
    if parts == [path]:
        with told(path):
            return read(path, columns, shape)
    tables: list[Table] = []
    for part in parts:
        given = partition_values(part, path)
        wanted = columns if columns is None else [name for name in columns if name not in given]
        with told(part):
            table = read(part, wanted, replace(shape, strict=False))
        added = {name: [value] * len(table.rows) for name, value in given.items()}
        every = {**table.columns, **added}
        columns = list(every) if columns is None else columns
        tables.append(replace(table, columns={name: every[name] for name in columns}))
    return joined(str(path), tables, [str(part.relative_to(path)) for part in parts])


def _read_query(
    url: str,
    query: str,
    folder: Path,
    wanted: Collection[str],
    *,
    rule: Rule,
    lists: Collection[str],
) -> Table:
    import sqlalchemy as sa

    source = "the SQL query"
    try:
        file = sqlite_file(url, folder)
        if file is not None and not file.is_file():  # SQLite would create it
            raise DatasetUnreadable(f"{file}: no such database file")
        address, still = sa.make_url(url), file is not None and _is_still(file)
        before = file.stat() if file is not None and still else None
        if file is not None:
            address = _read_only(address, file, still=still)
        engine = sa.create_engine(address, poolclass=sa.pool.NullPool)
        if file is not None:
            sa.event.listen(engine, "connect", _keep_bad_bytes)
        # The query is the site's own text: no bind parameters, so ':' and '%' mean themselves.
        options = {"no_parameters": True}
        with engine.connect() as connection:
            result = connection.exec_driver_sql(query, execution_options=options)
            names = choose(list(result.keys()), wanted, source)
            columns: list[list[Any]] = [[] for _ in names]
            for rows in result.columns(*names).partitions(_AT_ONCE):
                for column, values in zip(columns, zip(*rows, strict=True), strict=True):
                    column.extend(values)
        if file is not None and before is not None and _written_since(file, before):
            raise DatasetUnreadable(f"{file} was changed while it was read")
    except (sa.exc.SQLAlchemyError, ImportError) as exc:
        # Messages of drivers quote host names, users and statements: only the kind is told.
        cause = getattr(exc, "orig", None) or exc
        if file is not None:
            _explain(file, getattr(cause, "sqlite_errorname", ""))
        raise DatasetUnreadable(f"{source} failed: {type(cause).__name__}") from None
    numbers = range(1, len(columns[0]) + 1 if columns else 1)
    found = dict(zip(names, columns, strict=True))
    return as_table(source, numbers, found, Faults(source), rule, lists=lists)


def _keep_bad_bytes(connection: Any, _record: object) -> None:
    """Have SQLite give text that is no UTF-8 too, so that its row alone is left out."""
    connection.text_factory = lambda content: content.decode("utf-8", "surrogateescape")


def _read_only(address: sa.URL, file: Path, *, still: bool) -> sa.URL:
    """A SQLite database, opened to be read in a folder where nothing can be written."""
    if address.get_driver_name() != "pysqlite":
        return address.set(database=str(file))
    settings = {"uri": "true", "mode": "ro", **({"immutable": "1"} if still else {})}
    place = f"file:{quote(str(file.absolute()))}"
    return address.set(database=place).update_query_dict(settings)


def _is_still(file: Path) -> bool:
    """Whether a SQLite database is in WAL mode and no change waits beside it.

    SQLite would want to make a file beside it only to read it. It can be read as what nobody changes,
    if it is looked at afterwards whether somebody did.
    """
    with told(file), file.open("rb") as content:
        in_wal_mode = content.read(20)[18:] == b"\2\2"  # the versions that write and read it
    return in_wal_mode and not _waiting(file, "-wal")


def _written_since(file: Path, before: os.stat_result) -> bool:
    now = file.stat()
    return (now.st_size, now.st_mtime_ns) != (before.st_size, before.st_mtime_ns)


def _waiting(file: Path, end: str) -> bool:
    """Whether changes lie beside a SQLite database."""
    beside = file.with_name(file.name + end)
    return beside.exists() and beside.stat().st_size > 0


def _explain(file: Path, kind: str) -> None:
    """Raise what an error of SQLite means where files are only read."""
    if kind in {"SQLITE_FULL", "SQLITE_IOERR_WRITE"}:  # what it sorts by way of the disk
        raise OSError(errno.ENOSPC, "no room for SQLite's temporary files")
    for end in ("-wal", "-journal"):
        if _waiting(file, end) and kind.startswith(("SQLITE_CANTOPEN", "SQLITE_READONLY")):
            raise DatasetUnreadable(
                f"{file.name}{end} holds changes that are not in {file.name} yet, and nothing can be "
                "written beside it here",
                remedy="Have the program that writes it finish or close it; or do it by hand: "
                f"sqlite3 {file.name} 'PRAGMA wal_checkpoint(TRUNCATE)'.",
            )
