"""Sites that train in common passes come to the numbers that each comes to alone."""

import csv

import numpy as np
import pytest
import torch

import silotune.client.together as together_module
from silotune.client.model_cache import ModelCache
from silotune.client.together import changes, groups, most_at_once
from silotune.client.trainer import Trainer
from silotune.errors import SelfCheckFailed
from silotune.models.adapter import read_adapter
from silotune.models.layout import initial_adapter
from silotune.privacy.layers import Stack
from tests.federation import CHOICES, PRIVATE, write_federation

STEPS = {
    "rounds.local_steps": 3,
    "optimizer.server.name": "none",
    "optimizer.site.head_rounds": 0,
    "optimizer.site.warmup_share": 0.0,
    "optimizer.site.adapter_lr": 0.5,
    "lora.last_layers": None,
}
SGD = {**STEPS, "optimizer.site.local": "sgd"}
ADAM = {**STEPS, "optimizer.site.local": "adam", "optimizer.site.adapter_lr": 0.01}
ONE_STEP = {**STEPS, "rounds.local_steps": 1, "optimizer.server.name": "adam"}
CLIENT_LEVEL = {
    "privacy.mode": "site",
    "privacy.epsilon": 4.0,
    "privacy.delta": 1e-4,
    "privacy.clip": 0.5,
    "privacy.site.noise": "coordinator",
    "aggregation.weights": "equal",
}
# Of Adam's steps only the sign of a small gradient matters.
CLOSE, CLOSE_OF_ADAM = 2e-5, 2e-2
CASES = {
    "sgd": SGD,
    "adam": ADAM,
    "one-step": ONE_STEP,
    "proximal": {**SGD, "optimizer.site.prox": 0.7},
    "scaffold": {**SGD, "aggregation.strategy": "scaffold"},
    "frozen-a": {**SGD, "aggregation.strategy": "ffa"},
    "own-b": {**SGD, "aggregation.strategy": "fedsa"},
    "client-level": {**SGD, **CLIENT_LEVEL},
    "small-passes": {**SGD, "privacy.max_physical_batch": 5},
}


@pytest.fixture(scope="module")
def federation(tmp_path_factory, bert_folder):
    return write_federation(tmp_path_factory.mktemp("together"), bert_folder)


def trainings(federation, settings, *, state):
    """The sites' trainings on one model, and the adapter that a first round starts from, far from 0."""
    plan = federation.plan.override(settings)
    runs = federation.runs(plan, state=state, models=ModelCache(CHOICES, trial=False))
    found = [run.training for run in runs]
    layout = found[0].trainable.model.layout
    start = initial_adapter(layout, plan)
    return found, start + np.float32(0.05) * np.cos(np.arange(start.size, dtype=np.float32))


def alone(found, adapter, server_round=1):
    return [each.round(adapter, server_round, clip=None, prior=None) for each in found]


def together(found, adapter, server_round=1):
    members = [each.member(adapter, server_round, prior=None) for each in found]
    pairs = zip(found, members, changes(members), strict=True)
    return [each.ended(member, change, seconds=0.0) for each, member, change in pairs]


@pytest.mark.parametrize("name", CASES)
def test_each_site_comes_to_what_it_comes_to_alone(federation, name):
    sites, adapter = trainings(federation, CASES[name], state=f"{name}-a")
    twins, _ = trainings(federation, CASES[name], state=f"{name}-t")
    close = CLOSE_OF_ADAM if name == "adam" else CLOSE
    for server_round in (1, 2):  # the second with what the strategy kept
        expected = alone(sites, adapter, server_round)
        found = together(twins, adapter, server_round)
        for ours, own in zip(found, expected, strict=True):
            size = np.abs(own.flat).max()
            assert size > 1e-4
            np.testing.assert_allclose(ours.flat, own.flat, rtol=0, atol=close * size)
            assert ours.records == own.records > 0
            assert ours.kept.keys() == own.kept.keys()
            for key, value in own.kept.items():
                scale = max(1.0, np.abs(value).max())
                np.testing.assert_allclose(ours.kept[key], value, rtol=0, atol=close * scale)
    assert not np.allclose(found[0].flat, found[1].flat, atol=1e-4)  # sites are no copies


def test_causal_models_too(tmp_path, llama_folder):
    federation = write_letters(tmp_path, llama_folder)
    sites, adapter = trainings(federation, SGD, state="a")
    twins, _ = trainings(federation, SGD, state="t")
    assert most_at_once(twins[0].trainable) == 32
    for ours, own in zip(together(twins, adapter), alone(sites, adapter), strict=True):
        size = np.abs(own.flat).max()
        np.testing.assert_allclose(ours.flat, own.flat, rtol=0, atol=CLOSE * size)


def write_letters(folder, base):
    """The federation's notes as prompts and responses."""
    made = write_federation(folder, base)
    for site in made.sites:
        path = site.folder / "notes.csv"
        with path.open(newline="") as file:
            _, *rows = csv.reader(file)
        with path.open("w", newline="") as file:
            head = ["prompt", "response", "patient"]
            csv.writer(file).writerows(
                [head, *([note, f"it is {yes}", p] for note, yes, p in rows)]
            )
        config = site.folder / "site.toml"
        config.write_text(
            config.read_text().replace(
                'text = "note"\nlabel = "chronic"', 'prompt = "prompt"\nresponse = "response"'
            )
        )
    text = made.plan_path.read_text()
    text = text.replace('"text_classification"', '"causal_lm"').replace(
        'labels = ["no", "yes"]\n', ""
    )
    text = text.replace("head_rounds = 2\n", "").replace("head_lr = 0.1\n", "")
    made.plan_path.write_text(text)
    return type(made)(made.folder, type(made.plan).load(made.plan_path), made.plan_path)


def test_no_pass_is_larger_than_the_plan_lets_it_be(federation, monkeypatch):
    sites, adapter = trainings(federation, CASES["small-passes"], state="passes")
    task = sites[0].trainable.model.task
    sizes, own = [], type(task).collate

    def collate(self, encoded, rows, device):
        sizes.append(len(rows))
        return own(self, encoded, rows, device)

    monkeypatch.setattr(type(task), "collate", collate)
    members = [each.member(adapter, 1, prior=None) for each in sites]
    changes(members)
    assert max(sizes) == 5
    assert sum(sizes) == sum(member._records for member in members)


def test_long_records_do_not_pad_short_ones(federation, monkeypatch):
    monkeypatch.setattr(together_module, "_FEW_TOKENS", 0)
    monkeypatch.setattr(together_module, "_MOST_PADDED", 1.0)
    sites, adapter = trainings(federation, SGD, state="long-a")
    twins, _ = trainings(federation, SGD, state="long-t")
    task, shapes = sites[0].trainable.model.task, []
    expected, own = alone(sites, adapter), type(task).collate

    def collate(self, encoded, rows, device):
        batch = own(self, encoded, rows, device)
        shapes.append(bool(batch["attention_mask"].all()))
        return batch

    monkeypatch.setattr(type(task), "collate", collate)
    found = together(twins, adapter)
    assert len(shapes) > 3
    assert all(shapes)
    for ours, each in zip(found, expected, strict=True):
        size = np.abs(each.flat).max()
        np.testing.assert_allclose(ours.flat, each.flat, rtol=0, atol=CLOSE * size)


def test_sites_whose_batches_fill_a_pass_train_in_several_groups(federation):
    sites, adapter = trainings(federation, {**SGD, "privacy.max_physical_batch": 30}, state="full")
    members = [each.member(adapter, 1, prior=None) for each in sites]
    assert [round(each.trainer.batch) for each in sites] == [8, 11, 14]
    assert list(groups(members)) == [[0, 1], [2]]


@pytest.mark.parametrize(
    "settings",
    [
        {"lora.last_layers": 2},  # what the frozen layers make of a text is kept at each site
        {"optimizer.site.head_rounds": 1},
        {
            "privacy.mode": "record",
            "privacy.epsilon": 8.0,
            "privacy.delta": 1e-4,
            "privacy.clip": {"head": 1.0, "adapter": 1.0},
        },
    ],
)
def test_what_is_worked_out_for_each_site_or_unit_apart_is_not_stacked(federation, settings):
    sites, adapter = trainings(
        federation, {**ONE_STEP, **settings}, state=f"apart-{next(iter(settings))}"
    )
    members = [each.member(adapter, 1, prior=None) for each in sites]
    assert list(groups(members)) == [[0], [1], [2]]


def test_what_is_not_finite_at_one_site_is_not_finite_there_alone(federation):
    sites, adapter = trainings(federation, SGD, state="nan-a")
    twins, _ = trainings(federation, SGD, state="nan-t")
    expected = alone(sites, adapter)
    members = [each.member(adapter, 1, prior=None) for each in twins]
    broken = adapter.copy()
    broken[7] = np.nan
    members[1].adapter = broken
    first, second, third = changes(members)
    assert second is None
    for change, own in ((first, expected[0]), (third, expected[2])):
        np.testing.assert_allclose(change, own.flat, rtol=0, atol=CLOSE * np.abs(own.flat).max())


def test_a_tensor_without_a_gradient_is_found_as_alone(federation, monkeypatch):
    """Of a plan that is not private a site then stops; `_MOVE_PATIENCE` steps are patient."""
    monkeypatch.setattr(Stack, "lora", lambda self, x, z, site: site.base(x))
    sites, adapter = trainings(federation, {**SGD, "rounds.local_steps": 4}, state="still")
    with pytest.raises(SelfCheckFailed, match="never had a gradient"):
        together(sites, adapter)


def test_the_model_is_its_own_again_afterwards(federation):
    sites, adapter = trainings(federation, SGD, state="again")
    before = alone(sites, adapter)[0].flat
    together(sites, adapter)
    assert sites[0].trainable.attached.stack is None
    np.testing.assert_array_equal(alone(sites, adapter)[0].flat, before)


def test_dropout_is_drawn_for_each_sequence(federation):
    dropped = {**SGD, "lora.dropout": 0.5}
    sites, adapter = trainings(federation, dropped, state="dropout")
    plain, _ = trainings(federation, SGD, state="dropout-none")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        found = together(sites, adapter)
    for ours, without in zip(found, alone(plain, adapter), strict=True):
        assert np.isfinite(ours.flat).all()
        assert not np.allclose(ours.flat, without.flat, rtol=1e-2)


def test_a_layer_that_sees_no_batch_is_refused():
    weight = torch.nn.Parameter(torch.ones(3, 2))
    stack = Stack({id(weight): torch.ones(2, 3, 2)}, torch.tensor([0, 0, 1]))
    assert stack.product(torch.ones(3, 4, 2), weight, torch.float32).shape == (3, 4, 3)
    with pytest.raises(SelfCheckFailed, match="batch as first dimension"):
        stack.product(torch.ones(1, 4, 2), weight, torch.float32)


def test_how_many_train_together_is_bounded_by_their_adapters(federation, monkeypatch):
    sites, _ = trainings(federation, SGD, state="bounded")
    shared = sites[0].trainable
    assert most_at_once(shared) == 32
    monkeypatch.setattr(together_module, "_MOST_BYTES", 8 * 5 * shared.model.layout.nbytes)
    assert most_at_once(shared) == 5
    monkeypatch.setattr(together_module, "_MOST_BYTES", 8 * shared.model.layout.nbytes)
    assert most_at_once(shared) == 1


def test_a_model_that_gives_sequences_the_wrong_adapters_has_its_sites_alone(
    federation, monkeypatch
):
    """Tried before any record is read; what a model that mixes records would do is the same."""
    sites, _ = trainings(federation, SGD, state="mixing")
    shared, own = sites[0].trainable, Stack._own
    before = read_adapter(shared.model)
    monkeypatch.setattr(Stack, "_own", lambda self, parameter: own(self, parameter).roll(1, 0))
    assert most_at_once(shared) == 1
    monkeypatch.setattr(Stack, "_own", own)
    assert most_at_once(shared) == 32
    np.testing.assert_array_equal(read_adapter(shared.model), before)


def test_sites_of_a_plan_that_clips_units_train_alone(federation):
    sites, _ = trainings(federation, {**ONE_STEP, **PRIVATE}, state="clips")
    assert most_at_once(sites[0].trainable) == 1


def test_trainers_that_finish_their_updates_train_alone(federation):
    """Those of comparisons add the noise themselves."""
    sites, _ = trainings(federation, SGD, state="finishing")
    found: Trainer = sites[0].alone()
    assert not found.stacks(1)
