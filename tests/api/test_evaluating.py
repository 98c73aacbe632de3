"""`silotune.evaluate` gives the figures of the command line, as data frames."""

import json

import pandas as pd
import pytest

import silotune
from tests.api.test_python import command, here

__all__ = ["here"]


def test_figures_are_those_of_the_command_line_whatever_the_records_lie_in(here):
    words = ("--data", "labelled.csv", "--draws", "100", "--device", "cpu", "--json")
    told = json.loads(command("evaluate", "runs/small", *words))
    frame = pd.read_csv("labelled.csv").rename(columns={"text": "note"})
    asked = {"draws": 100, "device": "cpu", "progress": False}
    by_file = silotune.evaluate("runs/small", "labelled.csv", **asked)
    of_frame = silotune.evaluate(
        silotune.Run("runs/small"), frame, columns={"text": "note"}, **asked
    )
    assert json.loads(by_file.figures.model_dump_json()) == told
    for key in ("metrics", "labels", "confusion", "calibration"):  # halves follow from the file
        assert getattr(of_frame.figures, key) == getattr(by_file.figures, key)
    assert by_file.confusion().to_numpy().sum() == told["records"] == 20
    shown = by_file.labels()["recall"].to_dict()
    assert shown == {row["label"]: row["recall"]["value"] for row in told["labels"]}
    assert {"low", "high"} <= set(by_file.metrics().columns)


def test_a_page_is_written_for_its_owner_alone(here, tmp_path):
    found = silotune.evaluate(
        silotune.load("runs/small", device="cpu"), "labelled.csv", against="runs/other",
        draws=100, progress=False, device="cpu",
    )  # fmt: skip
    page = found.write(tmp_path / "out")
    assert "<html" in page.read_text()
    assert page.stat().st_mode & 0o777 == 0o600
    assert found.figures.comparison is not None


def test_a_rule_that_there_is_none_of_is_refused(here):
    with pytest.raises(ValueError, match="max-f1"):
        silotune.evaluate("runs/small", "labelled.csv", threshold="best", device="cpu")


def test_what_a_site_says_itself_is_not_said_beside_it(here):
    for beside in ({"unit": "patient"}, {"columns": {"text": "note"}}, {"label_separator": ";"}):
        with pytest.raises(ValueError, match="how it is read"):
            silotune.evaluate("runs/small", site="hospitals/alpha", **beside)
