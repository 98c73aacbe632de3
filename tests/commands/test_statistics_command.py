"""`silotune simulate statistics.toml` on the demo: what people and scripts get, against the truth."""

import csv
import json
import re
from collections import Counter

import pytest

from silotune.rounds.estimates import QUANTILES
from tests.e2e.harness import cli

FAR = 7.0  # deviations of the noise; a figure is further from the truth once in 3e11
EDGES = (4, 6, 8, 10, 12, 16, 24)


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "hospitals"
    cli("demo", "hospitals", folder)
    return folder


@pytest.fixture(scope="module")
def counted(hospitals):
    """At epsilon = 1, by the command line."""
    runs = hospitals.parent / "runs"
    return json.loads(
        cli("simulate", hospitals / "statistics.toml", "--runs", runs, "--json").stdout
    )


@pytest.fixture(scope="module")
def truth(hospitals):
    """Counted by the standard library from the files."""
    labels, lengths = Counter(), []
    for path in hospitals.glob("*/records.csv"):
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                labels[row["course"]] += 1
                lengths.append(len(row["description"].split()))
    return labels, sorted(lengths)


@pytest.mark.slow
def test_at_epsilon_1_every_figure_is_the_truth_but_for_its_noise(counted, truth):
    labels, lengths = truth
    noise, units = counted["noise"], len(lengths)
    assert counted["epsilon"] == 1.0
    assert noise < 10.0
    assert counted["units"]["value"] == pytest.approx(units, abs=FAR * noise)
    for row in counted["labels"]:
        true = labels[row["label"]] / units
        assert row["share"]["value"] == pytest.approx(true, abs=2 * FAR * noise / units)
    for row in counted["lengths"]["bins"]:
        last = row["to"] if row["to"] is not None else 1e9
        true = sum(row["from"] <= length <= last for length in lengths)
        if row["share"] is None:
            assert true < counted["floor"] + FAR * noise
        else:
            assert row["share"]["value"] * units == pytest.approx(true, abs=2 * FAR * noise)


@pytest.mark.slow
def test_every_quantile_lies_in_the_group_that_the_truth_is_in(counted, truth):
    """The groups hold hundreds of texts, the noise some ten: none is near enough to be missed."""
    _, lengths = truth
    found = {row["q"]: row for row in counted["lengths"]["quantiles"]}
    assert set(found) == set(QUANTILES)
    for q, row in found.items():
        true = lengths[int(q * len(lengths))]
        assert row["low"] <= true <= (row["high"] if row["high"] is not None else 1e9)


@pytest.mark.slow
def test_a_terminal_gets_tables_the_page_and_what_a_person_reads_first(hospitals, counted):
    runs = hospitals.parent / "runs"
    (directory,) = runs.iterdir()
    page = (directory / "report.html").read_text()
    assert "Length of a text, in words" in page
    assert page.count("<svg") == 4  # two histograms, for a laptop and a phone
    assert "What this means for a plan" in page
    assert not re.search(r"<script|https?://(?!www\.w3\.org)", page)
    said = cli("plan", "check", hospitals / "statistics.toml").stdout
    assert "how often each label occurs (acute, chronic)" in " ".join(said.split())
    assert "no model takes part" in said
    checked = json.loads(cli("plan", "check", hospitals / "statistics.toml", "--json").stdout)
    assert checked["noise_of_a_count"] == pytest.approx(counted["noise"])  # all seven took part
    again = json.loads(cli("report", directory, "--json").stdout)
    assert again["units"] == counted["units"]
    assert json.loads((directory / "statistics.json").read_text()) == again


@pytest.mark.slow
def test_a_terminal_shows_every_figure_and_nothing_of_small_groups(hospitals):
    words = ("--set", "privacy.epsilon=0.5", "--set", "statistics.floor=2000")
    runs = hospitals.parent / "other"
    said = cli("simulate", hospitals / "statistics.toml", "--runs", runs, *words).stdout
    flat = " ".join(said.split())
    assert re.search(r"acute +50\.\d%", said)
    assert "under 2,000" in said
    assert re.search(r"7 sites have about 22,\d{3} records together", flat)
    assert "ε = 0.50 at δ = 1e-6; a group is shown from 2,000 records on." in flat
