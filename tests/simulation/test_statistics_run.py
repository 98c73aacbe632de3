"""Runs of statistics: the figures against the truth, what they cost, and crashes between the two."""

import json
import math
from unittest.mock import patch

import numpy as np
import pytest

from silotune.errors import PlanInvalid, QuorumLost, RunDirectoryInvalid
from silotune.privacy import certificate
from silotune.privacy.ledger import Ledger
from silotune.report.statistics import read
from silotune.rounds import estimates
from silotune.rounds.secure_rounds import SecureRounds, SecureSum
from silotune.rounds.trained import find_trained
from silotune.simulation import run
from silotune.simulation.attack import attack
from silotune.simulation.run import Settings
from tests.statistics_sites import SECURE, WARDS, write_wards
from tests.whole_run import go_on, in_this_process

FAR = 7.0
"""Deviations of the noise that a figure is from the truth at most: false alarms, 3e-12 a figure."""


@pytest.fixture(scope="module")
def wards(tmp_path_factory):
    return write_wards(tmp_path_factory.mktemp("wards"))


def counted(wards, name, **overrides):
    with patch.object(run, "WorkerGrid", in_this_process):
        return run.simulate(
            wards.plan_path,
            runs=wards.folder / name,
            settings=Settings(workers=1),
            listener=lambda event: None,
            overrides=overrides,
        )


@pytest.fixture(scope="module")
def together(wards):
    """Under secure aggregation, with noise that the sites share."""
    return counted(wards, "together", **SECURE)


@pytest.fixture(scope="module")
def apart(wards):
    """Each site's own sums, each with all of the noise."""
    return counted(wards, "apart")


@pytest.mark.parametrize("kind", ["together", "apart"])
def test_the_figures_are_the_truth_but_for_the_noise_that_they_state(kind, wards, request):
    found = read(request.getfixturevalue(kind).root / "statistics.json")
    noise, units = found["noise"], wards.truth["units"]
    assert abs(found["units"]["value"] - units) < FAR * noise
    assert found["units"]["high"] - found["units"]["low"] == pytest.approx(
        2 * 1.95996 * noise, rel=1e-3
    )
    for row in found["labels"]:
        true = wards.truth["labels"][row["label"]]
        if true > found["floor"] + FAR * noise:
            assert row["share"]["value"] * units == pytest.approx(true, abs=2 * FAR * noise)
    for row, true in zip(found["lengths"]["bins"], wards.truth["lengths"], strict=True):
        assert (row["share"] or {"value": 0.0})["value"] * units == pytest.approx(
            true, abs=2 * FAR * noise + found["floor"]
        )
    ages = wards.truth["ages"]
    error = 110.0 / 2.0 * math.sqrt(2.0) * noise * math.sqrt(2.0) / len(ages)
    mean = found["numbers"]["age"]["mean"]
    assert mean["value"] == pytest.approx(sum(ages) / len(ages), abs=FAR * error)


def test_shared_noise_is_that_of_counting_pooled_records(together, apart):
    """Four sites of which three suffice: 4/3 of one site's variance, not four times."""
    one, four = read(together.root / "statistics.json"), read(apart.root / "statistics.json")
    assert (four["noise"] / one["noise"]) ** 2 == pytest.approx(3.0)


def test_the_run_costs_what_the_plan_allows_and_the_books_say_so(together, wards):
    privacy = together.read_json("privacy.json")
    assert privacy["private"] is True
    for name in WARDS:
        body = certificate.verify(together.site(name) / "certificate.json").body
        assert 0.99 < body.epsilon <= 1.0
        assert body.model_sha256 is None
        assert privacy["sites"][name]["epsilon"] == body.epsilon
        events = Ledger(together.site(name) / "ledger.sqlite", create=False).events("notes")
        assert len(events) == 1


def test_a_statistics_run_leaves_its_figures_and_no_bare_sums(together):
    assert not list((together.root / "adapters").iterdir())
    (told,) = [event for event in together.events if event["event"] == "statistics"]
    found = read(together.root / "statistics.json")
    assert found == {"run": together.name, **told["found"]}
    assert found["sites"] == {name: {"declared_units": 150} for name in WARDS}


def test_a_seeded_run_gives_the_same_figures_again_and_says_that_it_is_not_private(wards):
    one, other = (
        read(counted(wards, name, **SECURE, **{"plan.seed": 3}).root / "statistics.json")
        for name in ("seeded", "again")
    )
    assert one["private"] is False
    assert {**one, "run": ""} == {**other, "run": ""}


def test_a_site_that_refuses_is_not_in_the_sum_and_the_figures_say_so(tmp_path):
    wards = write_wards(tmp_path, patients=100)
    config = tmp_path / "gamma" / "site.toml"
    config.write_text(config.read_text().replace('numbers = { age = "years" }', ""))
    directory = counted(wards, "three", **SECURE)
    found = read(directory.root / "statistics.json")
    assert set(found["sites"]) == {"alpha", "beta", "delta"}
    assert found["units"]["value"] == pytest.approx(300, abs=FAR * found["noise"])
    four = counted(write_wards(tmp_path / "all", patients=100), "four", **SECURE)
    with_all = read(four.root / "statistics.json")["noise"]
    # Of three sites of which three suffice, all noise is needed; a fourth site's share is on top.
    assert (with_all / found["noise"]) ** 2 == pytest.approx(4.0 / 3.0)


def test_a_round_that_comes_to_nothing_is_no_figure_of_nobody(wards):
    void = SecureSum(codes=("ST-604",))
    nothing = patch.object(SecureRounds, "round", lambda *args, **words: void)
    with nothing, pytest.raises(QuorumLost, match="came to nothing"):
        counted(wards, "void", **SECURE)
    (path,) = (wards.folder / "void").iterdir()
    assert not (path / "statistics.json").exists()


def test_what_is_for_adapters_says_that_there_is_none(together, wards):
    with pytest.raises(RunDirectoryInvalid, match="trained nothing"):
        attack(together, settings=Settings(workers=1), say=print)
    with pytest.raises(RunDirectoryInvalid, match="trained nothing"):
        find_trained(together.root)
    with pytest.raises(PlanInvalid, match="trains nothing"):
        run.simulate(
            wards.plan_path,
            runs=wards.folder / "never",
            settings=Settings(baselines=True),
            listener=lambda event: None,
        )
    assert not (wards.folder / "never").exists()


def test_a_file_of_another_format_is_not_taken_for_statistics(together, tmp_path):
    path = tmp_path / "statistics.json"
    for content in ("{", "[]", json.dumps({"format": "silotune statistics 2"})):
        path.write_text(content)
        with pytest.raises(RunDirectoryInvalid):
            read(path)


def test_a_run_that_dies_before_its_figures_are_told_tells_the_very_same_later(wards):
    seen, real = [], estimates.find

    def dies(*args, **words):
        seen.append(real(*args, **words))
        raise KeyboardInterrupt

    with patch.object(estimates, "find", dies), pytest.raises(KeyboardInterrupt):
        counted(wards, "dies", **SECURE)
    (path,) = (wards.folder / "dies").iterdir()
    found = read(go_on(path).root / "statistics.json")
    assert {key: found[key] for key in seen[0]} == seen[0]
    for name in WARDS:
        assert (
            len(Ledger(path / "sites" / name / "ledger.sqlite", create=False).events("notes")) == 1
        )


def test_sums_are_counted_in_units_whatever_the_scale_of_the_parts(together):
    """Three parts that all sum to the number of units agree on it."""
    found = read(together.root / "statistics.json")
    units, noise = found["units"]["value"], found["noise"]
    for bins in (found["lengths"]["bins"], found["records_a_unit"]["bins"]):
        shown = [row["share"]["value"] for row in bins if row["share"]]
        assert sum(shown) == pytest.approx(
            1.0, abs=FAR * 2.5 * noise / units + 3 * found["floor"] / units
        )
        assert np.all(np.array(shown) > 0)
