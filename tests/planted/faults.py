"""Faults that are planted one at a time in the running code, and which catcher finds each.

A new one is one line: what is wrong, how to plant it, who must find it, and in which way.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from silotune.client import site_run, updates
from silotune.client import trainer as sampling
from silotune.client.errors import RoundUnanswered
from silotune.client.gate import DpRelease, Gate, Public
from silotune.client.model_cache import ModelCache
from silotune.client.site_run import SiteRun
from silotune.client.trainer import MicroBatch, SiteData, TrainableModel, Trainer, UnitSampler
from silotune.errors import SilotuneError, ValueUnaccounted
from silotune.models.tasks.causal_lm import CausalLm
from silotune.plan.plan import Plan
from silotune.privacy import accounting, engine
from silotune.privacy import noise as noise_module
from silotune.privacy.engine import ClipGroup, DpSgd
from silotune.privacy.ledger import Ledger
from silotune.privacy.noise import SeededNoise, _KeyedNoise
from silotune.privacy.secagg import coordinator as secagg_coordinator
from silotune.privacy.secagg import site as secagg_site
from silotune.privacy.secagg.encoding import Mask
from silotune.privacy.secagg.site import SiteRound
from silotune.trust.chain import Chain
from tests.planted import catchers

Patch = pytest.MonkeyPatch
Plant = Callable[[Patch], None]
Catcher = Callable[[catchers.World], None]


@dataclass(frozen=True)
class Fault:
    """One row of the table.

    Attributes
    ----------
    what : str
        What is wrong.
    plant : callable
        Plants it for the length of a test.
    catcher : callable
        Of `tests.planted.catchers`.
    raises : type
        How it is caught: an error of the product's own, or an assertion of an audit or test.
    """

    what: str
    plant: Plant
    catcher: Catcher
    raises: type[Exception] = AssertionError


def put(owner: Any, name: str, value: Any) -> Plant:
    """Plant a value in place of an attribute."""
    return lambda patch: patch.setattr(owner, name, value)


def wrap(owner: Any, name: str, change: Callable[..., Any]) -> Plant:
    """Plant ``change(original, *arguments)`` in place of a function."""
    honest = getattr(owner, name)

    def planted(*args: Any, **kwargs: Any) -> Any:
        return change(honest, *args, **kwargs)

    return lambda patch: patch.setattr(owner, name, planted)


def both(*plants: Plant) -> Plant:
    """Several at once, where one alone is stopped by a check that is to be faulty too."""

    def plant(patch: Patch) -> None:
        for one in plants:
            one(patch)

    return plant


# --- faults that take more than a line -------------------------------------------------------------


class _LooseHead(ClipGroup):
    """A head that is clipped at ten times the norm that its noise is sized for."""

    def noise_std(self, sigma: float) -> float:
        return super().noise_std(sigma) / 10


def _head_not_clipped(honest: Any, model: Any, parts: Any) -> list[ClipGroup]:
    return [
        _LooseHead(g.name, g.parameters, 10 * g.clip, g.share) if g.name == "head" else g
        for g in honest(model, parts)
    ]


def _clip_each_record(honest: Any, self: Any, losses: Any, **units: Any) -> None:
    del units
    honest(self, losses)


def _no_noise(self: Any, values: Any, std: float) -> Any:
    del self, std
    return values.astype(np.float32)


def _half_of_the_noise(honest: Any, self: Any, values: Any, std: float) -> Any:
    return honest(self, values, std / 2)


def _half_asked_for(honest: Any, plan: Plan, parts: Any, *, sigma: float) -> Any:
    return honest(plan, parts, sigma=sigma / 2)


def _of_one_row(honest: Any, plan: Plan, parts: Any, *, sigma: float) -> Any:
    return honest(plan, parts, sigma=sigma / math.hypot(*plan.privacy.column))


def _whole_share(honest: Any, plan: Plan, parts: Any, *, sigma: float) -> Any:
    """As if each group had all of the sensitivity."""
    found = honest(plan, parts, sigma=sigma)
    return {part: sigma * plan.privacy.clipping.of(part).norm for part in found}


def _skip_empty(honest: Any, self: Any, used: Any, phase: Any, noise: Any) -> Any:
    sums, records = honest(self, used, phase, noise)
    return ([torch.zeros_like(s) for s in sums], 0) if not records else (sums, records)


def _fixed_batch(self: UnitSampler, rate: float, noise: Any) -> list[MicroBatch]:
    count = round(self.units * rate)
    chosen = np.argsort(noise.uniform(self.units))[:count]
    return [self._numbered(self._units[unit].tolist()) for unit in chosen]


def _mean_over_the_batch(self: CausalLm, model: Any, batch: Any) -> torch.Tensor:
    logits, labels = model(batch).float(), batch["labels"]
    each = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), labels, reduction="none", ignore_index=-100
    )
    return each.sum(1) / (labels != -100).sum() * len(labels)


def _with_field(field: Any) -> Callable[..., Any]:
    """The gate is given one more field, made of the number of training units."""

    def change(honest: Any, gate: Any, key: Any, *, fields: Any, **rest: Any) -> Any:
        return honest(gate, key, fields={**fields, "count": field}, **rest)

    return change


def _true_units(honest: Any, *args: Any, **kwargs: Any) -> None:
    """A site that weighs itself by the number of units that it has."""
    honest(*args, **kwargs)
    site = args[0]
    site.dataset = site.dataset.model_copy(
        update={"declared_units": site.training.records.n_units()}
    )


def _counted(honest: Any, site: SiteRun) -> Any:
    """A count of records among the fields that are called public."""
    release = site.gate.release

    def told(key: Any, *, fields: Any, mechanisms: Any = None) -> Any:
        count = Public(len(site.training.records), "site.toml: declared_units")
        return release(key, fields={**fields, "records": count}, mechanisms=mechanisms or {})

    site.gate.release = told  # type: ignore[method-assign]
    return honest(site)


def _repeated(honest: Any, self: Any, words: int, blocks: int) -> Any:
    kept = self._key
    found = [block.copy() for block in honest(self, words, blocks)]
    self._key = kept
    return iter(found)


def _uncharged(honest: Any, gate: Any, key: Any, *, fields: Any, **rest: Any) -> Any:
    del rest
    return honest(gate, key, fields=fields)


def _same_digest(honest: Any, ledger: Any, dataset: str, key: Any, *rest: Any) -> None:
    """A ledger that keys charges by their name and doesn't look at what was sent."""
    paid = ledger._paid.get(key)
    honest(ledger, dataset, key, *rest[:-1], paid.payload_sha256 if paid else rest[-1])


def _forget_what_was_signed(honest: Any, site: SiteRound, *args: Any) -> Any:
    site._state.signed_for = b""
    return honest(site, *args)


def _head_follows_the_table(honest: Any, chain: Chain) -> Any:
    """A chain that takes its head from the table that it is to guard."""
    return chain.end


def _lower(honest: Any, *args: Any, **kwargs: Any) -> float:
    return 0.8 * honest(*args, **kwargs)


def _constant_masks(honest: Any, vector: Any, given: Any) -> None:
    """Every mask the same number over and over: sums are right, and nothing is hidden."""
    del honest
    for mask in given:
        combine = np.add if mask.plus else np.subtract
        combine(vector, vector.dtype.type(mask.key[0]), out=vector)


def _first_features(honest: Any, models: Any, *args: Any, **named: Any) -> Any:
    """What the base model made of the first records that this process saw."""
    kept = models.__dict__.setdefault("_first", {})
    if "it" not in kept:
        kept["it"] = honest(models, *args, **named)
    return kept["it"]


_no_sqrt = SimpleNamespace(**{n: getattr(math, n) for n in dir(math) if not n.startswith("_")})
_no_sqrt.sqrt = lambda value: 1.0

_SHARE_OF_VARIANCE = wrap(
    updates,
    "missing_noise",
    lambda honest, plan, parts, *, sigma: {
        part: std / math.sqrt(plan.aggregation.threshold)
        for part, std in honest(plan, parts, sigma=sigma).items()
    },
)

# --- the table -------------------------------------------------------------------------------------


def _stale(
    honest: Any, models: ModelCache, site: Any, plan: Plan, encoded: Any, **named: Any
) -> Any:
    """Features by the site's folder alone."""
    kept = vars(models).setdefault("_by_folder", {})
    if site.folder not in kept:
        kept[site.folder] = honest(models, site, plan, encoded, **named)
    return kept[site.folder]


FAULTS = [
    Fault(
        "noise off",
        put(_KeyedNoise, "added", _no_noise),
        catchers.charges_name_what_was_done,
        RoundUnanswered,
    ),
    Fault(
        "half of the noise drawn",
        wrap(_KeyedNoise, "added", _half_of_the_noise),
        catchers.audit_of_a_step,
        SilotuneError,
    ),
    Fault(
        "half of the noise asked for",
        wrap(updates, "missing_noise", _half_asked_for),
        catchers.audit_of_a_step,
    ),
    Fault(
        "half of the noise of local steps asked for",
        wrap(engine.ClipGroup, "noise_std", lambda f, group, sigma: f(group, sigma / 2)),
        catchers.audit_of_local_steps,
    ),
    Fault(
        "half of the noise, shared",
        wrap(updates, "missing_noise", _half_asked_for),
        catchers.audit_of_a_shared_step,
    ),
    Fault(
        "a group's share of the sensitivity left out",
        wrap(updates, "missing_noise", _whole_share),
        catchers.audit_of_a_step,
    ),
    Fault(
        "a share too small by the root of the sites",
        _SHARE_OF_VARIANCE,
        catchers.audit_of_a_shared_step,
    ),
    Fault(
        "the head not clipped",
        wrap(TrainableModel, "_groups", _head_not_clipped),
        catchers.audit_of_a_step,
    ),
    Fault(
        "norms measured ten times too small, and not measured again",
        both(
            wrap(engine, "unit_norms", lambda f, *a: f(*a) / 10),
            put(engine._UnitClipper, "_clipped_again", lambda *a: a[-1]),
        ),
        catchers.audit_of_a_step,
    ),
    Fault(
        "each record clipped, where patients are protected",
        wrap(DpSgd, "accumulate", _clip_each_record),
        catchers.audit_of_a_patients_step,
    ),
    Fault(
        "a patient's records in several batches",
        wrap(sampling, "batches", lambda f, e, r, *, size, units: f(e, r, size=size)),
        catchers.units_stay_whole,
    ),
    Fault(
        "a loss averaged over the batch's tokens",
        put(CausalLm, "losses", _mean_over_the_batch),
        catchers.a_loss_is_its_own_records,
    ),
    Fault(
        "half of the rate in the accounting",
        wrap(Plan, "release_rate", lambda f, p, n: f(p, n) / 2),
        catchers.charges_name_what_was_done,
    ),
    Fault(
        "twice the rate in the sampling",
        wrap(UnitSampler, "draw", lambda f, s, rate, noise: f(s, 2 * rate, noise)),
        catchers.samples_are_poisson,
    ),
    Fault(
        "batches of a fixed size",
        put(UnitSampler, "draw", _fixed_batch),
        catchers.samples_are_poisson,
    ),
    Fault(
        "one of several local steps charged",
        put(Plan, "releases_a_round", 1),
        catchers.charges_name_what_was_done,
    ),
    Fault(
        "a unit drawn in every round, where noise is correlated over rounds",
        put(SiteData, "train_in", lambda data, turn, *, bands: data.train),
        catchers.a_blocks_charge_names_what_its_rounds_did,
    ),
    Fault(
        "the rate of independent rounds charged, where a block of them is",
        wrap(Plan, "release_rate", lambda f, p, n: p.rate_for(n)),
        catchers.a_blocks_charge_names_what_its_rounds_did,
    ),
    Fault(
        "one block's charge for the whole run",
        put(Plan, "block_of", lambda plan, number: 1),
        catchers.a_blocks_charge_names_what_its_rounds_did,
    ),
    Fault(
        "noise of one round's size, where a unit moves several rows",
        wrap(updates, "missing_noise", _of_one_row),
        catchers.a_blocks_charge_names_what_its_rounds_did,
    ),
    Fault(
        "an empty sample's step left out",
        wrap(Trainer, "_step", _skip_empty),
        catchers.an_empty_sample_gives_noise,
    ),
    Fault(
        "seeded noise in a secret run",
        put(noise_module, "SecureNoise", lambda: SeededNoise(1)),
        catchers.secret_runs_differ,
    ),
    Fault(
        "a key used for two keystreams",
        wrap(_KeyedNoise, "_keystream", _repeated),
        catchers.noise_is_never_repeated,
    ),
    Fault(
        "an accountant that understates",
        wrap(accounting, "_epsilon", _lower),
        catchers.certificate_agrees_with_another_accountant,
    ),
    Fault(
        "the root of two tables of metrics dropped",
        put(site_run, "math", _no_sqrt),
        catchers.metrics_have_the_noise_they_are_charged_for,
    ),
    Fault(
        "metrics charged as with twice their noise",
        wrap(site_run, "gaussian_event", lambda f, sigma: f(2 * sigma)),
        catchers.metrics_have_the_noise_they_are_charged_for,
    ),
    Fault(
        "a release without its charge",
        wrap(Gate, "release", _uncharged),
        catchers.gate_lets_out_what_is_accounted_for,
        RoundUnanswered,
    ),
    Fault(
        "a count through the gate, bare",
        wrap(Gate, "release", _with_field(60)),
        catchers.gate_lets_out_what_is_accounted_for,
        ValueUnaccounted,
    ),
    Fault(
        "a count through the gate, called noisy",
        wrap(Gate, "release", _with_field(DpRelease(60, "none"))),
        catchers.gate_lets_out_what_is_accounted_for,
        ValueUnaccounted,
    ),
    Fault(
        "a count through the gate, called public",
        wrap(SiteRun, "join", _counted),
        catchers.joining_tells_nothing_of_records,
    ),
    Fault(
        "the true count in place of declared_units",
        wrap(SiteRun, "__init__", _true_units),
        catchers.joining_tells_nothing_of_records,
    ),
    Fault(
        "a repeated request trained again",
        put(Gate, "recall", lambda gate, key: None),
        catchers.resending_is_free,
        SilotuneError,
    ),
    Fault(
        "other bytes under a used key",
        wrap(Ledger, "charge", _same_digest),
        catchers.another_release_under_a_used_key_is_refused,
    ),
    Fault(
        "a budget that is not looked at",
        put(Ledger, "_require_within", lambda *a: None),
        catchers.budget_is_kept,
    ),
    Fault(
        "a rolled back ledger",
        wrap(Chain, "read_head", _head_follows_the_table),
        catchers.a_rolled_back_ledger_is_refused,
    ),
    Fault(
        "a constant mask",
        both(
            wrap(secagg_site, "apply_masks", _constant_masks),
            wrap(secagg_coordinator, "apply_masks", _constant_masks),
        ),
        catchers.masks_hide_an_update,
    ),
    Fault(
        "both sites of a pair add their mask",
        wrap(secagg_site, "pairwise_mask", lambda f, *a, **k: Mask(f(*a, **k).key, True)),
        catchers.sums_are_exact,
    ),
    Fault(
        "a second survivor set opened",
        wrap(SiteRound, "sign", _forget_what_was_signed),
        catchers.one_survivor_set_is_opened,
    ),
    Fault(
        "a stale cache",
        wrap(ModelCache, "frozen", _stale),
        catchers.a_withdrawn_record_is_forgotten,
    ),
]
