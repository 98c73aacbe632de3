"""The comparison models: trained on what they say they are, from the same starting point."""

import numpy as np
import pytest
import torch

from silotune.client.terms import sigma_for
from silotune.client.warm import WarmModel
from silotune.models.features import compute_frozen
from silotune.simulation.baselines import (
    _pooled,
    _trainers,
    federate,
    head_only,
    jobs_for,
    run_job,
    run_jobs,
)
from silotune.strategies.base import Terms
from tests.federation import CHOICES, PRIVATE, SITES, write_federation


@pytest.fixture
def federation(tmp_path, bert_folder):
    torch.set_num_threads(1)
    return write_federation(tmp_path, bert_folder)


def jobs(federation, plan=None):
    from dataclasses import asdict

    return jobs_for(plan or federation.plan, federation.sites, asdict(CHOICES))


def test_every_comparison_that_the_report_shows_is_planned(federation):
    keys = [job.key for job in jobs(federation)]
    assert keys == ["pooled", "own", "own", "own", "probe_federated", "probe_pooled"]
    assert [job.site for job in jobs(federation) if job.key == "own"] == list(reversed(SITES))


def test_an_own_model_sees_its_own_records_only(federation):
    (job,) = [j for j in jobs(federation) if j.site == "beta"]
    runs = federation.runs()
    (((terms, trainer)),) = _trainers(job, federation.plan, runs)
    assert terms.site == "beta"
    assert trainer._data.encoded is runs[1].encoded


def test_the_pooled_trainer_holds_every_record_of_every_site_in_order(federation):
    runs = federation.runs()
    terms, trainer = _pooled(federation.plan, runs)
    assert terms.declared_units == sum(run.dataset.declared_units for run in runs)
    assert len(trainer._data.encoded) == sum(len(run.records) for run in runs)
    assert len(np.unique(trainer._data.unit_of)) == sum(run.records.n_units() for run in runs)
    fresh = compute_frozen(runs[0].trainable.model, trainer._data.encoded)
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
        (Terms(node=n, site=r.site.name, declared_units=80), r.trainer) for n, r in enumerate(runs)
    ]
    adapter, _ = federate(plan, trainers)
    layout = runs[0].trainer.layout
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
    warm = WarmModel(CHOICES)
    site = federation.sites[0]
    run = federation.runs()[0]
    first = warm.frozen(site, federation.plan, run.encoded)
    other = federation.plan.override({**PRIVATE, "lora.r": 3})
    assert warm.frozen(site, other, run.encoded) is first
    scaled = federation.plan.override({"model.feature_scale": 2.0})
    assert warm.frozen(site, scaled, run.encoded) is not first


def test_outcomes_are_the_same_whoever_finishes_first(federation):
    chosen = [job for job in jobs(federation) if job.key == "own"]
    outcomes = {one.job.site: one for one in run_jobs(chosen, workers=2)}
    assert set(outcomes) == set(SITES)
    for job in chosen:
        alone = run_job(job)
        assert all((outcomes[job.site].counts[s] == alone.counts[s]).all() for s in SITES)
