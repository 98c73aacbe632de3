"""Promise 1 for statistics: every field is public or charged, and no record decides what is answered."""

import numpy as np
import pytest
from flwr.supercore.task_identity import TaskIdentity

from silotune.client.errors import TaskRefused
from silotune.client.model_cache import ModelCache
from silotune.client.site_run import SiteRun
from silotune.client.troubles import latest_troubles
from silotune.data.records import load_records
from silotune.data.site import SiteConfig
from silotune.data.statistics import site_sums
from silotune.errors import BudgetExceeded, CalibrationImpossible, ColumnMissing
from silotune.models.layout import initial_adapter, statistics_layout
from silotune.privacy.accounting import epsilon
from tests.promises.site_messages import ask
from tests.statistics_sites import write_ward, write_wards

ORDINARY = [[f"a note of patient {n}", "asthma", f"p{n}", "40"] for n in range(30)]
ODD = {
    "no record at all": [],
    "an age of no number": [*ORDINARY, ["x", "gout", "odd", "a lot"]],
    "an infinite age": [*ORDINARY, ["x", "gout", "odd", "-inf"]],
    "an age beyond every number": [*ORDINARY, ["x", "gout", "odd", "1e99999"]],
    "digits of another script": [*ORDINARY, ["x", "gout", "odd", "٤٢"]],
    "a label that the plan lacks": [*ORDINARY, ["x", "scurvy", "odd", "40"]],
    "a patient with a thousand notes": [*ORDINARY, *[["x", "gout", "odd", "40"]] * 1_000],
    "a note of a million words": [*ORDINARY, ["w " * 1_000_000, "gout", "odd", "40"]],
    "a row of another length": [*ORDINARY, ["x", "gout"]],
    "control characters": [*ORDINARY, ["\x00\x1b[31m", "gout", "\u202e", "\x00"]],
    "one record only": ORDINARY[:1],
}


@pytest.fixture
def wards(tmp_path):
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1
    return write_wards(tmp_path, names=("alpha",), patients=2, rounds__min_sites=1)


def part_of(wards, rows=ORDINARY, *, state="s", plan=None, declared=30):
    write_ward(wards.folder / "alpha", rows, declared=declared)
    return SiteRun(
        SiteConfig.load(wards.folder / "alpha" / "site.toml"),
        state=wards.folder / state,
        plan=plan or wards.plan,
        run="r",
        models=ModelCache(),
    )


def answers(part):
    """Everything that leaves in a run, but for the noisy numbers themselves."""
    joined = dict(ask(part, "query.join")["released"])
    start = initial_adapter(part.layout, part.plan)
    reply = ask(part, "train", 1, start)
    array = reply["update"]["flat"]
    assert set(reply) == {"update", "released"}
    assert np.isfinite(array.numpy()).all()
    return joined, dict(reply["released"]), (array.dtype, array.shape, len(array.data))


@pytest.mark.parametrize("kind", ODD)
def test_whatever_the_records_are_the_answers_have_one_form(wards, kind):
    assert answers(part_of(wards, ODD[kind], state="odd")) == answers(part_of(wards, state="plain"))


def test_every_field_is_public_or_charged_before_it_leaves(wards):
    part = part_of(wards)
    joined = ask(part, "query.join")["released"]
    assert set(joined) == {"site", "declared_units", "layout", "rate", "sigma", "dtype"}
    assert part.ledger.events("notes") == []
    ask(part, "train", 1, initial_adapter(part.layout, part.plan))
    charged = part.ledger.events("notes")
    assert len(charged) == 1
    total = epsilon(charged, delta=1e-5)
    assert 0.99 < total <= 1.0
    again = ask(part, "train", 1, initial_adapter(part.layout, part.plan))
    assert part.ledger.events("notes") == charged
    assert again["update"]["flat"].shape == (statistics_layout(part.plan).size,)


def test_what_leaves_has_noise_on_every_number(wards):
    """Equal to the bare sum to a tenth of the noise: less than once in ten numbers, 1e-9 in all 17."""
    part = part_of(wards)
    ask(part, "query.join")
    sent = ask(part, "train", 1, initial_adapter(part.layout, part.plan))["update"]["flat"].numpy()
    records = load_records(part.site, part.plan, roles=part.plan.roles, secret=b"s" * 32)
    bare = site_sums(records, part.plan)
    off = np.abs(sent - bare) / part.sigma
    assert sent.size == 17
    assert (off > 0.1).sum() >= 5
    assert off.max() < 8.0


def test_a_failure_over_the_records_gives_noise_alone_and_a_word_to_the_sites_own_people(
    wards, monkeypatch
):
    def fails(*args, **words):
        raise MemoryError("of a record")

    monkeypatch.setattr("silotune.data.statistics._PartCounter.part", fails)
    part = part_of(wards)
    _, released, form = answers(part)
    assert form[1] == (17,)
    (trouble,) = latest_troubles(wards.folder / "s")
    assert trouble["kind"] == "blank"
    assert released == {}


def test_a_plan_over_the_budget_is_refused_before_a_record_is_read(wards):
    part = part_of(wards, plan=wards.plan.override({"privacy.epsilon": 3.5}))
    (wards.folder / "alpha" / "notes.csv").unlink()
    with pytest.raises(BudgetExceeded):
        ask(part, "query.join")


def test_a_number_that_the_site_does_not_offer_is_refused_by_its_declaration(wards):
    other = wards.plan.override({"statistics.numbers.sodium": {"lower": 0.0, "upper": 9.0}})
    with pytest.raises(ColumnMissing, match="statistics of sodium"):
        ask(part_of(wards, plan=other), "query.join")


def test_a_site_that_declares_more_units_than_the_sum_has_room_for_says_so_first(wards):
    with pytest.raises(CalibrationImpossible, match="2000000 units"):
        ask(part_of(wards, declared=2_000_000), "query.join")


def test_a_site_whose_policy_does_not_name_the_task_refuses_it(wards):
    with (wards.folder / "alpha" / "site.toml").open() as file:
        text = file.read()
    write_ward(wards.folder / "alpha", ORDINARY, declared=30)
    path = wards.folder / "alpha" / "site.toml"
    clauses = """
[policy]
max_epsilon = 2.0
max_total_epsilon = 3.0
max_delta = 1e-3
require_secure_aggregation = false
min_cohort = 1
tasks = [{tasks}]
max_rounds = 1
max_upload_mb = 0.1
hours = ["Mon-Sun 00:00-24:00"]
"""
    for tasks, refused in (('"text_classification"', True), ('"statistics"', False)):
        path.write_text(text + clauses.format(tasks=tasks))
        part = SiteRun(
            SiteConfig.load(path),
            state=wards.folder / tasks.strip('"'),
            plan=wards.plan,
            run="r",
            models=ModelCache(),
        )
        if refused:
            with pytest.raises(TaskRefused):
                part.admit()
        else:
            part.admit()  # no model, module or strategy is listed, and none takes part
