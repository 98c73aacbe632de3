"""A run whose sites augment: another adapter at the same cost, and the same adapter again."""

import json

import pytest

from tests.federation import write_federation
from tests.whole_run import play

SETTINGS = {"rounds__number": 3, "optimizer__site__head_rounds": 1}
OVERRIDES = {key.replace("__", "."): value for key, value in SETTINGS.items()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, bert_folder):
    """Runs of one seeded plan: without versions, and twice with them."""
    made = write_federation(tmp_path_factory.mktemp("augmented"), bert_folder)
    found = [play(made, "plain", **OVERRIDES)]
    for site in made.sites:
        (site.folder / "synonyms.csv").write_text("left, sinister\nright, dexter\n")
        text = site.file.read_text()
        site.file.write_text(
            f'{text}[datasets.notes.augmentation]\ncopies = 2\nsynonyms = "synonyms.csv"\n'
            "replace = 0.8\n"
        )
    return [*found, play(made, "with", **OVERRIDES), play(made, "again", **OVERRIDES)]


def adapter(run):
    return run.adapter_of_round(3).read_bytes()


def test_versions_are_trained_on_and_a_seeded_run_is_repeated_bit_for_bit(runs):
    plain, found, again = map(adapter, runs)
    assert plain != found
    assert found == again


def test_the_ledger_of_each_site_has_the_same_charges(runs):
    plain, found, _ = (json.loads((run.root / "privacy.json").read_text()) for run in runs)
    for site, facts in plain["sites"].items():
        for key in ("epsilon", "sigma", "rate", "steps"):
            assert found["sites"][site][key] == facts[key]
