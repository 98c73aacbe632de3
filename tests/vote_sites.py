"""A small federation whose sites vote on settings of a plan for a head."""

import json
import tomllib

from silotune.data.site import load_sites
from silotune.plan.plan import Plan
from silotune.plan.voted import vote_tables
from tests import federation
from tests.federation import write_federation

CANDIDATES = (
    {"optimizer.site.head_lr": 0.3},
    {"optimizer.site.head_lr": 1e-6},
    {"optimizer.site.head_lr": 0.1, "rounds.number": 3},
)
"""The second learns nothing."""

SECURE = {
    "aggregation.secure": True,
    "aggregation.cohort": 3,
    "aggregation.threshold": 3,
    "privacy.noise": "shared",
}
PRIVATE = {**federation.PRIVATE, "rounds.evaluate_every": 0}


TRAINED = """
[plan]
name = "small"
purpose = "tests"
[model]
base = "some/model"
task = "text_classification"
labels = ["no", "yes"]
[lora]
r = 2
[data]
dataset = "notes"
[rounds]
number = 6
min_sites = 3
[optimizer.site]
head_rounds = 4
[privacy]
mode = "record"
epsilon = 8.0
delta = 1e-4
clip = 1.0
rate = 0.2
"""


def trained(**changes):
    return Plan.from_mapping(tomllib.loads(TRAINED)).override({**PRIVATE, **SECURE, **changes})


def voting(plan, *, candidates=CANDIDATES, epsilon=4.0, units=230, block_units=10, **changes):
    """A vote on a plan's settings; `changes` are of the vote, by dotted keys with ``__``."""
    tables = vote_tables(plan, candidates, epsilon=epsilon, units=units, block_units=block_units)
    made = Plan.from_mapping(tables)
    return made.override({key.replace("__", "."): value for key, value in changes.items()})


def write_voters(folder, base, *, settings=SECURE, seed=None, patients=False, **changes):
    """Sites on disk, the plan that is voted on, and the vote; the federation has the vote's plan."""
    made = write_federation(folder, base, patients=patients)
    trained = made.plan.override({**PRIVATE, **settings, "plan.seed": seed})
    return made, trained, voting(trained, **changes)


def sites_of(made):
    return list(load_sites(made.folder))


def as_json(plan):
    return json.loads(plan.canonical())
