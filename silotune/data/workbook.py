"""Excel workbooks, by openpyxl (``pip install 'silotune[excel]'``)."""

from __future__ import annotations

import mimetypes
import zipfile
from collections.abc import Collection, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from silotune.data.parts import most_unpacked, told, unpacks_too_far
from silotune.data.shape import Shape
from silotune.data.table import Faults, Table, as_table, choose, empty_table
from silotune.data.values import text_of
from silotune.errors import DatasetUnreadable


def read_excel(path: Path, wanted: Collection[str] | None, shape: Shape) -> Table:
    """Some columns of one sheet, or all of them; rows are numbered as Excel shows them.

    Raises
    ------
    DatasetUnreadable
        It is no workbook, unpacks beyond all bounds, or openpyxl is not installed.
    ColumnMissing
        A wanted column is not there.
    """
    rows = _rows(path, shape)
    number, header = next(rows, (0, ()))
    if not header:
        return empty_table(path, wanted, strict=shape.strict)
    present = [(text_of(cell) or "").strip() for cell in header]
    hint = f"; is row {number} of the sheet the header?"
    names = choose(
        present, [n for n in present if n] if wanted is None else wanted, str(path), hint
    )
    places = [present.index(name) for name in names]
    numbers: list[int] = []
    columns: list[list[Any]] = [[] for _ in names]
    for number, cells in rows:
        numbers.append(number)
        for column, place in zip(columns, places, strict=True):
            column.append(cells[place] if place < len(cells) else None)
    values = dict(zip(names, columns, strict=True))
    return as_table(str(path), numbers, values, Faults(str(path)), shape.rule)


Cells = tuple[Any, ...]


def _rows(path: Path, shape: Shape) -> Iterator[tuple[int, Cells]]:
    """The rows that are not blank, from the header on."""
    openpyxl = _openpyxl(path)
    with told(path):
        _require_bounded(path)
    try:
        with (
            path.open("rb") as file,
            closing(openpyxl.load_workbook(file, read_only=True, data_only=True)) as book,
        ):
            names = book.sheetnames
            name = names[0] if shape.sheet is None else shape.sheet
            if name in names:
                yield from _cells(book[name], shape.skip_rows)
    except Exception:  # openpyxl raises whatever a broken file makes of it
        raise _no_workbook(path) from None
    if name not in names:
        raise DatasetUnreadable(f"{path} has no sheet {name!r} among its {len(names)}")


def _openpyxl(path: Path) -> Any:
    # It asks for the system's list of file types, which a confined trainer may not open.
    begun, mimetypes.inited = mimetypes.inited, True
    try:
        import openpyxl
    except ImportError:
        remedy = "pip install 'silotune[excel]'"
        raise DatasetUnreadable(f"{path} needs openpyxl", remedy=remedy) from None
    finally:
        mimetypes.inited = begun
    return openpyxl


def _cells(sheet: Any, skipped: int) -> Iterator[tuple[int, Cells]]:
    sheet.reset_dimensions()  # some writers state them wrongly
    for number, cells in enumerate(sheet.iter_rows(values_only=True), start=1):
        if number > skipped and any(cell not in (None, "") for cell in cells):
            yield number, cells


def _require_bounded(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as packed:
            size = sum(member.file_size for member in packed.infolist())
    except zipfile.BadZipFile:
        raise _no_workbook(path) from None
    limit = most_unpacked(path.stat().st_size)
    if size > limit:
        raise unpacks_too_far(path, limit)


def _no_workbook(path: Path) -> DatasetUnreadable:
    return DatasetUnreadable(f"{path}: not an Excel workbook (.xlsx), or a damaged one")
