"""Promises 1 and 3 for votes: charged before a record is read, one form of answer, the site decides."""

import csv

import numpy as np
import pytest
from flwr.supercore.task_identity import TaskIdentity

from silotune.client.errors import TaskRefused
from silotune.client.model_cache import LocalTraining, ModelCache
from silotune.client.site_run import SiteRun
from silotune.client.training.base import Trained
from silotune.client.troubles import latest_troubles
from silotune.data.site import SiteConfig
from silotune.errors import BudgetExceeded
from silotune.models.layout import initial_adapter
from silotune.plan.voted import blocks_at
from silotune.privacy.accounting import epsilon
from tests.federation import CHOICES, write_policy
from tests.promises.site_messages import ask
from tests.vote_sites import write_voters

BARE = {"aggregation.secure": None}
POISON = "x"


@pytest.fixture
def voters(tmp_path, bert_folder):
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1
    made, _, plan = write_voters(tmp_path, bert_folder, settings=BARE, vote__units=60)
    return made.folder, plan, bert_folder


def part_of(voters, *, state="s", plan=None, config=None):
    folder, own, _ = voters
    return SiteRun(
        SiteConfig.load(config or folder / "alpha" / "site.toml"),
        state=folder / state,
        plan=plan or own,
        run="r",
        models=ModelCache(CHOICES),
    )


def voted(part):
    ask(part, "query.join")
    reply = ask(part, "train", 1, initial_adapter(part.layout, part.plan))
    array = reply["update"]["flat"]
    assert set(reply) == {"update", "released"}
    assert np.isfinite(array.numpy()).all()
    return dict(reply["released"]), (array.dtype, array.shape, len(array.data))


def test_it_is_charged_before_a_record_is_touched_and_once_only(voters, monkeypatch):
    part, real, seen = part_of(voters), LocalTraining._voted, []

    def look(self):
        seen.append(len(part.ledger.events("notes")))
        return real(self)

    monkeypatch.setattr(LocalTraining, "_voted", look)
    voted(part)
    assert seen == [1]
    charged = part.ledger.events("notes")
    assert 0.99 * 4.0 < epsilon(charged, delta=1e-4) <= 4.0
    voted(part)  # asked again: the first answer, and no other look
    assert seen == [1]
    assert part.ledger.events("notes") == charged


def test_whatever_the_records_are_the_answer_has_one_form(voters):
    plain = voted(part_of(voters, state="plain"))
    path = voters[0] / "alpha" / "notes.csv"
    with path.open(newline="") as file:
        head, *rows = list(csv.reader(file))
    for number, odd in enumerate(([], rows[:1], [*rows, ["\x00", "yes", "p"], ["", "", ""]])):
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([head, *odd])
        assert voted(part_of(voters, state=f"odd{number}")) == plain


def test_a_vote_that_fails_altogether_is_noise_alone_and_the_sites_people_are_told(
    voters, monkeypatch
):
    def fails(self):
        raise MemoryError("of a record")

    monkeypatch.setattr(LocalTraining, "_voted", fails)
    _, form = voted(part_of(voters))
    assert form[1] == (3,)
    (trouble,) = latest_troubles(voters[0] / "s")
    assert trouble["kind"] == "blank"


def test_no_trainer_gives_more_votes_than_there_are_blocks(voters, monkeypatch):
    """Whatever one says that was taken over. False alarms, of noise beyond 9 deviations: under 1e-17."""
    lie = np.array([1e30, -1e30, 0.0])
    monkeypatch.setattr(LocalTraining, "_voted", lambda self: Trained(flat=lie, kept={}, records=1))
    part = part_of(voters)
    blocks = blocks_at(part.plan, part.dataset.declared_units)
    ask(part, "query.join")
    reply = ask(part, "train", 1, initial_adapter(part.layout, part.plan))
    found = reply["update"]["flat"].numpy()
    assert np.abs(found).max() < blocks + 9 * part.sigma


def test_a_vote_over_the_budget_is_refused_before_a_record_is_read(voters):
    part = part_of(voters, plan=voters[1].override({"privacy.epsilon": 9.5}))
    (voters[0] / "alpha" / "notes.csv").unlink()
    with pytest.raises(BudgetExceeded):
        ask(part, "query.join")


def test_a_site_takes_part_in_votes_only_if_its_policy_says_votes(voters):
    folder, own, base = voters
    for tasks, refused in (
        (["text_classification"], True),
        (["text_classification", "votes"], False),
    ):
        copy = folder / f"copy-{refused}" / "site.toml"
        copy.parent.mkdir()
        text = (folder / "alpha" / "site.toml").read_text()
        copy.write_text(text)
        (copy.parent / "notes.csv").write_bytes((folder / "alpha" / "notes.csv").read_bytes())
        sha256 = write_policy(copy, base, tasks=tasks)
        pinned = own.override({"model.sha256": sha256})
        part = part_of(voters, plan=pinned, config=copy, state=f"policy-{refused}")
        if refused:
            with pytest.raises(TaskRefused, match="votes"):
                part.admit()
        else:
            part.admit()
