"""The verdict's words never say more than the numbers."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_run import Synthetic

from silotune.simulation.figures import summarise
from silotune.simulation.run_record import read_record
from silotune.simulation.verdict import verdict


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return summarise(read_record(Synthetic().write(tmp_path_factory.mktemp("run"))))


def with_scores(found, **scores):
    """The summary with these test scores, and gains to match."""
    rows = []
    for row in found.methods:
        test = {**row.test, "macro_f1": scores.get(row.key, row.test["macro_f1"])}
        rows.append(replace(row, test=test))
    probe = next(r.test["macro_f1"] for r in rows if r.key == "probe_federated")
    rows = [replace(row, gain_over_probe=row.test["macro_f1"] - probe) for row in rows]
    return replace(found, methods=tuple(rows))


SCORES = st.integers(0, 1000).map(lambda n: n / 1000)


@settings(deadline=None)  # other processes share this machine
@given(federated=SCORES, own=SCORES, probe=SCORES)
def test_better_and_worse_are_said_of_the_right_side(found, federated, own, probe):
    text = " ".join(
        verdict(with_scores(found, federated=federated, own=own, probe_federated=probe))
    )
    gap = f"{abs(federated - own):.3f}"
    against = {
        federated > own: f"{gap} better than a site's own data",
        federated < own: f"{gap} worse than a site's own data",
        federated == own: "level with a site's own data",
    }[True]
    assert against in text
    assert ("LoRA beats the head-only probe" in text) == (federated > probe)
    assert ("LoRA did not beat the head-only probe" in text) == (federated <= probe)
    # Two binomial standard errors, by the formula of any textbook.
    n, accuracy = sum(row.n for row in found.by_site), found.method("federated").test["accuracy"]
    luck = 2 * (accuracy * (1 - accuracy) / n) ** 0.5
    assert ("which may be chance" in text) == (0 < federated - probe < luck)


def test_no_site_that_loses_is_said_only_when_none_does(found):
    assert any("worse than the own model at 2 of 7 sites" in s for s in verdict(found))
    winning = tuple(replace(row, gain=0.1) for row in found.by_site)
    text = " ".join(verdict(replace(found, by_site=winning, sites_worse=())))
    assert "no site of 7 is better off with its own model" in text


def test_privacy_is_claimed_only_where_it_is_given(found):
    assert verdict(found)[-1].startswith("Privacy: ε = 7.98 at δ = 1e-5 for each record")
    seeded = replace(found.privacy, private=False, statement="seeded: not private")
    assert verdict(replace(found, privacy=seeded))[-1].startswith("Not private (seeded")
    none = replace(found.privacy, private=False, budget=None)
    assert verdict(replace(found, privacy=none))[-1] == "The run gives no differential privacy."
