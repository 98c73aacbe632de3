"""Promise 1 at the ClientApp: every field of every reply is public or charged before it leaves."""

import math

import numpy as np
import pytest
from flwr.supercore.task_identity import TaskIdentity

from silotune.errors import BudgetExceeded, PlanInvalid
from silotune.models.layout import initial_adapter
from silotune.privacy.accounting import epsilon
from tests.federation import PRIVATE, write_federation
from tests.promises.site_messages import ask

SETTINGS = {
    **{key.replace(".", "__"): value for key, value in PRIVATE.items()},
    "privacy__metrics_share": 0.1,
}
PUBLIC = {"site", "declared_units", "layout", "rate", "sigma", "dtype"}


@pytest.fixture
def federation(tmp_path, bert_folder):
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1
    return write_federation(tmp_path, bert_folder, **SETTINGS)


def test_every_field_of_every_message_is_public_or_charged(federation):
    run = federation.runs()[0]
    plan, ledger = federation.plan, run.ledger
    joined = ask(run, "query.join")
    assert set(joined) == {"released"}
    assert set(joined["released"]) == PUBLIC
    assert ledger.events("notes") == []
    adapter = initial_adapter(run.training.trainer.layout, plan)
    charged = 0
    for number in range(1, plan.rounds.number + 1):
        reply = ask(run, "train", number, adapter)
        assert set(reply) == {"update", "released"}
        assert list(reply["update"]) == ["flat"]
        assert dict(reply["released"]) == {}
        charged += 1
        assert len(ledger.events("notes")) == charged
        if number % plan.rounds.evaluate_every == 0:
            measured = ask(run, "evaluate", number, adapter)
            assert set(measured) == {"counts", "released"}
            assert dict(measured["released"]) == {}
            charged += 1
            assert len(ledger.events("notes")) == charged
    total = epsilon(ledger.events("notes"), delta=plan.privacy.delta)
    assert total <= plan.privacy.epsilon
    assert total == pytest.approx(plan.privacy.epsilon, rel=2e-3)


def test_a_repeated_message_gets_the_same_bytes_and_no_charge(federation):
    run = federation.runs()[0]
    ask(run, "query.join")
    adapter = initial_adapter(run.training.trainer.layout, federation.plan)
    first = ask(run, "train", 3, adapter)["update"]["flat"].numpy()
    spent = run.ledger.events("notes")
    used = run.training.trainer.records_used
    # A restarted site has the same answer too.
    for site in (run, federation.runs()[0]):
        again = ask(site, "train", 3, adapter + 1)["update"]["flat"].numpy()
        assert again.tobytes() == first.tobytes()
    assert run.ledger.events("notes") == spent
    assert run.training.trainer.records_used == used


def test_the_noisy_counts_are_not_the_counts(federation):
    run = federation.runs()[0]
    ask(run, "query.join")
    adapter = initial_adapter(run.training.trainer.layout, federation.plan)
    released = ask(run, "evaluate", 2, adapter)["counts"]["flat"].numpy()
    assert released.shape == (2, 2)
    assert not np.allclose(released, np.round(released), atol=1e-3)


def test_without_privacy_the_same_messages_leave_and_nothing_is_charged(tmp_path, bert_folder):
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1
    run = write_federation(tmp_path, bert_folder).runs()[0]
    assert set(ask(run, "query.join")["released"]) == PUBLIC - {"sigma"}
    adapter = initial_adapter(run.training.trainer.layout, run.plan)
    assert set(ask(run, "train", 1, adapter)) == {"update", "released"}
    counts = ask(run, "evaluate", 2, adapter)["counts"]["flat"].numpy()
    assert counts.sum() == math.floor(counts.sum())
    assert run.ledger is None


def test_a_plan_over_the_sites_budget_never_gets_to_train(federation):
    plan = federation.plan.override({"privacy.epsilon": 9.5})
    run = federation.runs(plan)[0]
    with pytest.raises(BudgetExceeded, match=r"asked 9\.49"):
        ask(run, "query.join")
    assert run.ledger.events("notes") == []


def test_a_site_without_a_budget_refuses_every_private_plan(federation):
    config = federation.folder / "alpha" / "site.toml"
    config.write_text(config.read_text().split("[datasets.notes.budget]")[0])
    with pytest.raises(BudgetExceeded, match="no budget"):
        ask(federation.runs()[0], "query.join")


def test_training_without_joining_first_releases_nothing(federation):
    run = federation.runs()[0]
    adapter = initial_adapter(run.training.trainer.layout, federation.plan)
    with pytest.raises(Exception, match="reserved"):
        ask(run, "train", 1, adapter)
    assert run.ledger.events("notes") == []


@pytest.mark.parametrize("number", [None, 0, -1])
def test_a_message_without_a_sound_round_number_is_refused(federation, number):
    run = federation.runs()[0]
    adapter = initial_adapter(run.training.trainer.layout, federation.plan)
    with pytest.raises(PlanInvalid, match="round"):
        ask(run, "train", number, adapter)
