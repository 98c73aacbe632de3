"""What finds faults: each catcher runs the product's own code and raises if a promise does not hold.

Where a self-check of the product finds a fault, the run itself refuses (`SilotuneError`); an audit
measures a bound above the claim, and the others compare (`AssertionError`).
"""

import csv
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
import torch
from dp_accounting import ComposedDpEvent, DpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant
from flwr.app import RecordDict

from silotune.client import run_files
from silotune.client.model_cache import ModelCache
from silotune.client.site_run import SiteRun
from silotune.client.trainer import UnitSampler
from silotune.data.site import load_sites
from silotune.errors import BudgetExceeded, LedgerDamaged, ReleaseConflict, SilotuneError
from silotune.models.base import load_model
from silotune.models.layout import initial_adapter
from silotune.privacy.attacks.bounds import audit_step
from silotune.privacy.errors import RoundUsed
from silotune.privacy.events import from_json
from silotune.privacy.ledger import Budget, Ledger, ReleaseKey
from silotune.privacy.noise import SecureNoise, SeededNoise
from silotune.privacy.secagg.site import SiteRound
from silotune.simulation.step_audit import step_scores
from tests.federation import CHOICES, PRIVATE, Federation, write_federation
from tests.privacy.secagg.secagg_world import World as Cohort
from tests.privacy.secagg.secagg_world import vectors_for

STEP = {
    **PRIVATE,
    "privacy.delta": 1e-5,
    "privacy.rate": 1.0,
    "rounds.number": 1,
    "rounds.evaluate_every": 0,
    "optimizer.site.head_rounds": 0,
}
SHARED = {
    "aggregation.secure": True,
    "aggregation.cohort": 3,
    "aggregation.threshold": 3,
    "rounds.min_sites": 3,
    "privacy.noise": "shared",
}


class World:
    """Small federations that catchers look at, made once and copied where a catcher changes them."""

    def __init__(self, folder: Path, bert: Path, llama: Path) -> None:
        self.folder, self.bert, self.llama = folder, bert, llama
        self._copies = 0

    @cached_property
    def records(self) -> Federation:
        return write_federation(self.folder / "records", self.bert)

    @cached_property
    def patients(self) -> Federation:
        return write_federation(self.folder / "patients", self.bert, patients=True)

    def fresh(self, federation: Federation | None = None) -> Federation:
        """A copy on disk without any state."""
        self._copies += 1
        source = federation or self.records
        folder = self.folder / f"copy{self._copies}"
        shutil.copytree(source.folder, folder, ignore=shutil.ignore_patterns("s"))
        return Federation(folder, source.plan, folder / "plan.toml")

    def site(self, settings, federation: Federation | None = None, **options):
        """One site's part in a run of a private plan, on a fresh state."""
        place = self.fresh(federation)
        return place.runs(place.plan.override({**PRIVATE, **settings}), **options)[0]


@contextmanager
def _refused(error: type[SilotuneError]) -> Iterator[None]:
    """`AssertionError` unless the block is refused with this error."""
    try:
        yield
    except error:
        return
    raise AssertionError(f"nothing was refused as {error.code}")


def start(site):
    return initial_adapter(site.training.trainable.model.layout, site.plan)


# --- audits ----------------------------------------------------------------------------------------


def _audit(federation: Federation, **settings) -> None:
    plan = federation.plan.override({**STEP, **settings})
    seen = step_scores(plan, federation.sites, canaries=3000, seed=1)
    found = audit_step(
        seen.scores, seen.coins, claimed=seen.claimed, mu=seen.mu, delta=plan.privacy.delta
    )
    assert not found.violated, f"measured {found.independent:.2f}, claimed {found.claimed:.2f}"


def audit_of_a_step(world: World) -> None:
    _audit(world.records)


def audit_of_a_patients_step(world: World) -> None:
    _audit(world.patients)


def audit_of_local_steps(world: World) -> None:
    _audit(world.records, **{"rounds.local_steps": 2})


def audit_of_a_shared_step(world: World) -> None:
    _audit(world.records, **SHARED)


# --- what was done is what was charged -------------------------------------------------------------


def charges_name_what_was_done(world: World) -> None:
    """The rates drawn with, the sums let out and their noise, against the ledger's events."""
    site = world.site({"rounds.local_steps": 3, "rounds.evaluate_every": 0})
    rates, stds = [], []
    with pytest.MonkeyPatch.context() as spy:
        draw, add = UnitSampler.draw, SeededNoise.added

        def drawn(sampler, rate, noise):
            rates.append(rate)
            return draw(sampler, rate, noise)

        def added(source, sums, std):
            stds.append(std)
            return add(source, sums, std)

        spy.setattr(UnitSampler, "draw", drawn)
        spy.setattr(SeededNoise, "added", added)
        site.join()
        site.train(start(site), 3)
    (event,) = site.ledger.events("notes")
    leaf, times = _unrolled(event)
    assert isinstance(leaf, PoissonSampledDpEvent)
    assert [leaf.sampling_probability] * times == rates
    sigma, clip = leaf.event.noise_multiplier, site.plan.privacy.clip
    # Two groups of half the squared sensitivity each, noise for each, in every step.
    expected = [sigma * clip.adapter / 0.5**0.5, sigma * clip.head / 0.5**0.5] * times
    assert stds == pytest.approx(expected)


BANDED = {
    "rounds.number": 6,
    "rounds.evaluate_every": 0,
    "optimizer.site.head_rounds": 6,
    "optimizer.server": {"name": "sgd"},
    "privacy.bands": 3,
    "privacy.band_weights": [1.0, 0.75, 0.5],
}


def a_blocks_charge_names_what_its_rounds_did(world: World) -> None:
    """Correlated noise: who could be drawn when, at which rate, and fresh noise, against the ledger."""
    site = world.site(BANDED)
    drawn, fresh = [], []
    with pytest.MonkeyPatch.context() as spy:
        draw, correlate = UnitSampler.draw, run_files.correlated

        def drawing(sampler, rate, noise):
            drawn.append((rate, {int(row) for unit in sampler._units for row in unit}))
            return draw(sampler, rate, noise)

        def correlated(sums, earlier, *, stds, **more):
            fresh.extend(stds)
            return correlate(sums, earlier, stds=stds, **more)

        spy.setattr(UnitSampler, "draw", drawing)
        spy.setattr(run_files, "correlated", correlated)
        site.join()
        for number in range(1, 7):
            site.train(start(site), number)
    blocks = [
        from_json(row.entry.event)
        for row in site.ledger.rows()
        if row.entry.kind == "charge" and row.entry.release == "block"
    ]
    assert len(blocks) == 2
    (leaf, times), _ = map(_unrolled, blocks)
    assert times == 1
    assert {rate for rate, _ in drawn} == {leaf.sampling_probability}
    for first in (0, 3):
        in_turn = [rows for _, rows in drawn[first : first + 3]]
        assert sum(map(len, in_turn)) == len(set.union(*in_turn)), "a unit had two turns in a block"
        assert in_turn == [rows for _, rows in drawn[:3]]
    length = (1.0 + 0.75**2 + 0.5**2) ** 0.5
    expected = leaf.event.noise_multiplier * site.plan.privacy.clip.head * length
    assert len(fresh) >= 6
    assert fresh == pytest.approx([expected] * len(fresh))


def _unrolled(event: DpEvent) -> tuple[DpEvent, int]:
    return (event.event, event.count) if isinstance(event, SelfComposedDpEvent) else (event, 1)


def metrics_have_the_noise_they_are_charged_for(world: World) -> None:
    """Two tables, of the shared and of the site's own model: one unit moves them by sqrt(2) together."""
    site = world.site(
        {
            "aggregation.head": "local",
            "optimizer.site.head_rounds": 0,
            "privacy.metrics_share": 0.1,
            "rounds.evaluate_every": 1,
            "rounds.number": 2,
        }
    )
    stds = []
    with pytest.MonkeyPatch.context() as spy:
        honest = SeededNoise.added

        def added(source, values, std):
            stds.append(std)
            return honest(source, values, std)

        site.join()
        site.train(start(site), 1)
        spy.setattr(SeededNoise, "added", added)
        site.evaluate(start(site), 1)
    event = site.ledger.events("notes")[-1]
    assert len(stds) == 2
    assert min(stds) >= event.noise_multiplier * 2**0.5 * (1 - 1e-9)


def certificate_agrees_with_another_accountant(world: World) -> None:
    site = world.site({"rounds.number": 20, "rounds.evaluate_every": 0})
    site.join()
    for number in (3, 4):
        site.train(start(site), number)
    body = site.finish()
    other = PLDAccountant(value_discretization_interval=1e-3)
    for mechanism in body.mechanisms:
        other.compose(from_json(mechanism.event), mechanism.times)
    assert body.epsilon == pytest.approx(other.get_epsilon(body.delta), rel=0.01)


def budget_is_kept(world: World) -> None:
    """A second run that would pass the site's own limit of 9 is refused when it joins."""
    place = world.fresh()
    plan = place.plan.override({**PRIVATE, "privacy.epsilon": 8.0, "rounds.evaluate_every": 0})
    first = place.runs(plan, run="one")[0]
    first.join()
    with _refused(BudgetExceeded):
        place.runs(plan, run="two")[0].join()


# --- what leaves -----------------------------------------------------------------------------------


def gate_lets_out_what_is_accounted_for(world: World) -> None:
    site = world.site({"privacy.metrics_share": 0.1, "rounds.evaluate_every": 1})
    site.join()
    site.train(start(site), 1)
    site.evaluate(start(site), 1)


def joining_tells_nothing_of_records(world: World) -> None:
    """A site with one record more says the same bytes when it joins."""
    answers = []
    for extra in (False, True):
        place = world.fresh()
        if extra:
            with (place.folder / "alpha" / "notes.csv").open("a", newline="") as file:
                csv.writer(file).writerow(["gout of the left foot", "yes", "new"])
        plan = place.plan.override({**PRIVATE, "privacy.epsilon": 4.0})
        answers.append(place.runs(plan)[0].join())
    assert _plain(answers[0]) == _plain(answers[1])


def _plain(record: RecordDict) -> str:
    return repr({name: dict(config) for name, config in record.config_records.items()})


def resending_is_free(world: World) -> None:
    """The same request again: the same bytes, and one charge."""
    site = world.site({"plan.seed": None, "rounds.evaluate_every": 0})
    site.join()
    adapter = start(site)
    first, again = (_arrays(site.train(adapter, 1)) for _ in range(2))
    assert first == again
    assert len(site.ledger.events("notes")) == 1


def _arrays(record: RecordDict) -> dict[str, bytes]:
    return {
        name: array.numpy().tobytes()
        for arrays in record.array_records.values()
        for name, array in arrays.items()
    }


# --- noise and sampling ----------------------------------------------------------------------------


def noise_is_never_repeated(world: World) -> None:
    del world
    source = SecureNoise()
    one, two = (source.add(torch.zeros(1000), 1.0) for _ in range(2))
    assert not torch.equal(one, two)
    # 1,000 products of independent normals: beyond 0.2 with a probability below 1e-9.
    assert abs(float((one * two).mean())) < 0.2


def secret_runs_differ(world: World) -> None:
    """Two runs of one plan at one site, without a seed: not the same update."""
    place = world.fresh()
    plan = place.plan.override(
        {**PRIVATE, "privacy.epsilon": 2.0, "plan.seed": None, "rounds.evaluate_every": 0}
    )
    updates = []
    for run in ("one", "two"):
        site = place.runs(plan, run=run)[0]
        site.join()
        updates.append(_arrays(site.train(start(site), 1)))
    assert updates[0] != updates[1]


def an_empty_sample_gives_noise(world: World) -> None:
    """With several local steps, whose noise the trainer adds: else there is none to leave out."""
    settings = {"privacy.rate": 1e-6, "rounds.evaluate_every": 0, "rounds.local_steps": 2}
    site = world.site(settings)
    site.join()
    (update,) = _arrays(site.train(start(site), 1)).values()
    assert np.frombuffer(update, np.float32).any()


def samples_are_poisson(world: World) -> None:
    """The size of a Poisson sample varies; that of a fixed one does not."""
    site = world.site({})
    noise = SeededNoise(5)
    sampler = site.training.trainer._samplers[0]
    sizes = [sum(b.n_units for b in sampler.draw(0.3, noise)) for _ in range(400)]
    mean, spread = sampler.units * 0.3, sampler.units * 0.3 * 0.7
    # Five standard errors of a mean and of a variance of 400 binomial numbers: 1e-5.
    assert abs(np.mean(sizes) - mean) < 5 * (spread / 400) ** 0.5
    assert abs(np.var(sizes) / spread - 1) < 5 * (2 / 400) ** 0.5


def units_stay_whole(world: World) -> None:
    """All records of a drawn unit are in one micro-batch, where it is clipped once."""
    site = world.site(
        {"privacy.max_records_per_unit": 2, "privacy.max_physical_batch": 5}, world.patients
    )
    drawn = Counter()
    for batch in site.training.trainer._samplers[0].draw(1.0, SeededNoise(1)):
        drawn.update(set(site.training.records.unit_of[batch.rows].tolist()))
    assert max(drawn.values()) == 1


def a_loss_is_its_own_records(world: World) -> None:
    """A record's loss is the same alone and beside a longer one."""
    plan = world.records.plan.override(
        {
            "model.base": str(world.llama),
            "model.task": "causal_lm",
            "model.labels": None,
            "optimizer.site.head_rounds": 0,
        }
    )
    model = load_model(plan, device="cpu", attention="eager", dtype="float32")
    texts = [("one two", "three"), ("four", "five six seven eight nine ten")]
    examples = [{"prompt": p, "response": r} for p, r in texts]
    encoded = model.task.encode(examples, model.tokenizer, plan=plan)

    def loss(rows):
        inputs = model.task.collate(encoded, rows, model.device)
        return float(model.task.losses(model.module, inputs)[0])

    with model.module.inference():
        assert loss([0]) == pytest.approx(loss([0, 1]), rel=1e-4)


# --- memory ----------------------------------------------------------------------------------------


def a_rolled_back_ledger_is_refused(world: World) -> None:
    """The table of an hour ago, put back between two runs of the process."""
    path = world.fresh().folder / "state" / "ledger.sqlite"
    path.parent.mkdir()
    kept = path.with_name("kept")
    event = from_json('{"kind":"Gaussian","noise_multiplier":2.0}')
    ledger, run = Ledger(path), ComposedDpEvent([event] * 3)
    ledger.reserve("notes", "r", "ab" * 32, run, budget=Budget(9.0, 1e-3))
    ledger.charge("notes", ReleaseKey("r", 1, "update"), "ab" * 32, event, "cd" * 32)
    shutil.copy(path, kept)
    ledger.charge("notes", ReleaseKey("r", 2, "update"), "ab" * 32, event, "ce" * 32)
    ledger.close()
    path.write_bytes(kept.read_bytes())
    with _refused(LedgerDamaged):
        Ledger(path).close()


def another_release_under_a_used_key_is_refused(world: World) -> None:
    """The ledger knows what was sent under a key; other bytes under it would be a free answer."""
    path = world.fresh().folder / "state" / "ledger.sqlite"
    path.parent.mkdir()
    event = from_json('{"kind":"Gaussian","noise_multiplier":2.0}')
    ledger, key = Ledger(path), ReleaseKey("r", 1, "update")
    run = ComposedDpEvent([event] * 3)
    ledger.reserve("notes", "r", "ab" * 32, run, budget=Budget(9.0, 1e-3))
    ledger.charge("notes", key, "ab" * 32, event, "cd" * 32)
    with closing(ledger), _refused(ReleaseConflict):
        ledger.charge("notes", key, "ab" * 32, event, "ce" * 32)


def changed_records_are_trained_on(world: World) -> None:
    """A process that goes on after a site's file changed sees the new records."""
    place = world.fresh()
    plan = place.plan.override(PRIVATE)
    models = ModelCache(CHOICES)

    def features():
        site = load_sites(place.folder)[0]
        run = SiteRun(site, state=place.folder / "x", plan=plan, run="r", models=models)
        return run.training.trainer.frozen.features.clone()

    before, notes = features(), place.folder / "alpha" / "notes.csv"
    notes.write_text(notes.read_text().replace("left", "lower"))
    assert not torch.equal(before, features())


# --- secure aggregation ----------------------------------------------------------------------------


def masks_hide_an_update(world: World) -> None:
    """A masked vector of zeros looks like any other: uniform words, none of them twice."""
    del world
    cohort = Cohort(3, threshold=2)
    cohort.advertise()
    cohort.share()
    cohort.mask(dict.fromkeys(cohort.names, np.zeros(4096, dtype=np.uint32)))
    for vector in cohort.wire["masked"].values():
        high = np.bincount(vector >> 28, minlength=16)
        # Sixteen bins of 256 expected each: chi-square of 15 degrees passes 80 once in 1e10.
        assert float(((high - 256) ** 2 / 256).sum()) < 80
        assert len(np.unique(vector)) > 4080


def one_survivor_set_is_opened(world: World) -> None:
    """Two sets would give away the difference: one site's update."""
    del world
    cohort = Cohort(5, threshold=3)
    cohort.advertise()
    cohort.share()
    cohort.mask(vectors_for(cohort.names, 8))
    site: SiteRound = cohort.sites[cohort.names[0]]
    site.sign(cohort.names)
    with _refused(RoundUsed):
        site.sign(cohort.names[:4])


def sums_are_exact(world: World) -> None:
    """What is unmasked is the sum of what the sites put in."""
    del world
    cohort = Cohort(4, threshold=3)
    vectors = vectors_for(cohort.names, 64)
    total = cohort.run({name: vector.copy() for name, vector in vectors.items()})
    expected = sum(vector.astype(np.uint64) for vector in vectors.values()) % (1 << 32)
    assert (total == expected).all()


def a_withdrawn_record_is_forgotten(world: World) -> None:
    """The next run in the same process sees the file as it is now."""
    place, models = world.fresh(), ModelCache(CHOICES)
    path = place.folder / "alpha" / "notes.csv"

    def features(run):
        site = SiteRun(
            place.sites[0], state=place.folder / "s", plan=place.plan, run=run, models=models
        )
        return site.training.trainer.frozen.features

    before = features("first")
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    assert len(features("second")) == len(before) - 1
