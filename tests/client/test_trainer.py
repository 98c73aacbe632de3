"""A site's steps: the sums and changes it computes, and what happens at the edges."""

import numpy as np
import pytest
import torch

from silotune.client.trainer import UnitSampler
from silotune.errors import SelfCheckFailed
from silotune.models.adapter import write_adapter
from silotune.models.batching import Encoded
from silotune.models.layout import gathered, initial_adapter
from silotune.privacy.noise import SeededNoise, derive_seed
from silotune.simulation.baselines import federate
from silotune.strategies.base import Terms
from tests.federation import PRIVATE, trainer_of, write_federation

pytestmark = pytest.mark.usefixtures("task_identity")


@pytest.fixture
def task_identity():
    torch.set_num_threads(1)


def terms_and_trainers(runs):
    return [
        (Terms(node=n, site=r.site.name, declared_units=r.dataset.declared_units), trainer_of(r))
        for n, r in enumerate(runs)
    ]


def drawn_rows(run, plan, server_round):
    """The rows that a seeded site trains on in a round, by replaying its stream."""
    noise = SeededNoise(derive_seed(plan.plan.seed, "train", run.site.name, server_round))
    return [
        row
        for batch in trainer_of(run)._samplers[0].draw(plan.privacy.rate, noise)
        for row in batch.rows
    ]


def test_one_step_a_round_is_pooled_training_of_the_same_batches(tmp_path, bert_folder):
    federation = write_federation(tmp_path, bert_folder)
    plan, runs = federation.plan, federation.runs()
    ours, _ = federate(plan, terms_and_trainers(runs))

    # The other way: one model, one torch Adam, the union of the batches, no patched layer.
    from silotune.models.base import load_model

    model = load_model(plan, device="cpu", attention="eager", dtype="float32")
    write_adapter(model, initial_adapter(model.layout, plan))
    site, total = plan.optimizer.site, plan.steps
    groups = {"adapter": model.parameters("adapter"), "head": model.parameters("head")}
    rules = {name: torch.optim.Adam(p, eps=1e-8) for name, p in groups.items()}
    batch = sum(plan.expected_batch(run.dataset.declared_units) for run in runs)
    for number in range(1, total + 1):
        model.module.zero_grad()
        for run in runs:
            for row in drawn_rows(run, plan, number):
                inputs = model.task.collate(run.training.encoded, [row], model.device)
                (model.task.losses(model.module, inputs).sum() / batch).backward()
        rise = min(1.0, number / (site.warmup_share * total))
        factor = rise * (1 - (1 - site.final_share) * (number - 1) / total)
        for name, peak in (("adapter", site.adapter_lr), ("head", site.head_lr)):
            if name == "head" or number > site.head_rounds:
                rules[name].param_groups[0]["lr"] = peak * factor
                rules[name].step()
    from silotune.models.adapter import read_adapter

    pooled = read_adapter(model)
    assert np.abs(pooled - initial_adapter(model.layout, plan)).max() > 0.01
    np.testing.assert_allclose(ours, pooled, rtol=1e-5, atol=1e-5)


def test_several_steps_send_the_change_of_the_sites_own_optimizer(tmp_path, bert_folder):
    federation = write_federation(
        tmp_path,
        bert_folder,
        rounds__local_steps=3,
        optimizer__server__name="none",
        optimizer__site__local="sgd",
        optimizer__site__head_rounds=0,
    )
    run = federation.runs()[0]
    layout = trainer_of(run).layout
    start = initial_adapter(layout, federation.plan)
    update = trainer_of(run).round(start, 1)
    assert update.flat.shape == (layout.size,)
    moved = layout.unpack(update.flat)
    assert np.abs(moved["head.weight"]).max() > 0
    assert all(np.abs(v).max() > 0 for k, v in moved.items() if "lora_B" in k)


def test_fedprox_descends_the_loss_with_its_proximal_term(tmp_path, bert_folder):
    federation = write_federation(
        tmp_path,
        bert_folder,
        rounds__local_steps=3,
        optimizer__server__name="none",
        optimizer__site={
            "local": "sgd", "prox": 0.8, "adapter_lr": 0.4, "head_lr": 0.5, "schedule": "constant",
            "warmup_share": 0.0, "head_rounds": 0,
        },
    )  # fmt: skip
    plan, run = federation.plan, federation.runs()[0]
    start = initial_adapter(trainer_of(run).layout, plan)
    ours = trainer_of(run).round(start, 1).flat

    # Li et al. (MLSys 2020), literally: torch differentiates loss + prox / 2 |w - w_0|^2.
    from silotune.models.adapter import read_adapter
    from silotune.models.base import load_model

    model = load_model(plan, device="cpu", attention="eager", dtype="float32")
    write_adapter(model, start)
    groups = [(model.parameters("adapter"), 0.4), (model.parameters("head"), 0.5)]
    rule = torch.optim.SGD([{"params": list(p), "lr": rate} for p, rate in groups])
    parameters = [p for group, _ in groups for p in group]
    origin = [p.detach().clone() for p in parameters]
    noise = SeededNoise(derive_seed(plan.plan.seed, "train", run.site.name, 1))
    for _ in range(3):
        rows = [
            row
            for b in trainer_of(run)._samplers[0].draw(plan.privacy.rate, noise)
            for row in b.rows
        ]
        inputs = model.task.collate(run.training.encoded, rows, model.device)
        loss = model.task.losses(model.module, inputs).sum()
        loss = loss / plan.expected_batch(run.dataset.declared_units)
        pull = sum(((p - o) ** 2).sum() for p, o in zip(parameters, origin, strict=True))
        rule.zero_grad()
        (loss + 0.8 / 2 * pull).backward()
        rule.step()
    theirs = read_adapter(model) - start
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
    free = federation.runs(plan.override({"optimizer.site.prox": 0.0}), state="free")[0]
    assert np.abs(ours - trainer_of(free).round(start, 1).flat).max() > 1e-3


def test_a_seeded_round_is_repeatable_and_depends_on_the_round(tmp_path, bert_folder):
    plan = write_federation(
        tmp_path, bert_folder, **{k.replace(".", "__"): v for k, v in PRIVATE.items()}
    )
    run = plan.runs()[0]
    start = initial_adapter(trainer_of(run).layout, plan.plan)
    first = trainer_of(run).round(start, 3).flat
    assert trainer_of(run).round(start, 3).flat.tobytes() == first.tobytes()
    assert trainer_of(run).round(start, 4).flat.tobytes() != first.tobytes()


def test_without_a_seed_no_two_rounds_have_the_same_noise(tmp_path, bert_folder):
    federation = write_federation(
        tmp_path,
        bert_folder,
        plan__seed=None,
        **{k.replace(".", "__"): v for k, v in PRIVATE.items()},
    )
    run = federation.runs()[0]
    start = initial_adapter(trainer_of(run).layout, federation.plan)
    assert (
        trainer_of(run).round(start, 3).flat.tobytes()
        != trainer_of(run).round(start, 3).flat.tobytes()
    )


@pytest.mark.parametrize("private", [True, False])
def test_an_empty_sample_is_a_step_all_the_same(tmp_path, bert_folder, private):
    settings = {k.replace(".", "__"): v for k, v in PRIVATE.items()} if private else {}
    federation = write_federation(tmp_path, bert_folder, privacy__rate=1e-9, **settings)
    run = federation.runs()[0]
    update = trainer_of(run).round(initial_adapter(trainer_of(run).layout, federation.plan), 3)
    assert bool(update.flat.any()) == private
    assert (update.event is not None) == private
    assert trainer_of(run).records_used == 0


def test_noise_has_the_planned_size_in_both_groups(tmp_path, bert_folder):
    settings = {k.replace(".", "__"): v for k, v in PRIVATE.items()}
    settings["privacy__clip"] = {"head": 0.5, "adapter": 2.0, "head_share": 0.2}
    federation = write_federation(tmp_path, bert_folder, privacy__rate=1e-9, **settings)
    run = federation.runs()[0]
    layout = trainer_of(run).layout
    start = initial_adapter(layout, federation.plan)
    flats = np.stack([trainer_of(run).round(start, number).flat for number in (3, 4, 5)])
    sigma = run.sigma
    for parts, want in (
        ({"A", "B"}, sigma * 2.0 / np.sqrt(0.8)),
        ({"head"}, sigma * 0.5 / np.sqrt(0.2)),
    ):
        values = np.concatenate([gathered(flat, layout.spans(parts)) for flat in flats])
        # 6 standard errors of a standard deviation: a false alarm in about 5e8 runs.
        assert values.std() == pytest.approx(want, rel=6 / np.sqrt(2 * values.size))


def test_a_tensor_that_never_gets_a_gradient_stops_the_run(tmp_path, bert_folder):
    federation = write_federation(tmp_path, bert_folder, optimizer__site__head_rounds=0)
    run = federation.runs()[0]
    adapter = initial_adapter(trainer_of(run).layout, federation.plan)
    model = run.training.trainable.model
    # A classifier whose input is cut off from one adapted layer, as a stale hook would do.
    name = next(n for n in model.module.trained if "lora_B" in n)
    layer = model.module.peft.get_submodule(name.removesuffix(".lora_B.weight"))
    plain = layer.base_layer.forward
    layer.forward = plain
    with pytest.raises(SelfCheckFailed, match="2 trainable tensors never had a gradient"):
        for number in range(1, 6):
            flat = trainer_of(run).round(adapter, number).flat
            adapter = adapter - np.float32(0.1) * flat / np.abs(flat).max()


def test_a_sound_model_passes_the_same_check(tmp_path, bert_folder):
    federation = write_federation(tmp_path, bert_folder, optimizer__site__head_rounds=0)
    run = federation.runs()[0]
    adapter = initial_adapter(trainer_of(run).layout, federation.plan)
    for number in range(1, 6):
        flat = trainer_of(run).round(adapter, number).flat
        adapter = adapter - np.float32(0.1) * flat / np.abs(flat).max()
    assert trainer_of(run)._still == {}


# --- sampling ---


def sampler(sizes, **settings):
    unit_of = np.repeat(np.arange(len(sizes)), sizes)
    encoded = Encoded.of([[1] * (1 + i % 7) for i in range(len(unit_of))], [0] * len(unit_of), 0)
    options = {"max_records": 3, "max_physical": 8, **settings}
    return unit_of, UnitSampler(
        encoded=encoded, unit_of=unit_of, rows=np.arange(len(unit_of)), **options
    )


def test_units_are_drawn_whole_bounded_and_never_split():
    unit_of, units = sampler([1, 5, 3, 2] * 20)
    for seed in range(20):
        batches = units.draw(0.5, SeededNoise(seed))
        seen = set()
        for batch in batches:
            assert len(batch.rows) <= 8
            owners = unit_of[batch.rows]
            assert not seen & set(owners)
            seen |= set(owners)
            assert all(
                (unit_of[batch.rows][batch.units == u] == owners[batch.units == u][0]).all()
                for u in range(batch.n_units)
            )
            counts = np.bincount(owners)
            sizes = np.bincount(unit_of)
            assert (counts[counts > 0] == np.minimum(sizes[: len(counts)][counts > 0], 3)).all()


def test_each_unit_is_drawn_with_the_rate_whatever_its_size():
    unit_of, units = sampler([1, 5, 3, 2] * 25)
    hits = np.zeros(100)
    for seed in range(400):
        for batch in units.draw(0.3, SeededNoise(seed)):
            hits[np.unique(unit_of[batch.rows])] += 1
    # Binomial(400, 0.3) a unit; 6 standard deviations: a false alarm in about 1e7 runs for 100.
    assert np.abs(hits - 120).max() < 6 * np.sqrt(400 * 0.3 * 0.7)


def test_a_large_units_records_take_turns():
    _, units = sampler([6])
    seen = {
        row
        for seed in range(40)
        for batch in units.draw(1.0, SeededNoise(seed))
        for row in batch.rows
    }
    assert seen == set(range(6))  # missing one of six in 40 draws of three: below 1e-11


@pytest.mark.parametrize(
    ("head_rounds", "last_layers", "worth_it"), [(0, None, False), (1, None, True), (0, 1, True)]
)
def test_features_are_computed_ahead_only_where_a_round_uses_them(
    tmp_path, bert_folder, head_rounds, last_layers, worth_it
):
    settings = {"optimizer__site__head_rounds": head_rounds, "lora__last_layers": last_layers}
    run = write_federation(tmp_path, bert_folder, **settings).runs()[0]
    asked = []
    find = trainer_of(run)._find_frozen
    trainer_of(run)._find_frozen = lambda: (asked.append(True), find())[1]
    trainer_of(run).prepare()
    assert bool(asked) == worth_it


@pytest.mark.parametrize(("rate", "worth_it"), [(0.1, False), (0.2, True)])
def test_what_lies_below_a_language_models_adapter_is_kept_if_a_run_uses_each_record_once(
    tmp_path, llama_folder, rate, worth_it
):
    federation = write_federation(
        tmp_path,
        llama_folder,
        model__task="causal_lm",
        model__labels=None,
        lora__last_layers=1,
        optimizer__site__head_rounds=0,
        privacy__rate=rate,  # of 5 rounds
    )
    for path in tmp_path.glob("*/site.toml"):
        text = path.read_text().replace("text =", "prompt =").replace("label =", "response =")
        path.write_text(text)
    trainer = trainer_of(federation.runs()[0])
    trainer.prepare()
    assert ("frozen" in vars(trainer)) == worth_it
    assert ("prefix" in trainer.inputs([0])) == worth_it
    assert trainer.round(initial_adapter(trainer.layout, federation.plan), 1).flat.any()
