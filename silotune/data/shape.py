"""How a text file is written: what ``[datasets.NAME]`` says beyond its format."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from silotune.data.parts import open_part
from silotune.data.site import Resource
from silotune.data.values import NEWEST, Rule
from silotune.errors import DatasetUnreadable

_UNPACK = "Unpack it, and name the unpacked file in site.toml."

# What is no text, by its first bytes: its name, and what to do.
_NO_TEXT = {
    b"BZh91AY&SY": ("packed by bzip2", _UNPACK),
    b"\xfd7zXZ": ("packed by xz", _UNPACK),
    b"PK\x03\x04": (
        "a zip archive or an Excel file",
        'Unpack it, or say format = "excel" for this dataset in site.toml.',
    ),
    b"PAR1\x15": ("a Parquet file", 'Say format = "parquet" for this dataset in site.toml.'),
    b"ARROW1": ("an Arrow file", 'Say format = "arrow" for this dataset in site.toml.'),
    b"\xff\xfe": ("UTF-16 text", 'Say encoding = "utf-16" for this dataset in site.toml.'),
    b"\xfe\xff": ("UTF-16 text", 'Say encoding = "utf-16" for this dataset in site.toml.'),
}

_SNIFFED = max(map(len, _NO_TEXT))


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How a file is written, and how it is read.

    Attributes
    ----------
    delimiter, encoding, decimal : str
        Of text files.
    skip_rows : int
        Lines (of a sheet: rows) before the header.
    sheet : str or None
        Of a workbook; its first one when None.
    resource : str
        Which resources of a FHIR export are records.
    lists : frozenset of str
        Columns whose value may be a list or an object; its text is then its JSON.
    rule : int
        By which values become text (`silotune.data.values`).
    strict : bool
        Refuse a file with a bad row, instead of leaving the row out.
    """

    delimiter: str = ","
    encoding: str = "utf-8"
    skip_rows: int = 0
    decimal: str = "."
    sheet: str | None = None
    resource: Resource = "DocumentReference"
    lists: frozenset[str] = frozenset()
    rule: Rule = NEWEST
    strict: bool = False

    @property
    def utf16(self) -> bool:
        """Whether a character is no single byte or a run of bytes above 127."""
        return self.encoding.startswith(("utf-16", "utf-32"))


def open_text(path: Path, shape: Shape) -> TextIO:
    """The text of a part, without a byte-order mark.

    Unless it is read strictly, a record's bad bytes stay, as half surrogates that no text has.

    Raises
    ------
    DatasetUnreadable
        It is no text at all.
    """
    stream = open_part(path)
    start = stream.peek(_SNIFFED)[:_SNIFFED]  # type: ignore[attr-defined]
    for begin, (kind, remedy) in _NO_TEXT.items():
        if start.startswith(begin) and not (shape.utf16 and "UTF-16" in kind):
            stream.close()
            raise DatasetUnreadable(f"{path} is {kind}, not UTF-8 text", remedy=remedy)
    encoding = "utf-8-sig" if shape.encoding == "utf-8" else shape.encoding
    lenient = "surrogatepass" if shape.utf16 else "surrogateescape"
    errors = "strict" if shape.strict else lenient
    return io.TextIOWrapper(stream, encoding=encoding, errors=errors, newline="")


def not_text(path: Path, shape: Shape) -> DatasetUnreadable:
    """The refusal of a part that is not of its encoding, with the first such line."""
    line = ""
    if not shape.utf16:
        with open_part(path) as stream:
            for number, content in enumerate(stream, start=1):
                try:
                    content.decode(shape.encoding)
                except UnicodeDecodeError:
                    line = f" at line {number}"
                    break
    return DatasetUnreadable(
        f"{path}: not {shape.encoding.upper()} text{line}",
        remedy='Say its encoding in site.toml: encoding = "cp1252", if it came from Windows.',
    )
