"""The page of a statistics run: every figure, nothing below the floor, and nothing that runs."""

import io
import json
import re
from html import unescape
from unittest.mock import patch

import pytest
from rich.console import Console

from silotune.report import report
from silotune.report.report import print_summary, summary, write_report
from silotune.simulation import run
from silotune.simulation.run import Settings
from tests.statistics_sites import SECURE, write_wards
from tests.whole_run import in_this_process

HOSTILE = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    wards = write_wards(tmp_path_factory.mktemp("wards"), patients=120)
    with patch.object(run, "WorkerGrid", in_this_process):
        made = run.simulate(
            wards.plan_path,
            runs=wards.folder / "runs",
            settings=Settings(workers=1),
            listener=lambda event: None,
            overrides={
                **SECURE,
                "plan.seed": 5,  # the noise of a label that nobody has may pass the floor
                "model.labels": ["asthma", "gout", HOSTILE],
                "plan.purpose": f"See {HOSTILE}",
            },
        )
    return made.root


@pytest.fixture(scope="module")
def page(directory):
    return write_report(directory).read_text()


def test_every_figure_that_is_told_is_on_the_page_as_it_is_on_the_terminal(directory, page):
    found, console = summary(directory), Console(width=100, record=True, file=io.StringIO())
    print_summary(directory, console)
    terminal = console.export_text()
    shares = [row["share"] for row in (*found["labels"], *found["lengths"]["bins"]) if row["share"]]
    assert len(shares) > 4
    for share in shares:
        shown = f"{share['low']:.1%} to {share['high']:.1%}"
        assert shown in page
        assert shown in terminal
    for row in found["lengths"]["quantiles"]:
        assert f"({row['low']:g} to " in page
    assert f"{found['numbers']['age']['mean']['value']:,.4g}" in page
    assert page.count("<svg") == 8


def test_what_is_not_shown_is_in_no_file_that_people_are_given(directory, page):
    found = summary(directory)
    (row,) = [row for row in found["labels"] if row["label"] == HOSTILE]
    assert row["share"] is None
    assert f"under {found['floor']:,.0f}" in page
    assert json.loads((directory / "statistics.json").read_text())["labels"] == found["labels"]


def test_what_a_plan_says_can_run_nothing_in_the_page(page):
    assert "<script" not in page
    assert HOSTILE in unescape(page)
    assert "default-src 'none'" in page
    assert not re.search(r"https?://(?!www\.w3\.org)", page)


def test_without_matplotlib_the_page_has_its_tables_and_says_how_to_get_charts(directory):
    with patch.object(report, "can_draw", lambda: False):
        page = write_report(directory).read_text()
    assert "<svg" not in page
    assert "pip install" in page
    assert "Length of a text, in words" in page


def test_a_run_that_was_stopped_before_its_figures_says_so(directory, tmp_path):
    for name in ("plan.toml", "resolved.json"):
        (tmp_path / name).write_bytes((directory / name).read_bytes())
    page = write_report(tmp_path).read_text()
    assert "Nothing was released yet." in page
    assert "not finished" in page
