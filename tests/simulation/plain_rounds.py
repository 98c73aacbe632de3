"""What secure rounds with dropouts are compared with: the same rounds without messages or masks."""

import random

import numpy as np

from silotune.client.model_cache import ModelCache
from silotune.client.run_files import ProcessMemory
from silotune.client.site_run import SiteRun
from silotune.client.terms import missing_noise
from silotune.models.layout import initial_adapter
from silotune.privacy.noise import noise_for, noised
from silotune.strategies import method_of, strategy_for
from silotune.strategies.base import Terms
from tests.federation import CHOICES, trainer_of

PHASES = ("keys", "share", "masked", "check", "open")


def replied(events):
    """Sites whose update is in the sum, by round; nobody's in a void one."""
    found = {event["round"]: set() for event in events if event["event"] == "round_finished"}
    void = {event["round"] for event in events if event["event"] == "round_void"}
    for event in events:
        if event["event"] == "site_replied" and event["round"] not in void:
            found[event["round"]].add(event["site"])
    return found


def plainly(sites, plan, present, folder):
    """The same rounds without messages or masks: the updates of those who were there, folded."""
    models = ModelCache(CHOICES)
    runs = {
        site.name: SiteRun(site, state=folder / site.name, plan=plan, run="plain", models=models)
        for site in sites
    }
    for run in runs.values():  # nothing is released here: what a round leaves counts at once
        run.__dict__["_memory"] = ProcessMemory()
    layout = next(iter(runs.values())).training.trainable.model.layout
    strategy = strategy_for(plan, layout=layout)
    terms = {
        name: Terms(node=i, site=name, declared_units=run.dataset.declared_units)
        for i, (name, run) in enumerate(runs.items())
    }
    strategy.cohort = {term.node: term for term in terms.values()}
    adapter = initial_adapter(layout, plan)
    for number in range(1, plan.rounds.number + 1):
        strategy.begin(number, adapter)
        for name in sorted(present[number]):
            strategy.fold(terms[name], update_of(runs[name], adapter, number))
        adapter = strategy.finish(adapter, server_round=number)
    return adapter


def update_of(run, adapter, number):
    """A site's update of a round as its training gives it, with the noise that it lacks and no more.

    No sum is shortened here: whatever else a site does to it beside its ledger would be seen.
    """
    plan, layout = run.plan, run.layout
    spans = layout.spans(method_of(plan).sent(plan, number))
    missing = missing_noise(plan, [span.part for span in spans], sigma=run.sigma)
    if not missing:
        return trainer_of(run).round(adapter, number).flat
    sums = run.training.round(adapter, number, clip=None, prior=None).flat
    noise = noise_for(plan.plan.seed, "update", run.site.name, number)
    stds = [missing[span.part] for span in spans]
    return noised(np.array(sums), stds, [span.size for span in spans], noise=noise)


def random_faults(names, rounds, *, seed):
    """One or two sites a round, gone from some phase on; every phase several times."""
    rng = random.Random(seed)
    found = []
    for number in range(1, rounds + 1):
        phases = [PHASES[number % len(PHASES)], rng.choice(PHASES)]
        sites = rng.sample(names, 2 if number % 5 == 0 else 1)
        found += [f"{site} {number} {phase}" for site, phase in zip(sites, phases, strict=False)]
    return found
