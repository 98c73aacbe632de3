"""Promise 1: whether and how a site answers says nothing about what its records are like.

Pairs of datasets that differ in one record are taken through a whole run; what the coordinator can see
of the answers is compared.
"""

import csv

import numpy as np
import pytest

from silotune.client.daemon.runner import Runner
from silotune.client.model_cache import ModelCache
from silotune.client.site_run import SiteRun
from silotune.data.records import Split
from silotune.data.site import SiteConfig
from silotune.models.layout import initial_adapter
from silotune.trust.audit import AUDIT_FILE, AuditLog
from tests.federation import CHOICES, PRIVATE, write_federation

ONE = [["cough on the left", "no"]]
NOTES = [[f"gout of side {i}", "yes" if i % 2 else "no"] for i in range(30)]
PAIRS = {
    "a label that the plan asks about": (NOTES, [*NOTES, ["asthma", "perhaps"]]),
    "only other labels": ([["asthma", "perhaps"]], ONE),
    "no record at all": ([], ONE),
    "an empty text": (NOTES, [*NOTES, ["", "yes"]]),
    "a row of another length": (NOTES, [*NOTES, ["asthma"]]),
    "a side of one label": ([row for row in NOTES if row[1] == "no"], NOTES),
}
METRICS = {**PRIVATE, "privacy.metrics_share": 0.2, "rounds.evaluate_every": 1}


@pytest.fixture
def federation(tmp_path, bert_folder):
    return write_federation(tmp_path, bert_folder)


@pytest.fixture(scope="module")
def models():
    return ModelCache(CHOICES)


def part_of(federation, rows, *, models, state, told=None, **settings):
    with (federation.folder / "alpha" / "notes.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["note", "chronic"], *rows])
    settings = {**METRICS, "rounds.number": 2, "plan.seed": None, **settings}
    return SiteRun(
        SiteConfig.load(federation.folder / "alpha" / "site.toml"),
        state=federation.folder / state,
        plan=federation.plan.override(settings),
        run="r",
        models=models,
        on_records=told,
    )


def seen(part):
    """What leaves in a run: names, types and sizes of everything, and what is declared."""
    found = [described(part.join())]
    adapter = initial_adapter(part.training.trainer.layout, part.plan)
    for number in (1, 2):
        found.append(described(part.train(adapter, number)))
        found.append(described(part.evaluate(adapter, number)))
    return found


def described(reply):
    arrays = {
        (record, name): (array.dtype, array.shape, len(array.data))
        for record, group in reply.array_records.items()
        for name, array in group.items()
    }
    return arrays, {name: dict(group) for name, group in reply.config_records.items()}


@pytest.mark.parametrize("pair", PAIRS)
def test_neighbouring_datasets_give_answers_of_one_form(federation, models, pair):
    one, other = (
        seen(part_of(federation, rows, models=models, state=str(number)))
        for number, rows in enumerate(PAIRS[pair])
    )
    assert one == other


def test_no_share_of_a_plan_tells_on_which_side_the_only_unit_is(federation, models):
    """Bisecting the hash of a name: each share gives the same kind of answer."""
    sides, answers = set(), []
    for number, share in enumerate((0.05, 0.25, 0.5)):
        settings = {"data.test_share": share, "data.validation_share": 0.0}
        settings |= {"privacy.metrics_share": 0.0, "rounds.evaluate_every": 0}
        for text in ("cough on the left", "gout on the right", "lupus on the left"):
            part = part_of(
                federation, [[text, "no"]], models=models, state=f"{number} {text}", **settings
            )
            joined = described(part.join())[1]["released"]
            joined.pop("sigma"), joined.pop("rate")
            answers.append((joined, described(part.train(first_adapter(part), 1))[0]))
            sides.update(part.training.records.split.tolist())
    assert sides <= {Split.TRAIN, Split.TEST}
    assert all(answer == answers[0] for answer in answers)


def first_adapter(part):
    return initial_adapter(part.training.trainer.layout, part.plan)


def test_the_split_is_the_sites_secret_and_stays(federation, models):
    rows = [[f"note {i}", "no"] for i in range(200)]
    first = part_of(federation, rows, models=models, state="a").training.records.split
    again = part_of(federation, rows, models=models, state="a").training.records.split
    elsewhere = part_of(federation, rows, models=models, state="b").training.records.split
    assert (first == again).all()
    assert not (first == elsewhere).all()  # alike by chance: under (0.54)^200


def test_the_audit_log_tells_the_content_in_one_line_whatever_was_left_out(federation, models):
    """Its length and newest hash go to the coordinator, so neither may tell a count."""
    log = AuditLog(federation.folder / AUDIT_FILE, owner="alpha")
    runner = object.__new__(Runner)
    runner._audit = log

    class Approved:
        run, plan = "r", federation.plan

    lines = {}
    for state, rows in (("1", NOTES), ("2", [*NOTES, ["asthma", "perhaps"], ["", "no"]])):
        before = log.head.seq
        part = part_of(
            federation, rows, models=models, state="same",
            told=lambda *found: runner._read_records(Approved, *found),
        )  # fmt: skip
        content = part.training.records.content
        assert log.head.seq == before + 1
        line = list(log.lines())[-1]
        assert line.kind == "records_read"
        assert content not in str(line.fields)  # anybody could test a guess against it
        lines[state] = line.fields
    assert [lines[state]["left_out"] for state in "12"] == [0, 2]
    assert lines["1"]["records"] == lines["2"]["records"] == 30
    assert lines["1"]["content"] == lines["2"]["content"]  # what is left out was not used


def test_a_withdrawn_record_is_gone_from_memory_at_the_next_run(federation):
    models, rows = ModelCache(CHOICES), NOTES
    before = part_of(federation, rows, models=models, state="1")
    kept = before.training.trainer.frozen.features
    after = part_of(
        federation, [*rows[1:], ["lupus", "no"], ["copd", "yes"]], models=models, state="1"
    )
    found = after.training.trainer.frozen.features
    assert len(found) == len(rows) + 1  # added rows ended in an IndexError
    assert np.allclose(found[:5], kept[1:6], atol=1e-5)
    assert [len(frozen.features) for frozen in models._frozen.values()] == [len(found)]


def test_a_withdrawn_record_is_gone_from_the_disk_at_the_next_run(federation, tmp_path):
    models = ModelCache(CHOICES, shared=tmp_path / "shared")
    part_of(federation, NOTES, models=models, state="1").training.trainer.prepare()
    (old,) = (tmp_path / "shared").glob("*/*")
    again = ModelCache(CHOICES, shared=tmp_path / "shared")
    part_of(federation, NOTES[1:], models=again, state="1").training.trainer.prepare()
    (new,) = (tmp_path / "shared").glob("*/*")
    assert new.name != old.name
