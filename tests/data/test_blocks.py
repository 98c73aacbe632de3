"""CSV that is read by blocks is read to what Python's own reader reads."""

from __future__ import annotations

import csv
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from silotune.data import blocks, delimited
from silotune.data.shape import Shape
from silotune.errors import SilotuneError

HEADER = "a,b,c\n"
# What files are made of, also those that somebody broke.
pieces = st.sampled_from(
    [
        '"',
        '""',
        ",",
        "\n",
        "\r\n",
        "\r",
        "x",
        " ",
        "é",
        "\u2028",
        "\0",
        "1.0",
        '"y"',
        '"a,b"',
        '"l\nm"',
        "x,y,z\n",
    ]
)
ragged = st.lists(pieces, max_size=40).map("".join)
fields = st.text(st.sampled_from('x",\n\ré \u2028'), max_size=5)
tables = st.lists(st.tuples(fields, fields, fields), max_size=12)


def outcome(path, *, by_block: bool, size: int, strict: bool, wanted):
    """All that reading a file tells."""
    nothing = patch.object(delimited, "read_blocks", lambda *args, **options: iter(()))
    with patch.object(blocks, "SIZE", size):
        try:
            if by_block:
                table = delimited.read_csv(path, wanted, Shape(strict=strict))
            else:
                with nothing:
                    table = delimited.read_csv(path, wanted, Shape(strict=strict))
        except SilotuneError as exc:
            return (exc.code, exc.detail)
    columns = {name: list(column) for name, column in table.columns.items()}
    return list(table.rows), columns, [str(fault) for fault in table.faults.found]


def require_same(path, content: bytes, size: int) -> None:
    path.write_bytes(content)
    for strict in (False, True):
        for wanted in (None, ["b"], ["c", "a"]):
            given = {"size": size, "strict": strict, "wanted": wanted}
            assert outcome(path, by_block=True, **given) == outcome(path, by_block=False, **given)


slow = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60
)


@slow
@given(ragged, st.integers(1, 60), st.booleans())
@example('x"y,"z",1\nx,y,z\n', 8, False)
@example(",,\n" * 5, 8, True)
@example('"', 8, False)
def test_files_as_they_come_are_read_alike(tmp_path, text, size, marked):
    content = (HEADER + text).encode()
    require_same(tmp_path / "t", (b"\xef\xbb\xbf" if marked else b"") + content, size)


@slow
@given(tables, st.sampled_from(["\n", "\r\n"]), st.integers(1, 60))
def test_files_that_programs_wrote_are_read_alike(tmp_path, rows, end, size):
    lines = []

    class Lines:
        write = lines.append

    csv.writer(Lines(), lineterminator=end).writerows([["a", "b", "c"], *rows])
    require_same(tmp_path / "t", "".join(lines).encode(), size)


@pytest.mark.parametrize(
    "header",
    [
        '"a\n",b,c\n',
        "a,b,c\r",
        "a,b,c\r\n",
        "\n,,\na,b,c\n",
        '"a","b","c"\n',
        "sep=;\na;b;c\n",
        "é,b,c\n",
    ],
)
def test_headers_of_every_kind_are_read_alike(tmp_path, header):
    rows = 'x,y,z\n1.0,"n",\n'
    if header.endswith("\r"):
        rows = rows.replace("\n", "\r")
    if ";" in header:
        rows = rows.replace(",", ";")
    content = (header + rows * 20).encode()
    for size in (16, 10_000):
        (tmp_path / "t").write_bytes(content)
        found = [
            outcome(tmp_path / "t", by_block=by_block, size=size, strict=True, wanted=["b", "c"])
            for by_block in (True, False)
        ]
        assert found[0] == found[1]
        assert list(found[0][1]["b"]) == ["y", "n"] * 20


def test_bytes_that_are_no_text_are_told_alike(tmp_path):
    content = HEADER.encode() + b"x,y,z\n" * 50 + b"x,\xff,z\n" + b"x,y,z\n" * 50
    for size in (7, 64, 10_000):
        require_same(tmp_path / "t", content, size)


@pytest.mark.parametrize("size", [64, 2**20])
def test_a_well_formed_file_is_read_by_blocks_and_not_by_rows(tmp_path, size):
    """The claim above would hold for a reader that never uses blocks: this one does."""
    rows = 'x,"said ""no"", and\nleft",z\n' * 500
    (tmp_path / "t").write_text(HEADER + rows)
    read = []

    def spied(*args, **options):
        for block in blocks.read_blocks(*args, **options):
            read.append(block.rows)
            yield block

    with patch.object(delimited, "read_blocks", spied), patch.object(blocks, "SIZE", size):
        table = delimited.read_csv(tmp_path / "t", ["b"], Shape())
    assert sum(read) == len(table.rows) == 500
    assert set(table.columns["b"]) == {'said "no", and\nleft'}
