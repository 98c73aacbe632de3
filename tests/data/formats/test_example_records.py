"""The records of examples/records, in the formats of hospitals and banks, by their own site.toml."""

from collections import Counter
from pathlib import Path

import pytest

from silotune.data.roles import read_roles
from silotune.data.site import SiteConfig

SITE = SiteConfig.load(Path(__file__).parents[3] / "examples" / "records" / "site.toml")


@pytest.mark.parametrize(
    ("name", "labels", "units", "text"),
    [
        ("note-types", {"progress": 8, "discharge": 4}, 6,
         "Visit\nFollow-up of asthma, inhaler twice a day."),
        ("notes", {"chronic": 6, "acute": 6}, 6, "Gout of the left toe, third attack this year."),
        ("reports", {"normal": 6, "abnormal": 6}, 6, "Chest: no change, image 2."),
        ("challenge", {"chronic": 6, "acute": 6}, 6, "Gout of the left toe, third attack this year."),
        ("camt", {"groceries": 6, "rent": 6}, 3, "Rent Lindenstr 4 March -812.50 EUR"),
        ("ofx", {"groceries": 6, "rent": 6}, 3, "Rent Lindenstr 4 March"),
    ],
)  # fmt: skip
def test_each_example_gives_its_texts_labels_and_units(name, labels, units, text):
    dataset = SITE.dataset(name)
    columns = read_roles(dataset, folder=SITE.folder, roles=dataset.columns.by_role()).columns
    assert Counter(columns["label"]) == labels
    assert len(set(columns["unit"])) == units == dataset.declared_units
    assert text in columns["text"]


def test_the_conditions_of_the_notes_agree_with_the_challenge_made_of_them():
    found = []
    for name in ("notes", "challenge"):
        dataset = SITE.dataset(name)
        columns = read_roles(dataset, folder=SITE.folder, roles=dataset.columns.by_role()).columns
        texts = [text.removeprefix("Visit\n") for text in columns["text"]]
        found.append(dict(zip(texts, columns["label"], strict=True)))
    assert found[0] == found[1]
