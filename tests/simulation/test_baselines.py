"""The comparison models: trained on what they say they are, from the same starting point."""

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from silotune.client.model_cache import ModelCache
from silotune.client.terms import missing_noise, sigma_for
from silotune.data.records import Split
from silotune.models.features import compute_frozen
from silotune.models.layout import initial_adapter
from silotune.plan.plan import Plan
from silotune.simulation.baselines import (
    _features,
    _own_head,
    _pooled,
    _Share,
    _trainers,
    federate,
    head_only,
    jobs_for,
    run_job,
    run_jobs,
)
from silotune.strategies.base import Terms
from tests.federation import CHOICES, PRIVATE, SITES, write_federation
from tests.forked import forked_workers


@pytest.fixture
def federation(tmp_path, bert_folder):
    torch.set_num_threads(1)
    return write_federation(tmp_path, bert_folder)


def jobs(federation, plan=None):
    return jobs_for(plan or federation.plan, federation.sites, asdict(CHOICES))


def test_every_comparison_that_the_report_shows_is_planned(federation):
    keys = [job.key for job in jobs(federation)]
    assert keys == ["pooled", "own", "own", "own", "probe_federated", "probe_pooled"]
    assert [job.site for job in jobs(federation) if job.key == "own"] == list(reversed(SITES))


def test_a_run_of_the_head_alone_is_its_own_probe(federation):
    keys = [job.key for job in jobs(federation, head_only(federation.plan))]
    assert keys == ["pooled", "own", "own", "own"]


SHARED = {
    **PRIVATE,
    "aggregation.secure": True,
    "aggregation.cohort": 3,
    "aggregation.threshold": 2,
    "privacy.noise": "shared",
}


def test_a_federated_baseline_has_the_noise_of_the_federations_own_sums(federation):
    """Seeded, so that it can't fail by chance; of some 600 numbers the spread is known to 3 %."""
    shared, alone = federation.plan.override(SHARED), federation.plan.override(PRIVATE)
    titled = {job.key: Plan.from_canonical(job.plan) for job in jobs(federation, shared)}
    assert titled["probe_federated"].privacy.noise == "shared"
    assert all(titled[key].privacy.noise != "shared" for key in ("pooled", "own", "probe_pooled"))
    run, layout = federation.runs(shared)[0], federation.runs(alone)[0].training.trainer.layout
    update = run.training.trainer.round(
        initial_adapter(layout, shared), 3
    )  # from round 3 all is trained
    flat = _Share(shared, layout=layout, site="alpha").added(update, 3)
    added, spans = flat - update.flat, layout.spans({"A", "B", "head"})
    for part in ("B", "head"):
        numbers = np.concatenate([added[s.start : s.stop] for s in spans if s.part == part])
        assert numbers.std() == pytest.approx(update.missing_noise[part], rel=0.3)
    own = missing_noise(run.plan, {"A", "B", "head"}, sigma=run.sigma)
    whole = run.sigma / 2**0.5  # two sharers: each adds half of the variance
    assert own["head"] == pytest.approx(update.missing_noise["head"])
    assert own["head"] > whole * PRIVATE["privacy.clip"]["head"]  # of a share of the budget


def test_a_federated_baseline_takes_back_the_noise_that_the_plan_says(federation):
    correlated = {"privacy.bands": 2, "privacy.band_weights": [1.0, 0.6]}
    server = {"optimizer.server": {"name": "sgd"}, "optimizer.site.head_rounds": 0}
    plan = federation.plan.override({**SHARED, **correlated, **server})
    run = federation.runs(plan)[0]
    adapter = initial_adapter(run.layout, plan)
    updates = {number: run.training.trainer.round(adapter, number) for number in (1, 2, 3)}

    def noise(share, numbers):
        return [share.added(updates[n], n) - updates[n].flat for n in numbers]

    first, second, third = noise(_Share(plan, layout=run.layout, site="alpha"), (1, 2, 3))
    (alone,) = noise(_Share(plan, layout=run.layout, site="alpha"), (3,))
    np.testing.assert_allclose(third, alone - 0.6 * second, atol=1e-4 * np.abs(alone).max())
    assert np.abs(second + 0.6 * first).std() > 0.5 * alone.std()


def test_a_head_of_ones_own_changes_the_head_and_nothing_else(federation):
    plan = head_only(federation.plan)
    run = federation.runs(plan)[0]
    layout = run.training.trainer.layout
    start = np.random.default_rng(0).normal(0, 0.1, layout.size).astype(np.float32)
    own, used = _own_head(run, plan, _features(run, start), start=start)
    assert used > 0
    for span in layout.spans({"A", "B", "head"}):
        same = own[span.start : span.stop].tobytes() == start[span.start : span.stop].tobytes()
        assert same == (span.part != "head")


def test_heads_of_their_own_are_trained_on_the_federations_adapter_and_scored(federation):
    start = np.zeros(federation.runs()[0].training.trainer.layout.size, np.float32)
    found = jobs_for(federation.plan, federation.sites, asdict(CHOICES), adapter=start)
    (job,) = (job for job in found if job.key == "personal")
    outcome = run_job(job)
    sizes = {s: int(counts.sum()) for s, counts in outcome.counts.items()}
    assert set(sizes) == set(SITES)
    assert {int(c.sum()) for c in outcome.everywhere.values()} == {sum(sizes.values())}


def test_an_own_model_sees_its_own_records_only(federation):
    (job,) = [j for j in jobs(federation) if j.site == "beta"]
    runs = federation.runs()
    (((terms, trainer)),) = _trainers(job, federation.plan, runs)
    assert terms.site == "beta"
    assert trainer.data.encoded is runs[1].training.encoded


def test_the_pooled_trainer_holds_every_record_of_every_site_in_order(federation):
    runs = federation.runs()
    terms, trainer = _pooled(federation.plan, runs)
    assert terms.declared_units == sum(run.dataset.declared_units for run in runs)
    assert len(trainer.data.encoded) == sum(len(run.training.records) for run in runs)
    assert len(np.unique(trainer.data.unit_of)) == sum(
        run.training.records.n_units() for run in runs
    )
    fresh = compute_frozen(runs[0].training.trainable.model, trainer.data.encoded)
    torch.testing.assert_close(trainer.frozen.features, fresh.features, rtol=1e-4, atol=1e-5)
    rows = [0, 70, 150]
    torch.testing.assert_close(
        trainer.frozen.prefix.get(rows, torch.device("cpu")),
        fresh.prefix.get(rows, torch.device("cpu")),
        rtol=1e-4,
        atol=1e-5,
    )


def test_pooled_records_get_one_share_of_noise_and_a_larger_batch(federation):
    plan = federation.plan.override(PRIVATE)
    sizes = [run.dataset.declared_units for run in federation.runs(plan)]
    assert sigma_for(plan, sum(sizes)) == sigma_for(plan, sizes[0])  # the rate is the same
    assert plan.expected_batch(sum(sizes)) == pytest.approx(sum(map(plan.expected_batch, sizes)))


def test_the_probe_never_touches_the_adapter(federation):
    plan = head_only(federation.plan)
    runs = federation.runs(plan)
    trainers = [
        (Terms(node=n, site=r.site.name, declared_units=80), r.training.alone())
        for n, r in enumerate(runs)
    ]
    adapter, _ = federate(plan, trainers)
    layout = runs[0].training.trainer.layout
    arrays = layout.unpack(adapter)
    assert all(not v.any() for k, v in arrays.items() if "lora_B" in k)
    assert arrays["head.weight"].any()


def test_a_job_is_repeatable_and_scores_every_site(federation):
    (job,) = [j for j in jobs(federation) if j.key == "probe_federated"]
    one, other = run_job(job), run_job(job)
    assert set(one.counts) == set(SITES)
    for site in SITES:
        assert (one.counts[site] == other.counts[site]).all()


def test_frozen_features_are_shared_between_plans_of_one_model(federation):
    models = ModelCache(CHOICES)
    site = federation.sites[0]
    run = federation.runs()[0]
    first = models.frozen(site, federation.plan, run.training.encoded)
    other = federation.plan.override({**PRIVATE, "lora.r": 3})
    assert models.frozen(site, other, run.training.encoded) is first
    scaled = federation.plan.override({"model.feature_scale": 2.0})
    assert models.frozen(site, scaled, run.training.encoded) is not first


def test_a_job_can_be_scored_on_validation_records(federation):
    (job,) = [j for j in jobs(federation) if j.key == "probe_federated"]
    counts = run_job(replace(job, on=Split.VALIDATION)).counts
    held = {
        run.site.name: len(run.training.records.rows(Split.VALIDATION)) for run in federation.runs()
    }
    assert {name: int(found.sum()) for name, found in counts.items()} == {
        name: size for name, size in held.items() if size
    }


def test_random_cosines_stand_on_the_frozen_features_of_a_plan_without_them(federation):
    plan = federation.plan.override({"model.centre_texts": ["red", "green", "blue"]})
    curved = plan.override({"model.head_features": {"kind": "cosines", "number": 32}})
    site, run = federation.sites[0], federation.runs(plan)[0]
    models = ModelCache(CHOICES)
    first = models.frozen(site, curved, run.training.encoded)
    assert models.frozen(site, plan, run.training.encoded) is first
    made = compute_frozen(run.training.trainable.model, run.training.encoded)
    assert (made.features == first.features).all()


def test_outcomes_are_the_same_whoever_finishes_first(federation):
    chosen = [job for job in jobs(federation) if job.key == "own"]
    with forked_workers():
        outcomes = {one.job.site: one for one in run_jobs(chosen, workers=2)}
    assert set(outcomes) == set(SITES)
    for job in chosen:
        alone = run_job(job)
        assert all((outcomes[job.site].counts[s] == alone.counts[s]).all() for s in SITES)
