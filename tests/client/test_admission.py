"""A site's part in a run starts with its policy: in a simulation just as in a deployment."""

import io

import numpy as np
import pytest
from flwr.app import ConfigRecord, RecordDict
from flwr.app.message import make_message
from flwr.app.metadata import Metadata

from silotune.client import errors, model_cache
from silotune.client import site_run as runtime
from silotune.client.app import build_client_app
from silotune.client.model_cache import ModelCache
from silotune.client.policy import total_epsilon
from silotune.client.site_run import SiteRun
from silotune.data.site import SiteConfig
from silotune.errors import BudgetExceeded, ModelNotFound, SilotuneError
from silotune.models.base import load_model, outline
from silotune.models.pretrained import weights_sha256
from silotune.plan.plan import Plan
from silotune.privacy.ledger import Ledger
from silotune.protocol.errors import MessageRefused
from silotune.protocol.requests import REQUESTS
from tests.federation import CHOICES, PRIVATE, write_federation, write_policy


@pytest.fixture
def federation(tmp_path, bert_folder):
    sha = weights_sha256(bert_folder)
    made = write_federation(
        tmp_path, bert_folder, model__sha256=sha, model__base="/nowhere", **dotted(PRIVATE)
    )
    for site in made.sites:
        write_policy(site.folder / "site.toml", bert_folder, min_cohort=2)
    return made


def dotted(settings):
    return {key.replace(".", "__"): value for key, value in settings.items()}


def run_of(federation, plan=None, *, state="s", run="r", edit=lambda text: text):
    path = federation.folder / "alpha" / "site.toml"
    path.write_text(edit(path.read_text()))
    return SiteRun(
        SiteConfig.load(path),
        state=federation.folder / state,
        plan=plan or federation.plan,
        run=run,
        models=ModelCache(CHOICES),
    )


def ask(plan, kind):
    config = ConfigRecord({"plan": plan.canonical(), "run": "r", "round": 1})
    metadata = Metadata(1, "m", 1, 2, "", "", 0.0, 60.0, kind)
    return make_message(metadata, RecordDict({"config": config}))


def adapter_for(site_run):
    return np.zeros(site_run.training.trainable.model.layout.size, dtype=np.float32)


def test_an_allowed_plan_runs_on_the_weights_at_the_sites_own_place(federation):
    """The plan says /nowhere; the policy says where the weights with that hash are."""
    part = run_of(federation)
    part.admit()
    part.join()
    released = part.train(adapter_for(part), 1)
    assert len(released.array_records) == 1


def test_nothing_is_loaded_charged_or_reserved_for_a_refused_plan(federation, monkeypatch):
    loaded = []
    monkeypatch.setattr(model_cache, "load_model", lambda *a, **k: loaded.append(a))
    monkeypatch.setattr(model_cache, "load_records", lambda *a, **k: loaded.append(a))
    part = run_of(federation, federation.plan.override({"rounds.number": 11}))
    app = build_client_app(lambda context, plan, run: part)
    for kind in sorted(REQUESTS):
        with pytest.raises(errors.TooManyRounds):
            app(message=ask(part.plan, kind), context=None)
    assert loaded == []
    assert part.ledger.rows() == []


def test_a_base_model_that_is_not_listed_is_not_even_looked_for(federation, monkeypatch):
    looked = []
    monkeypatch.setattr(model_cache, "outline", lambda *a, **k: looked.append(a))
    plan = federation.plan.override({"model.sha256": "00" * 32, "model.base": "/etc"})
    with pytest.raises(errors.BaseModelRefused):
        run_of(federation, plan).admit()
    assert looked == []


def test_weights_that_were_exchanged_are_not_trained_on(federation, llama_folder):
    def exchange(text):
        start = text.index('" = "', text.index("[policy.base_models]"))
        return text[:start] + f'" = "{llama_folder}"\n'

    with pytest.raises(SilotuneError) as error:
        run_of(federation, edit=exchange).join()
    assert error.value.code in {"ST-302", "ST-304"}


def test_two_runs_together_may_not_pass_the_total(federation):
    first = run_of(federation, run="one")
    first.join()
    with pytest.raises(errors.EpsilonInTotalRefused):
        run_of(federation, run="two").admit()
    with pytest.raises(BudgetExceeded):  # the ledger itself would not have it either
        run_of(federation, run="two").join()
    assert first.ledger.runs()[0].run == "one"
    assert len(first.ledger.runs()) == 1
    run_of(federation, run="one").admit()  # a run's own reservation is not counted twice


def test_the_total_is_what_the_ledger_will_say(federation):
    """Independent: let the ledger itself compose the run after it has happened."""
    part = run_of(federation)
    part.join()
    judged = total_epsilon(part.site, part.plan, run="r", ledger=None)
    committed = Ledger(federation.folder / "s" / "ledger.sqlite").committed("notes", 1e-4)
    assert judged == pytest.approx(committed, rel=1e-9)
    other = total_epsilon(part.site, part.plan, run="another", ledger=part.ledger)
    assert committed < other < 2 * committed


def test_hours_hold_for_every_answer(federation, monkeypatch):
    part = run_of(
        federation, edit=lambda text: text.replace("Mon-Sun 00:00-24:00", "Mon 08:00-18:00")
    )
    monday = runtime.local_time().replace(year=2026, month=11, day=23, hour=12)
    monkeypatch.setattr(runtime, "local_time", lambda: monday)
    part.admit()
    monkeypatch.setattr(runtime, "local_time", lambda: monday.replace(hour=20))
    with pytest.raises(errors.OutsideHours):
        part.admit()


@pytest.mark.parametrize(("kind", "number"), [("train", 6), ("evaluate", 6), ("evaluate", 3)])
def test_no_round_or_evaluation_beyond_the_plan_is_answered(federation, kind, number):
    """The plan has 5 rounds and evaluates after every second."""
    part = run_of(federation, federation.plan.override({"privacy.metrics_share": 0.1}))
    part.join()
    before = part.ledger.rows()
    with pytest.raises(MessageRefused, match=str(number)):
        getattr(part, kind)(adapter_for(part), number)
    assert part.ledger.rows() == before


def test_the_known_message_types_are_those_that_the_app_answers(federation):
    app = build_client_app(lambda context, plan, run: None)
    answered = {name.removesuffix(".default") for name in app._registered_funcs}
    assert answered == set(REQUESTS)


def test_without_a_policy_a_site_can_only_be_simulated(tmp_path, bert_folder):
    made = write_federation(tmp_path, bert_folder)
    assert made.sites[0].policy is None
    made.runs()[0].join()


def test_the_outline_is_the_layout_of_the_loaded_model(bert_folder, llama_folder, tmp_path):
    federation = write_federation(tmp_path, bert_folder)
    causal = {
        "model.task": "causal_lm", "model.labels": [], "optimizer.site.head_rounds": 0,
        "model.base": str(llama_folder), "lora.target_modules": "all-linear",
    }  # fmt: skip
    for plan in (federation.plan, federation.plan.override(causal)):
        assert outline(plan, base=plan.model.base) == load_model(plan, device="cpu").layout
    with pytest.raises(ModelNotFound):
        outline(Plan.from_canonical(federation.plan.canonical()), base="/nowhere")


def test_stored_replies_are_sealed(federation):
    part = run_of(federation)
    part.join()
    released = part.train(adapter_for(part), 1)["update"]["flat"].data
    stored = list((federation.folder / "s" / "outbox").glob("*update*"))
    assert len(stored) == 1
    values = np.load(io.BytesIO(released)).tobytes()
    assert values[:64] not in stored[0].read_bytes()
