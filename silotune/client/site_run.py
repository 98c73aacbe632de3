"""A site's part in a run: policy, ledger, noise and gate around a training that has the records.

Nothing here reads a record or loads a model: `silotune.client.training.base.Training` does, which at a
real site is a process of its own and is not believed. What is charged, the shape and type of what is
released and the noise in it follow from the plan and from the base model alone.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import RecordDict
from numpy.typing import NDArray

from silotune.client import evaluation
from silotune.client.errors import BroadcastRefused, RankRefused, RoundUnanswered, TrainerFault
from silotune.client.gate import DpRelease, Field, Gate, Public, Unprotected
from silotune.client.judging import local_time
from silotune.client.policy import Facts, facts_for, judge
from silotune.client.run_files import (
    FEWEST_ROUNDS,
    MEMORY,
    OUTBOX,
    ROUNDS,
    FileKind,
    RunFiles,
    SealedMemory,
)
from silotune.client.secure import SecurePart, member_of
from silotune.client.terms import (
    budget_for,
    metric_sigma,
    require_small_delta,
    require_uncolluding,
    round_event,
    run_events,
    sigma_for,
)
from silotune.client.training.base import (
    LoadedAs,
    RecordsRead,
    Trainers,
    Training,
    TrainingJob,
    Vector,
)
from silotune.client.troubles import Troubles
from silotune.client.updates import Updates
from silotune.data.declared import own_secret, require_declared
from silotune.data.site import DatasetConfig, SiteConfig
from silotune.errors import (
    EnvironmentFault,
    ModelError,
    PolicyError,
    PrivacyError,
    RunError,
    SelfCheckFailed,
    ValueUnaccounted,
)
from silotune.models.layout import Layout, statistics_layout
from silotune.plan.plan import Plan
from silotune.privacy.certificate import CertificateBody, issue
from silotune.privacy.events import ComposedDpEvent, DpEvent, gaussian_event
from silotune.privacy.ledger import LEDGER_FILE, Ledger, ReleaseKey
from silotune.privacy.noise import NoiseSource, noise_for
from silotune.protocol.errors import MessageRefused
from silotune.protocol.replies import EvaluateReply, JoinReply, TrainReply
from silotune.trust.identity import load_or_create
from silotune.trust.vault import Vault

_log = logging.getLogger(__name__)

_MOST_WEIGHT = 1e6  # of a number in an adapter: far more than any that is of use

_TELLABLE = (PolicyError, PrivacyError, RunError, ModelError, EnvironmentFault)
_UNTELLABLE = (SelfCheckFailed, ValueUnaccounted, TrainerFault)


@dataclass(frozen=True)
class SealingKeys:
    """What a site seals and signs with."""

    vault: Vault
    signing: Ed25519PrivateKey

    @classmethod
    def beside(cls, state: Path, *, to_disk: bool = True) -> SealingKeys:
        """Keys that lie in the state itself, made on first use: those of a simulated site."""
        vault = Vault(state, to_disk=to_disk)
        return cls(vault, load_or_create(state / "signing.key", to_disk=to_disk))


class SiteRun:
    """One site's part in one run: answers the coordinator's three kinds of message.

    Parameters
    ----------
    site : SiteConfig
        The site's own word: datasets, declared units, budgets.
    state : Path
        Folder of the ledger, outbox and certificate.
    plan : Plan
        The run's plan.
    run : str
        The run's name.
    models : Trainers
        Gives the run its training: `silotune.client.model_cache.ModelCache` in this process.
    keys : SealingKeys, optional
        What to seal and sign with; by default `SealingKeys.beside` the state.
    to_disk : bool
        Force ledger and outbox to the disk before anything leaves. False is for simulations, whose
        sites release nothing to anybody: a run then survives any kill, but not a power cut.
    roster : mapping of site to bytes, optional
        Raw Ed25519 public keys of all enrolled sites, which secure aggregation needs.
    secret : bytes, optional
        The site's own (`silotune.data.records`), if not the one in the state.
    on_records : callable, optional
        Told each time the records were read.
    """

    def __init__(
        self,
        site: SiteConfig,
        *,
        state: Path,
        plan: Plan,
        run: str,
        models: Trainers,
        keys: SealingKeys | None = None,
        to_disk: bool = True,
        roster: Mapping[str, bytes] | None = None,
        secret: bytes | None = None,
        on_records: Callable[[RecordsRead], None] | None = None,
    ) -> None:
        self.site, self.plan, self.run, self._to_disk = site, plan, run, to_disk
        self._roster, self._given_secret, self._on_records = roster, secret, on_records
        self._keys = keys or SealingKeys.beside(state, to_disk=to_disk)
        self._state, self._trainers = state, models
        self.dataset: DatasetConfig = site.dataset(plan.data.dataset)

    # --- what the coordinator may ask ---

    def admit(self) -> None:
        """Let the site's policy judge the plan, before anything is loaded or computed for it.

        Called for every message, whatever it asks.

        Raises
        ------
        PolicyError
            Of the first clause that refuses.
        """
        if self.site.policy is not None:
            judge(self.site.policy, self.plan, replace(self._facts, moment=local_time())).require()

    def join(self) -> RecordDict:
        """Check that the plan can be served here, reserve its budget, and declare the terms."""
        self._require_rank()
        self.require_declared()
        loaded = self.loaded
        if self.plan.aggregation.secure:
            self.secure.require_fine_enough(sigma=self.sigma)
        self._reserve()
        declared = self.dataset.declared_units
        more: dict[str, Field] = {}
        if self.rank != self.plan.lora.r:
            more["rank"] = Public(self.rank, "site.toml: resources.max_rank")
        if self.plan.private:
            more["sigma"] = Public(self.sigma, "plan: privacy.epsilon over the declared units")
        fields = JoinReply.fields(
            site=Public(self.site.name, "site.toml: name"),
            declared_units=Public(declared, "site.toml: declared_units"),
            layout=Public(loaded.layout.to_json(), "plan: model and lora, or what is counted"),
            dtype=Public(loaded.dtype, "plan: dtype; this machine"),
            rate=Public(self.plan.release_rate(declared), "plan: privacy.rate or privacy.batch"),
            **more,
        )
        try:
            self.training.prepare()
        except Exception as exc:
            if not self.plan.private or not self._to_disk:
                raise  # nothing is kept from the coordinator, or there is none
            # The site has agreed: whether its records can be used is for its own people.
            self.troubles.add("unprepared", round=0, error=exc)
        return self.gate.release(ReleaseKey(self.run, 0, "join"), fields=fields)

    def require_declared(self) -> None:
        """Judge the plan by what the site declares of its dataset. Raises as `data.records` says."""
        require_declared(self.site, self.plan, roles=self.plan.roles)
        require_small_delta(self.plan, self.site)

    def train(self, adapter: Vector, server_round: int, *, clip: float | None = None) -> RecordDict:
        """The site's update of a round; a repeated request gets the first answer again."""
        self._require_round(server_round, secure=False)
        key = ReleaseKey(self.run, server_round, "update")
        if (again := self.gate.recall(key)) is not None:
            return again
        self._require_usable(adapter)
        event = self._round_event
        with self._untold():
            mechanisms = {} if event is None else {"steps": event}
            if mechanisms:
                self._charge(key, mechanisms)
            flat = self.updates.of_round(adapter, server_round, clip=clip).flat
            return self.gate.release(
                key,
                fields=TrainReply.fields(
                    update=DpRelease(flat, "steps") if mechanisms else Unprotected(flat)
                ),
                mechanisms=mechanisms,
                beside=self._promote(server_round),
            )

    def train_masked(
        self, adapter: Vector, number: int, *, present: Sequence[str], sealed: Mapping[str, bytes]
    ) -> RecordDict:
        """The site's update of a secure round, masked: see `SecurePart.masked`."""
        part, key = self.in_secure(number), ReleaseKey(self.run, number, "update")
        self._require_usable(adapter)
        event = self._round_event

        def charge() -> None:
            if event is not None:
                self._charge(key, {"steps": event})

        with self._untold():
            return part.masked(
                number,
                present=present,
                sealed=sealed,
                charge=charge,
                train=lambda: self.updates.of_round(adapter, number),
                noise=self._noise("ring", number),
                beside=self._promote(number),
            )

    def in_secure(self, server_round: int) -> SecurePart:
        """The site's part in a secure round. Raises `MessageRefused` if the plan has no such round."""
        self._require_round(server_round, secure=True)
        return self.secure

    # --- what can be seen from outside, whatever the records are ---

    def _require_usable(self, adapter: Vector) -> None:
        """Look at what was sent before any record is touched, so that none can make it fail."""
        size = self.layout.size
        if adapter.shape != (size,):
            raise BroadcastRefused(f"the adapter has shape {list(adapter.shape)}, not [{size}]")
        if not np.isfinite(adapter).all() or np.abs(adapter).max(initial=0.0) > _MOST_WEIGHT:
            raise BroadcastRefused("a number of the adapter is not finite, or beyond a million")

    def _charge(self, key: ReleaseKey, mechanisms: Mapping[str, DpEvent]) -> None:
        """Charge a release before it is worked on; at most one that was cut short is tried again.

        Raises
        ------
        RoundUnanswered
            The run failed here, or its process died, too often: its people must look at it.
        """
        if self.troubles.too_many:
            raise RoundUnanswered
        if self.gate.charge(key, mechanisms) or not self._to_disk:
            return
        # Charged, and nothing released: whoever worked on it died. One content only ever leaves.
        self.troubles.add("died", round=key.round)
        if self.troubles.too_many:
            raise RoundUnanswered

    @contextmanager
    def _untold(self) -> Iterator[None]:
        """Of a private plan's errors only those cross whose reasons are messages and books."""
        try:
            yield
        except _UNTELLABLE as exc:
            if not self.plan.private:
                raise
            raise RoundUnanswered from exc
        except _TELLABLE:
            raise
        except Exception as exc:
            if not self.plan.private:
                raise
            raise RoundUnanswered from exc

    def _promote(self, server_round: int) -> Callable[[str], None] | None:
        if not self.updates.remembers:
            return None
        return lambda digest: self._memory.promote(server_round, digest)

    @property
    def _round_event(self) -> DpEvent | None:
        return round_event(self.plan, self.dataset.declared_units, sigma=self.sigma)

    @cached_property
    def troubles(self) -> Troubles:
        """What went wrong in this run, for the site's own people."""
        return Troubles(self._state, run=self.run)

    @cached_property
    def _memory(self) -> SealedMemory:
        bands = self.plan.privacy.bands

        def released(number: int) -> str | None:
            # Noise of a round that was charged before the run was settled is never taken back: in
            # restored books others may have gone on from it.
            key = ReleaseKey(self.run, number, "update")
            return self.gate.released(key, since_opened=bands > 1)

        return SealedMemory(self._files(MEMORY), released=released, kept=max(FEWEST_ROUNDS, bands))

    def evaluate(self, adapter: Vector, server_round: int) -> RecordDict:
        """Counts on the validation units, noisy unless the plan is not private."""
        self._require_round(server_round)
        every = self.plan.rounds.evaluate_every
        if not every or server_round % every:
            raise MessageRefused(f"the plan has no evaluation after round {server_round}")
        key = ReleaseKey(self.run, server_round, "metrics")
        if (again := self.gate.recall(key)) is not None:
            return again
        self._require_usable(adapter)
        if not self.plan.private:
            found = self._tables(adapter, server_round)
            fields = EvaluateReply.fields(**{n: Unprotected(v) for n, v in found.items()})
            return self.gate.release(key, fields=fields)
        with self._untold():
            return self._noisy_tables(key, adapter)

    def _tables(self, adapter: Vector, server_round: int) -> Mapping[str, NDArray[np.float64]]:
        """Counts of the shared adapter, and of the site's own where it keeps parts."""
        found = self.training.tables(adapter, prior=self.updates.prior(before=server_round + 1))
        if set(found) != set(self._table_names):
            raise SelfCheckFailed("the counts are not those of the plan")
        units = self.dataset.declared_units
        return {
            name: evaluation.bounded(values, self.plan, units=units)
            for name, values in found.items()
        }

    @property
    def _table_names(self) -> tuple[str, ...]:
        return ("counts", "personal") if self.updates.keeps_parts else ("counts",)

    def _noisy_tables(self, key: ReleaseKey, adapter: Vector) -> RecordDict:
        sigma, noise = metric_sigma(self.plan), self._noise("metrics", key.round)
        event = gaussian_event(sigma)
        self._charge(key, {"counts": event})
        try:
            found = self._tables(adapter, key.round)
        except Exception as exc:
            self.troubles.add("blank", round=key.round, error=exc)
            found = {name: evaluation.nothing(self.plan) for name in self._table_names}
        # One unit moves every table: together they are one release of sqrt(tables) the sensitivity.
        reach = evaluation.sensitivity(self.plan) * math.sqrt(len(found))
        made = {
            name: evaluation.noisy(v, sigma=sigma, sensitivity=reach, noise=noise)
            for name, v in found.items()
        }
        released = EvaluateReply.fields(**{n: DpRelease(v, "counts") for n, v in made.items()})
        return self.gate.release(key, fields=released, mechanisms={"counts": event})

    def finish(self, certificate: Path | None = None) -> CertificateBody | None:
        """Settle the reservation and write the certificate; None if nothing was charged.

        It is written to ``certificate.json`` of the state unless another place is given.
        """
        if self.ledger is None:
            return None
        self.ledger.settle(self.plan.data.dataset, self.run)
        accounts = self.ledger.runs(self.plan.data.dataset)
        if not any(account.charged for account in accounts if account.run == self.run):
            return None
        return issue(
            certificate or self._state / "certificate.json",
            ledger=self.ledger,
            dataset=self.plan.data.dataset,
            run=self.run,
            plan=self.plan,
            site=self.site.name,
            model_sha256=self.training.weights_sha256(),
            secure_noise=self.plan.plan.seed is None,
            key=self._keys.signing,
        )

    # --- parts, each made on first use ---

    @cached_property
    def job(self) -> TrainingJob:
        """What its training is for."""
        return TrainingJob(
            site=self.site,
            plan=self.plan,
            base=self.site.model_place(self.plan),
            rank=self.rank,
            sigma=lambda: self.sigma,
            secret=lambda: self.secret,
            on_records=self._on_records or (lambda found: None),
        )

    @cached_property
    def training(self) -> Training:
        """What has the records and the model."""
        return self._trainers.training(self.job)

    @cached_property
    def updates(self) -> Updates:
        """What the training's rounds are made into."""
        return Updates(
            self.job,
            training=self.training,
            layout=self.layout,
            memory=lambda: self._memory,
            troubles=self.troubles,
        )

    @cached_property
    def loaded(self) -> LoadedAs:
        """What the model is once it is loaded here; before any record is read."""
        return self.training.loaded()

    @property
    def layout(self) -> Layout:
        """Of what this site sends."""
        return self.loaded.layout

    def close(self) -> None:
        """Give back what the training holds."""
        self.training.close()

    @property
    def rank(self) -> int:
        """Rank of this site's adapter: the plan's, or less if its resources say so."""
        return min(self.plan.lora.r, self.site.resources.max_rank or self.plan.lora.r)

    def at_own_rank(self, adapter: Vector) -> Vector:
        """A global adapter as it arrives at this site."""
        own = self.layout
        if self.rank == self.plan.lora.r:
            return adapter
        return own.at_rank(self.plan.lora.r).cut(adapter, own)

    @cached_property
    def ledger(self) -> Ledger | None:
        """The site's ledger; None for a plan without privacy."""
        if not self.plan.private:
            return None
        return Ledger(self._state / LEDGER_FILE, to_disk=self._to_disk)

    @cached_property
    def gate(self) -> Gate:
        """The only door out."""
        return Gate(
            ledger=self.ledger,
            dataset=self.plan.data.dataset,
            plan=self.plan,
            outbox=self._files(OUTBOX),
        )

    def _files(self, kind: FileKind) -> RunFiles:
        return RunFiles(
            self._state, kind, run=self.run, vault=self._keys.vault, to_disk=self._to_disk
        )

    @cached_property
    def secure(self) -> SecurePart:
        """The site's part in secure rounds. Raises `SignerUnknown` if it is not enrolled."""
        member = member_of(
            self.plan,
            run=self.run,
            site=self.site.name,
            declared_units=self.dataset.declared_units,
            identity=self._keys.signing,
            roster=self._roster,
            min_cohort=self.site.policy.min_cohort if self.site.policy else None,
        )
        return SecurePart(
            self.plan,
            member=member,
            layout=self.layout,
            gate=self.gate,
            files=self._files(ROUNDS),
            memory=lambda: self._memory,
        )

    @cached_property
    def sigma(self) -> float:
        """Noise multiplier for the plan's epsilon; 0 without privacy."""
        return sigma_for(self.plan, self.dataset.declared_units) if self.plan.private else 0.0

    @cached_property
    def secret(self) -> bytes:
        """What decides which side of the split a unit is on: the site's own, and always the same."""
        return self._given_secret or own_secret(self._state, self._keys.vault)

    @cached_property
    def _facts(self) -> Facts:
        """What the policy's judgement rests on, but for the time."""
        policy, layout = self.site.policy, None
        if self.plan.only_sums:
            layout = statistics_layout(self.plan)
        elif policy and self.plan.model.sha256 in policy.base_models:
            layout = self.training.layout()
        return facts_for(
            self.site,
            self.plan,
            run=self.run,
            ledger=self.ledger,
            layout=layout,
            moment=local_time(),
        )

    def _require_rank(self) -> None:
        if self.rank < self.plan.lora.r and not self.plan.strategy.ranks:
            raise RankRefused(
                f"resources.max_rank is {self.rank}, the plan's lora.r is {self.plan.lora.r}, and with "
                f"strategy '{self.plan.aggregation.strategy}' all sites have the plan's"
            )

    def _require_round(self, number: int, *, secure: bool | None = None) -> None:
        if secure is not None and secure != self.plan.aggregation.secure:
            raise MessageRefused("the plan's updates are sent " + ("bare" if secure else "masked"))
        if not 1 <= number <= self.plan.rounds.number:
            raise MessageRefused(f"the plan has no round {number}")

    def _reserve(self) -> None:
        """Set the whole run's cost aside in the ledger, within the site's own budget."""
        if self.ledger is None:
            return
        budget = budget_for(self.plan, self.site, self.dataset)
        events = run_events(self.plan, self.dataset.declared_units, sigma=self.sigma)
        event = events[0] if len(events) == 1 else ComposedDpEvent(events)
        others = [
            a.committed for a in self.ledger.runs(self.plan.data.dataset) if a.run != self.run
        ]
        require_uncolluding([event, *others], dataset=self.dataset, delta=budget.delta)
        self.ledger.reserve(
            self.plan.data.dataset, self.run, self.plan.sha256, event, budget=budget
        )

    def _noise(self, purpose: str, server_round: int) -> NoiseSource:
        return noise_for(self.plan.plan.seed, purpose, self.site.name, server_round)
