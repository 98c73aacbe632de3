"""Sites whose records are counted: patients with notes of several lengths, labels and ages."""

import csv
import random
from dataclasses import dataclass
from pathlib import Path

from silotune.data.site import SiteConfig, load_sites
from silotune.plan.plan import Plan

WARDS = ("alpha", "beta", "delta", "gamma")
AGES = (18.0, 40.0, 65.0)
SECURE = {
    "aggregation.secure": True,
    "aggregation.cohort": 4,
    "aggregation.threshold": 3,
    "privacy.noise": "shared",
}
"""Settings under which the coordinator sees the sum of the sites, with noise that they share."""

PLAN = """
[plan]
name = "counted"
purpose = "tests"
[model]
task = "statistics"
labels = ["asthma", "gout", "lupus"]
[statistics]
records_a_unit = [2, 3]
numbers = { age = { lower = 0.0, upper = 110.0, edges = [18.0, 40.0, 65.0] } }
[statistics.lengths]
edges = [4, 8, 16]
[data]
dataset = "notes"
test_share = 0.0
validation_share = 0.0
[rounds]
number = 1
min_sites = 3
deadline = 600.0
[privacy]
mode = "record"
unit = "patient"
epsilon = 1.0
delta = 1e-5
clip = 1.0
rate = 1.0
"""
SITE = """
name = "{name}"
[datasets.notes]
format = "csv"
path = "notes.csv"
unit = "patient"
max_records_per_unit = 4
declared_units = {declared}
numbers = {{ age = "years" }}
[datasets.notes.columns]
text = "note"
label = "kind"
unit = "person"
[datasets.notes.budget]
epsilon = 3.0
delta = 1e-3
"""


@dataclass(frozen=True)
class Wards:
    folder: Path
    plan: Plan
    plan_path: Path
    truth: dict

    @property
    def sites(self) -> list[SiteConfig]:
        return list(load_sites(self.folder))


def write_wards(folder, *, names=WARDS, patients=150, plan=PLAN, **settings) -> Wards:
    """Make some sites of so many patients each, and count them the plain way."""
    rng, truth = random.Random(5), {"units": 0, "labels": {}, "lengths": [0.0] * 4, "ages": []}
    for name in names:
        rows = []
        for number in range(patients):
            own = [row_of(rng, f"{name} {number}") for _ in range(rng.choice((1, 1, 1, 2, 3)))]
            count(truth, own)
            rows += own
        write_ward(folder / name, rows, declared=patients)
    path = folder / "statistics.toml"
    path.write_text(plan)
    made = Plan.load(path).override({key.replace("__", "."): v for key, v in settings.items()})
    return Wards(folder, made, path, truth)


def row_of(rng, person):
    label = rng.choices(["asthma", "gout", "lupus"], [60, 35, 5])[0]
    age = "" if rng.random() < 0.1 else f"{rng.uniform(0, 100):.1f}"
    return [" ".join(["word"] * rng.randint(1, 20)), label, person, age]


def write_ward(folder, rows, *, declared):
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "notes.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["note", "kind", "person", "years"], *rows])
    (folder / "site.toml").write_text(SITE.format(name=folder.name, declared=declared))


def count(truth, own):
    """Add a patient the plain way: each record that has something counts its part of the patient."""
    truth["units"] += 1
    for note, label, _, _ in own:
        truth["labels"][label] = truth["labels"].get(label, 0.0) + 1.0 / len(own)
        at = sum(len(note.split()) >= edge for edge in (4, 8, 16))
        truth["lengths"][at] += 1.0 / len(own)
    ages = [float(age) for _, _, _, age in own if age]
    truth["ages"] += [sum(ages) / len(ages)] if ages else []
