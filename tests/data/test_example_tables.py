"""The letters of examples/records/tables are the same to a plan, whatever the format."""

from __future__ import annotations

from collections import Counter
from typing import get_args

import pytest
from typer.testing import CliRunner

from silotune.cli import app
from silotune.data.roles import read_roles
from silotune.data.site import Format, SiteConfig
from tests.data.example_tables import FOLDER
from tests.data.written import FIXED

SITE = SiteConfig.load(FOLDER / "site.toml")


def read(name):
    dataset = SITE.dataset(name)
    return read_roles(dataset, folder=SITE.folder, roles=dataset.columns.by_role())


def test_every_format_of_tables_has_an_example():
    assert {d.format for d in SITE.datasets.values()} == set(get_args(Format)) - FIXED


@pytest.mark.parametrize("name", SITE.datasets)
def test_an_example_has_the_letters_of_the_others(name):
    one, other = read("csv").columns, read(name).columns
    rows = [sorted(zip(*columns.values(), strict=True)) for columns in (one, other)]
    assert rows[0] == rows[1]
    assert Counter(other["label"]) == {"acute": 11, "chronic": 12}
    assert any(text.startswith("Letter, 35.5: Menière's disease, stable") for text in other["text"])
    assert other["unit"].count("") == 1
    assert set(other["unit"]) == {"", *map(str, range(1000, 1008))}


@pytest.mark.parametrize("name", SITE.datasets)
def test_data_check_tells_of_an_example_what_it_tells_of_the_others(name, tmp_path):
    argv = ["data", "check", str(FOLDER / "site.toml"), "--dataset", name, "--json"]
    shown = CliRunner().invoke(app, argv)
    assert '"records": 22' in shown.output
    assert "Meni" not in shown.output
