"""The base model of a process, loaded once and shared by its sites; and their training with it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from silotune.client.data_parallel import Ranks
from silotune.client.run_files import CarriedMemory
from silotune.client.scoring import counts
from silotune.client.together import JointMember
from silotune.client.trainer import SiteData, TrainableModel, Trainer
from silotune.client.training.base import (
    LoadedAs,
    Prior,
    RecordsRead,
    Trained,
    TrainingJob,
    Vector,
    sums_of,
)
from silotune.client.votes import site_votes, tried_plans
from silotune.data.records import Records, Split, load_records
from silotune.data.site import SiteConfig
from silotune.data.statistics import CountTokens, site_sums
from silotune.models.adapter import write_adapter
from silotune.models.base import load_model, outline
from silotune.models.batching import Encoded, padding_id
from silotune.models.chat import unshown
from silotune.models.choices import Choices
from silotune.models.features import Frozen, compute_frozen
from silotune.models.layout import Layout, statistics_layout
from silotune.models.pretrained import load_tokenizer, locate, weights_sha256
from silotune.plan.plan import Plan

_MOST_FROZEN = 16  # sites whose frozen features are kept at a time
_ANY_ROUND = 1 << 62  # later than all


@dataclass
class ModelCache:
    """The base model of this process, loaded for one plan at a time and shared by its sites.

    Attributes
    ----------
    choices : Choices or None
        What to compute with; chosen here if None.
    shared : Path or None
        Folder through which the processes of a simulation share frozen features. A deployed site
        has none: what is made of its records stays in memory.
    device : str
        What to compute on when `choices` are made here.
    trial : bool
        Whether a model is tried on public texts when it is loaded.
    kind : callable or None
        Makes the trainings of this process, if they are not plain `LocalTraining`.
    """

    choices: Choices | None = None
    shared: Path | None = None
    device: str = "auto"
    trial: bool = True
    kind: Callable[[TrainingJob, ModelCache], LocalTraining] | None = None
    _held: dict[int, TrainableModel] = field(default_factory=dict)
    _outlined: tuple[Plan, Layout] | None = None
    _frozen: dict[_Made, Frozen] = field(default_factory=dict)

    def training(self, job: TrainingJob) -> LocalTraining:
        """The training of a run, in this process."""
        return (self.kind or LocalTraining)(job, self)

    def for_plan(
        self, plan: Plan, *, base: str | None = None, rank: int | None = None
    ) -> TrainableModel:
        """The model ready to train under `plan`, loaded if another plan had it before.

        `base` is where the base model is on this machine, if not where the plan says; `rank` that of
        the adapter, if not the plan's.
        """
        if any(held.plan != plan for held in self._held.values()):
            self._held.clear()
        rank = rank or plan.lora.r
        if rank not in self._held:
            wish = asdict(self.choices) if self.choices else {"device": self.device}
            wish.pop("reason", None)
            loaded = load_model(plan, base=base, rank=rank, trial=self.trial, **wish)
            self._held[rank] = TrainableModel(plan, loaded)
        return self._held[rank]

    def layout(self, plan: Plan, *, base: str) -> Layout:
        """The adapter's layout, without loading a model for it."""
        held = self._held.get(plan.lora.r)
        if held is not None and held.plan == plan:
            return held.model.layout
        if self._outlined is None or self._outlined[0] != plan:
            self._outlined = plan, outline(plan, base=base)
        return self._outlined[1]

    def frozen(
        self,
        site: SiteConfig,
        plan: Plan,
        encoded: Encoded,
        *,
        content: str = "",
        base: str | None = None,
    ) -> Frozen:
        """What the base model makes of a site's records: the same for all plans of one model.

        `content` names the records (`Records.content`), so that what was made of others can be
        forgotten. What is given out was made of exactly these tokens, whatever the name says.
        """
        lora = (plan.lora.last_layers, plan.lora.target_modules)
        tokens = hashlib.sha256(encoded.ids.tobytes() + encoded.offsets.tobytes()).hexdigest()
        model = plan.model.model_copy(update={"head_features": None})  # which come behind these
        made = _digest(f"{model!r} {plan.data!r} {lora} {tokens}")
        key = _Made(_place(site, plan), content, made)
        if key not in self._frozen:
            if len(self._frozen) >= _MOST_FROZEN:
                self._frozen.clear()
            self._frozen[key] = self._find_frozen(key, plan, encoded, base=base)
        return self._frozen[key]

    def forget_other_content(self, site: SiteConfig, plan: Plan, content: str) -> None:
        """Remove what was made of other versions of a dataset, from memory and from the disk."""
        place = _place(site, plan)
        for key in [k for k in self._frozen if k.place == place and k.content != content]:
            del self._frozen[key]
        # A folder a place: with all in one, every site would look at every other's files.
        folder = self.shared / place if self.shared else None
        for path in folder.iterdir() if folder is not None and folder.is_dir() else ():
            if not path.name.startswith(f"{content}-"):
                path.unlink(missing_ok=True)

    def _find_frozen(self, key: _Made, plan: Plan, encoded: Encoded, *, base: str | None) -> Frozen:
        name = f"{key.content}-{key.settings}.safetensors"
        path = self.shared / key.place / name if self.shared else None
        if path is not None and path.exists():
            return Frozen.load(path, encoded)
        found = compute_frozen(self.for_plan(plan, base=base).model, encoded)
        if path is not None:
            found.save(path)
        return found


class _Made(NamedTuple):
    """What frozen features were made of."""

    place: str
    content: str
    settings: str


def _place(site: SiteConfig, plan: Plan) -> str:
    return _digest(f"{site.folder} {plan.data.dataset}")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class LocalTraining:
    """A run's training in this process: what reads a site's records, and nothing that they leave by.

    Parameters
    ----------
    job : TrainingJob
        Whose records, for which plan.
    models : ModelCache
        The process's model.
    ranks : Ranks, optional
        The processes that share the steps, if there are others.
    """

    def __init__(self, job: TrainingJob, models: ModelCache, *, ranks: Ranks | None = None) -> None:
        self.job, self._models, self._ranks = job, models, ranks
        self._memory = CarriedMemory()

    # --- what a site's part in a run asks ---

    def layout(self) -> Layout:
        """The adapter's layout at the plan's rank; no weight is loaded for it."""
        plan = self.job.plan
        if plan.only_sums:
            return statistics_layout(plan)
        return self._models.layout(plan, base=self.job.base)

    def loaded(self) -> LoadedAs:
        """Load the model and try it, before any record is read."""
        if self.job.plan.statistics is not None:
            return sums_of(self.job.plan)
        model = self.trainable.model
        return LoadedAs(
            layout=self.layout() if self.job.plan.vote else model.layout,
            dtype=str(model.dtype).removeprefix("torch."),
        )

    def weights_sha256(self) -> str | None:
        """Hash of the base model's weights here; None for statistics without one."""
        return weights_sha256(locate(self.job.base)) if self.job.base else None

    def prepare(self) -> None:
        """Read the records, and compute what the base model alone makes of them."""
        if self.job.plan.only_sums:
            _ = self.records
        else:
            self.trainer.prepare()

    def round(
        self, adapter: Vector, server_round: int, *, clip: float | None, prior: Prior | None
    ) -> Trained:
        """The steps of a round on the site's records; of plans for sums those over units or blocks."""
        if self.job.plan.vote is not None:
            return self._voted()
        if self.job.plan.statistics is not None:
            sums = site_sums(self.records, self.job.plan, count_tokens=self._count_tokens())
            return Trained(flat=sums, kept={}, records=len(self.records))
        return self._worked(self.trainer, adapter, server_round, clip=clip, prior=prior)

    def blank(
        self, adapter: Vector, server_round: int, *, clip: float | None, prior: Prior | None
    ) -> Trained:
        """The same round without records."""
        return self._worked(self._idle, adapter, server_round, clip=clip, prior=prior)

    def tables(self, adapter: Vector, *, prior: Prior | None) -> dict[str, NDArray[np.float64]]:
        """Counts of the shared adapter, and of the site's own where it keeps parts."""
        self._memory.given = prior
        found, keeping = {"counts": self._counts(adapter)}, self._idle.keeping
        if keeping.any:
            found["personal"] = self._counts(keeping.personal(adapter, before=_ANY_ROUND))
        return found

    def close(self) -> None:
        """Nothing: the process's memory is everybody's here."""

    # --- a round whose steps are taken together with those of other sites: simulations only ---

    def member(self, adapter: Vector, server_round: int, *, prior: Prior | None) -> JointMember:
        """Its part in such a round."""
        self._memory.given, self._memory.left = prior, {}
        return JointMember(trainer=self.trainer, adapter=adapter, server_round=server_round)

    def ended(self, member: JointMember, change: Vector, *, seconds: float) -> Trained:
        """What the round came to."""
        before = self.trainer.records_used
        flat = member.end(change)
        records = self.trainer.records_used - before
        return Trained(flat=flat, kept=self._memory.left, records=records, seconds=seconds)

    # --- parts, each made on first use ---

    @property
    def trainable(self) -> TrainableModel:
        """The process's model, ready for this plan; of a vote for its first candidate."""
        plan = self.job.plan if self.job.plan.vote is None else tried_plans(self.job.plan)[0]
        return self._trainable(plan)

    def _trainable(self, plan: Plan) -> TrainableModel:
        return self._models.for_plan(plan, base=self.job.base, rank=self.job.rank)

    def _voted(self) -> Trained:
        """The votes of a site's blocks."""
        votes = site_votes(
            self.records,
            self.job.plan,
            site=self.job.site.name,
            declared_units=self.job.site.units_for(self.job.plan),
            trainable=self._trainable,
        )
        return Trained(flat=votes, kept={}, records=len(self.records))

    @cached_property
    def records(self) -> Records:
        """The site's records."""
        site, plan = self.job.site, self.job.plan
        secret = self.job.secret()
        checked = None if plan.model.chat is None else self._unshown
        found = load_records(site, plan, roles=plan.roles, secret=secret, unshown=checked)
        self._models.forget_other_content(site, plan, found.content)
        self.job.on_records(
            RecordsRead(
                records=len(found),
                rows_left_out=found.rows_left_out,
                left_out=tuple(map(str, found.left_out)),
                fingerprint=found.fingerprint(secret),
            )
        )
        return found

    def _unshown(self, examples: Sequence[Mapping[str, str]]) -> list[int]:
        plan = self.job.plan
        assert plan.model.chat is not None
        tokenizer = self.trainable.model.tokenizer
        return unshown(examples, tokenizer, plan.model.chat, limit=plan.data.max_length)

    @cached_property
    def encoded(self) -> Encoded:
        """The records as token ids."""
        model = self.trainable.model
        return model.task.encode(self.records.examples, model.tokenizer, plan=self.job.plan)

    @cached_property
    def trainer(self) -> Trainer:
        """Trains this site's share; what its updates still need, `SiteRun` sees to."""
        return Trainer(
            self.trainable,
            self._shared_data,
            sigma=self.job.sigma(),
            frozen=self._frozen,
            memory=self._memory,
            ranks=self._ranks,
            finishes=False,
        )

    def alone(self, *, frozen: Callable[[], Frozen] | None = None) -> Trainer:
        """A trainer for comparisons: nothing is released, and what it keeps counts at once."""
        return Trainer(
            self.trainable,
            self._shared_data,
            sigma=self.job.sigma(),
            frozen=frozen or self._frozen,
        )

    def _frozen(self) -> Frozen:
        return self._models.frozen(
            self.job.site,
            self.job.plan,
            self.encoded,
            content=self.records.content,
            base=self.job.base,
        )

    @property
    def _shared_data(self) -> SiteData:
        records = self.records
        train = records.rows(Split.TRAIN)
        return self._data(self.encoded, records.unit_of, train, turns=records.turns)

    @cached_property
    def _idle(self) -> Trainer:
        """A trainer without records: its rounds are noise alone."""
        nothing = np.zeros(0, dtype=np.int64)
        encoded = Encoded.of([], [], padding_id(self.trainable.model.tokenizer))
        data = self._data(encoded, nothing, nothing, turns=nothing)
        return Trainer(
            self.trainable, data, sigma=self.job.sigma(), memory=self._memory, finishes=False
        )

    def _data(
        self,
        encoded: Encoded,
        unit_of: NDArray[np.int64],
        train: NDArray[np.int64],
        *,
        turns: NDArray[np.int64] | None,
    ) -> SiteData:
        return SiteData(
            site=self.job.site.name,
            encoded=encoded,
            unit_of=unit_of,
            train=train,
            declared_units=self.job.site.units_for(self.job.plan),
            turns=turns,
        )

    def _worked(
        self,
        trainer: Trainer,
        adapter: Vector,
        server_round: int,
        *,
        clip: float | None,
        prior: Prior | None,
    ) -> Trained:
        self._memory.given, self._memory.left = prior, {}
        before = trainer.records_used
        flat = trainer.round(adapter, server_round, clip=clip).flat
        return Trained(flat=flat, kept=self._memory.left, records=trainer.records_used - before)

    def _count_tokens(self) -> CountTokens | None:
        if not self.job.base:
            return None
        tokenizer = load_tokenizer(locate(self.job.base))

        def count(texts: Sequence[str]) -> list[int]:
            found = tokenizer(list(texts), split_special_tokens=True, verbose=False)["input_ids"]
            return [len(row) for row in found]

        return count

    def _counts(self, adapter: Vector) -> NDArray[np.float64]:
        """Counts of an adapter on the validation units."""
        model = self.trainable.model
        write_adapter(model, adapter)
        rows = self.records.rows(Split.VALIDATION)
        return counts(model, self.encoded, rows=rows, units=self.records.unit_of[rows])
