"""The sections of a plan: one frozen, strict pydantic model a table of the TOML file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

from pydantic import BeforeValidator, Field, JsonValue

from silotune.plan.chat import ChatSection
from silotune.plan.document import ADDED_LATER, Document
from silotune.plan.statistics import StatisticsSection
from silotune.plan.strategies import STRATEGIES, SUMS, StrategyFacts, not_dropped
from silotune.plan.tasks import STATISTICS, TASKS, TaskFacts, facts_of, of_chats

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")]
Share = Annotated[float, Field(gt=0.0, lt=1.0)]
Positive = Annotated[float, Field(gt=0.0)]

BINS = 10
"""Of the histogram of a number, in each direction, unless the plan says otherwise."""


class Section(Document):
    """Base of every table of a plan."""


class About(Section):
    """``[plan]``: what this is and what for."""

    name: Name
    purpose: str = Field(min_length=1, max_length=2000)
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = Field(
        None,
        description="Repeatable initialisation, sampling and noise. A seeded run is NOT private.",
    )


class HeadFeatures(Section):
    """``[model.head_features]``: a fixed layer of random features under the head."""

    kind: Literal["cosines"]
    number: Annotated[int, Field(ge=1, le=65_536)] = 2048
    scale: Positive = Field(
        1.5,
        description="How fast two texts grow unlike with their distance: frequencies have this standard "
        "deviation, over the median distance of model.centre_texts.",
    )


class TargetSection(Section):
    """``[model.target]``: the number that text_regression learns."""

    lower: float = Field(description="Records below it are left out.")
    upper: float = Field(description="Records above it are left out.")
    edges: Annotated[tuple[float, ...], Field(max_length=63)] = Field(
        (), description="Inner edges of the histogram that Spearman's correlation is made of."
    )

    @property
    def inner_edges(self) -> tuple[float, ...]:
        """`edges`, or those of `BINS` bins of one width."""
        step = (self.upper - self.lower) / BINS
        return self.edges or tuple(self.lower + step * number for number in range(1, BINS))


if TYPE_CHECKING:
    TaskName = str
else:
    TaskName = Literal[*TASKS, "statistics"]


class ModelSection(Section):
    """``[model]``: the base model and the task it is tuned for."""

    base: Annotated[str, ADDED_LATER] = Field(
        "", description="Hugging Face model id or a folder on this machine."
    )
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    task: TaskName
    labels: tuple[str, ...] = ()
    multi_label: Annotated[bool, ADDED_LATER] = Field(
        False, description="Whether a record has any number of the labels, instead of one."
    )
    class_weights: Annotated[dict[str, Positive], ADDED_LATER] = Field(
        {},
        description="PUBLIC. By label, what the loss of its records is multiplied by; 1 for others.",
    )
    target: Annotated[TargetSection | None, ADDED_LATER] = Field(
        None, description="The range of the number that text_regression learns."
    )
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    quantization: Annotated[Literal["none", "int8", "nf4"], ADDED_LATER] = Field(
        "none", description="In how many bits the frozen weights are kept; adapters are in float32."
    )
    pooling: Literal["mean", "first", "last"] = "mean"
    centre_texts: tuple[str, ...] = Field(
        (), description="Public texts whose mean embedding is subtracted from every feature."
    )
    feature_scale: Positive = 4.0
    head_features: Annotated[HeadFeatures | None, ADDED_LATER] = Field(
        None, description="Fixed random features under the head; the text's own when absent."
    )
    chat: Annotated[ChatSection | None, ADDED_LATER] = Field(
        None,
        description="Records are shown as chats; a prompt and its response, line by line, if absent.",
    )


class StartSection(Section):
    """``[lora.start]``: the adapter of an earlier run that this one goes on with."""

    adapter: str = Field(
        min_length=1,
        description="On the machine that starts the run: a run's directory or an adapter's folder; "
        "at a coordinator, one of its runs.",
    )
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] = Field(
        description="Of its values: adapter_sha256 in its silotune.json."
    )


class LoraSection(Section):
    """``[lora]``: the adapter's shape."""

    r: Annotated[int, Field(ge=1, le=512)] = 8
    alpha: Positive = 16.0
    target_modules: Literal["auto", "all-linear", "none"] | tuple[str, ...] = Field(
        "auto", description="'none': only the head is trained, and there is no adapter."
    )
    last_layers: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Adapt only this many of the last layers; all of them when absent."
    )
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    scaling: Annotated[Literal["standard", "rslora"], ADDED_LATER] = Field(
        "standard", description="Of the adapter's output: alpha / r, or alpha / sqrt(r) (rsLoRA)."
    )
    start: Annotated[StartSection | None, ADDED_LATER] = Field(
        None, description="An adapter to go on with; a fresh one when absent."
    )

    @property
    def scale(self) -> float:
        """Factor of the adapter's output."""
        return self.alpha / (math.sqrt(self.r) if self.scaling == "rslora" else self.r)


class DataSection(Section):
    """``[data]``: the dataset each site must offer under this name."""

    dataset: Name
    max_length: Annotated[int, Field(ge=8, le=131072)] = 128
    max_windows: Annotated[int, Field(ge=1, le=1000), ADDED_LATER] = Field(
        8, description="Where each token is labelled: how many windows of a text are trained on."
    )
    test_share: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.2
    validation_share: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    split_by: Literal["unit", "group"] = Field(
        "unit", description="What is kept whole by the held-out split."
    )


class RoundsSection(Section):
    """``[rounds]``: how long, with whom, how patiently."""

    number: Annotated[int, Field(ge=1, le=100_000)]
    sites: Annotated[Annotated[int, Field(ge=1)] | None, ADDED_LATER] = Field(
        None, description="Sites that a round asks, drawn from those in the run; all when absent."
    )
    min_sites: Annotated[int, Field(ge=1)] = 1
    deadline: Positive = Field(3600.0, description="Seconds a round waits for its sites.")
    local_steps: Annotated[int, Field(ge=1, le=10_000)] = 1
    evaluate_every: Annotated[int, Field(ge=0)] = 0


class ClientOptimizer(Section):
    """``[optimizer.site]``: learning rates, schedule, and the optimizer of local steps."""

    adapter_lr: Positive = 1e-3
    head_lr: Positive = 5e-2
    schedule: Literal["linear", "constant", "cosine"] = "linear"
    warmup_share: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    final_share: Annotated[float, Field(ge=0.0, le=1.0)] = 0.2
    head_rounds: Annotated[int, Field(ge=0)] = Field(
        0, description="First rounds that train only the head, on features computed once."
    )
    local: Literal["sgd", "adam"] = "adam"
    prox: Annotated[float, Field(ge=0.0)] = Field(
        0.0, description="FedProx: pull of local steps towards the global adapter."
    )

    def factor(self, *, step: int, steps: int) -> float:
        """Part of the peak learning rate at `step` (from 0) of `steps`: linear warm-up, then decay."""
        warmup = self.warmup_share * steps
        rise = min(1.0, (step + 1) / warmup) if warmup > 0 else 1.0
        done = step / steps
        if self.schedule == "constant":
            return rise
        span = 1.0 - self.final_share
        if self.schedule == "cosine":
            return rise * (self.final_share + span * (1 + math.cos(math.pi * done)) / 2)
        return rise * (1.0 - span * done)


class ServerOptimizerSettings(Section):
    """``[optimizer.server]``: what the coordinator does with the aggregate."""

    name: Annotated[Literal["none", "sgd", "adam"], BeforeValidator(not_dropped)] = "adam"
    lr: Positive = 1.0
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    beta2: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.999
    epsilon: Positive = 1e-8
    average: Annotated[Literal["none", "ema", "uniform"], ADDED_LATER] = Field(
        "none", description="What the run ends with: the last adapter, or a mean of the last ones."
    )
    average_share: Annotated[float, Field(gt=0.0, le=1.0), ADDED_LATER] = Field(
        0.5, description="How far the mean looks back, as a share of the rounds."
    )


class OptimizerSection(Section):
    """``[optimizer]``: the two optimizers."""

    site: ClientOptimizer = ClientOptimizer()
    server: ServerOptimizerSettings = ServerOptimizerSettings()


class Clip(Section):
    """``[privacy.clip]``: one norm a group, composed to one Gaussian mechanism."""

    head: Positive
    adapter: Positive
    head_share: Share = Field(
        0.5, description="Part of the squared sensitivity that the head may use."
    )


class ClipBound(NamedTuple):
    """Of a group: its norm, and its part of the squared sensitivity."""

    norm: float
    share: float


@dataclass(frozen=True)
class Clipping:
    """What updates are clipped to, in whichever form the plan says it.

    Attributes
    ----------
    bounds : mapping of str to ClipBound
        By group: "head" and "adapter", or "all" as one; empty without privacy.
    adapts : bool
        Whether the norm of all only starts there, and then follows those of the sites.
    """

    bounds: Mapping[str, ClipBound]
    adapts: bool

    @property
    def grouped(self) -> bool:
        """Whether head and adapter have bounds of their own."""
        return len(self.bounds) > 1

    @property
    def norm(self) -> float:
        """The one norm of all; that of the first round if it adapts."""
        return self.bounds["all"].norm

    def group(self, part: str) -> str:
        """Which group a part of the adapter is in."""
        return "all" if not self.grouped else "head" if part == "head" else "adapter"

    def of(self, part: str) -> ClipBound:
        """The bound of the group that a part of the adapter is in."""
        return self.bounds[self.group(part)]


class SitePrivacySection(Section):
    """``[privacy.site]``: client-level privacy, for ``mode = "site"``."""

    noise: Literal["coordinator", "site"] = Field(
        "coordinator",
        description="Who adds it: the coordinator, once, and is trusted; or each site, to its own.",
    )
    quantile: Share | None = Field(
        None, description="Adaptive clipping: the norm follows this quantile of the sites' norms."
    )
    clip_lr: Positive = Field(0.2, description="How fast the norm follows.")


class PrivacySection(Section):
    """``[privacy]``: whose data is protected and how well."""

    mode: Literal["record", "site", "none"]
    unit: Name = Field("record", description="'record', or what one value of the unit column is.")
    epsilon: Positive | None = None
    delta: Annotated[float, Field(gt=0.0, lt=0.01)] | None = None
    clip: Positive | Clip | None = None
    site: SitePrivacySection | None = None
    rate: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    batch: Annotated[int, Field(ge=1)] | None = Field(None, description="Expected units a step.")
    max_records_per_unit: Annotated[int, Field(ge=1)] = 1
    metrics_share: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    max_physical_batch: Annotated[int, Field(ge=1)] = 128
    noise: Literal["local", "shared"] = Field(
        "local", description="Who adds the noise: each site all of it, or each its share."
    )
    bands: Annotated[int, Field(ge=1, le=64), ADDED_LATER] = Field(
        1, description="Rounds whose noise is correlated, so that most of it cancels; 1 for none."
    )
    band_weights: Annotated[tuple[float, ...], Field(max_length=64), ADDED_LATER] = Field(
        (), description="How much of earlier rounds' noise a round takes back; the first is 1."
    )

    @property
    def column(self) -> tuple[float, ...]:
        """First column of the matrix that correlates the noise of rounds; (1,) without."""
        return self.band_weights or (1.0,)

    @property
    def clipping(self) -> Clipping:
        """What ``clip`` and ``site`` say of clipping."""
        bounds, clip = {}, self.clip
        if isinstance(clip, Clip):
            bounds["head"] = ClipBound(clip.head, clip.head_share)
            bounds["adapter"] = ClipBound(clip.adapter, 1.0 - clip.head_share)
        elif clip is not None:
            bounds["all"] = ClipBound(clip, 1.0)
        return Clipping(bounds, adapts=self.site is not None and self.site.quantile is not None)


if TYPE_CHECKING:
    StrategyName = str
else:
    StrategyName = Literal[*STRATEGIES]


class AggregationSection(Section):
    """``[aggregation]``: how updates become one adapter."""

    strategy: Annotated[StrategyName, BeforeValidator(not_dropped)] = "fedavg"
    weights: Literal["declared", "equal"] = "declared"
    head: Literal["shared", "local"] = Field(
        "shared", description="'local': each site keeps a head of its own."
    )
    trim: Annotated[float, Field(gt=0.0, lt=0.5)] | None = Field(
        None, description="trimmed_mean: share of the sites cut from both ends of a coordinate."
    )
    byzantine: Annotated[int, Field(ge=1)] | None = Field(
        None, description="multi_krum: how many sites may lie."
    )
    selected: Annotated[int, Field(ge=1)] | None = Field(
        None, description="multi_krum: how many updates are averaged."
    )
    secure: bool = Field(False, description="The coordinator sees sums over sites, no update.")
    cohort: Annotated[int, Field(ge=3, le=4096)] | None = Field(
        None, description="Sites in a secure round, at most: what the sum must have room for."
    )
    threshold: Annotated[int, Field(ge=2)] | None = Field(
        None, description="Sites that a secure round needs; more than two thirds of it when absent."
    )
    encoding: Literal["uint32", "uint16"] = "uint32"
    update_bound: Positive | None = Field(
        None, description="Largest absolute value of a number in an update; more is cut off."
    )
    bound: Positive | None = Field(
        None,
        description="norm_bound: length that no update may pass; of a mean gradient or change.",
    )


BLOCK_UNITS = 250
"""Units of a vote's block, if nothing is said: docs/plans.md has what 100 and 250 tell apart."""


class VotedPlan(Section):
    """``[vote.plan]``: how the plan will be trained that the candidates are of, by that plan's keys."""

    name: Name
    rounds: RoundsSection
    optimizer: OptimizerSection = OptimizerSection()
    privacy: PrivacySection
    aggregation: AggregationSection = AggregationSection()


class VoteSection(Section):
    """``[vote]``: settings of a plan among which the sites' own records choose, in one release."""

    block_units: Annotated[int, Field(ge=10)] = Field(
        BLOCK_UNITS,
        description="Units that a block is expected to have; each block has one vote.",
    )
    units: Annotated[int, Field(ge=1)] = Field(
        description="PUBLIC. Units that all sites declare together: steps in a block are as noisy as "
        "the steps of so many would be."
    )
    plan: VotedPlan
    candidates: tuple[dict[str, JsonValue], ...] = Field(
        min_length=2,
        max_length=64,
        description="What each candidate has otherwise than the plan, by dotted keys.",
    )


class Sections(Section):
    """All that a plan states, and what follows from it."""

    plan: About
    model: ModelSection
    lora: LoraSection = LoraSection()
    data: DataSection
    rounds: RoundsSection
    optimizer: OptimizerSection = OptimizerSection()
    privacy: PrivacySection
    aggregation: AggregationSection = AggregationSection()
    statistics: Annotated[StatisticsSection | None, ADDED_LATER] = None
    vote: Annotated[VoteSection | None, ADDED_LATER] = None

    @property
    def finds(self) -> str:
        """What a plan finds that trains nothing, as its event and its file are called; else empty."""
        return "votes" if self.vote else "statistics" if self.statistics else ""

    @property
    def only_sums(self) -> bool:
        """Whether sites answer with one sum, of counts or of votes, and no adapter is trained."""
        return bool(self.finds)

    @property
    def strategy(self) -> StrategyFacts:
        """What the aggregation strategy is."""
        return SUMS if self.only_sums else STRATEGIES[self.aggregation.strategy]

    @property
    def task(self) -> TaskFacts:
        """What the task is."""
        facts = facts_of(self.model.task, several=self.model.multi_label) or STATISTICS
        chat = self.model.chat
        return facts if chat is None or chat.records == "prompts" else of_chats(facts)

    @property
    def roles(self) -> frozenset[str]:
        """Roles of the columns that a dataset must have: what the task needs, or what is counted."""
        asked = self.statistics
        if asked is None:
            return self.task.roles
        labels = {"label"} if self.model.labels else set()
        return frozenset(labels | ({asked.lengths.of} if asked.lengths else set()))

    @property
    def private(self) -> bool:
        """Whether what a site sends is differentially private, and so charged to its ledger."""
        site = self.privacy.site
        return self.per_unit or (site is not None and site.noise == "site")

    @property
    def per_unit(self) -> bool:
        """Whether training steps clip and hide single privacy units."""
        return self.privacy.mode == "record"

    @property
    def trusts_coordinator(self) -> bool:
        """Whether it is the coordinator that adds the noise, to updates it sees without."""
        return self.privacy.site is not None and not self.private

    @property
    def releases_a_round(self) -> int:
        """Noisy releases that a site's update of a round is composed of."""
        return self.rounds.local_steps if self.per_unit else 1

    @property
    def releases(self) -> int:
        """Of a whole run, as they are charged: under correlated noise a block of rounds is one."""
        return -(-self.rounds.number // self.privacy.bands) * self.releases_a_round

    def block_of(self, server_round: int) -> int:
        """First round (from 1) of the block of `privacy.bands` rounds that a round is in."""
        return server_round - (server_round - 1) % self.privacy.bands

    def draw_rate(self, declared_units: int) -> float:
        """Poisson sampling rate of the units that a round may draw: all, or those whose turn it is."""
        return min(1.0, self.privacy.bands * self.rate_for(declared_units))

    def release_rate(self, declared_units: int) -> float:
        """Poisson sampling rate of each release: 1 where a whole site is what is hidden."""
        return 1.0 if self.privacy.mode == "site" else self.draw_rate(declared_units)

    @property
    def sends_sums(self) -> bool:
        """Whether a site sends the gradient sum of its one step, not a change of the adapter."""
        return self.rounds.local_steps == 1

    @property
    def freezes_a(self) -> bool:
        """Whether A is no part of the adapter that travels, as in FFA-LoRA."""
        return self.strategy.freezes_a

    @property
    def head_rounds(self) -> int:
        """First rounds that train the head alone: all, where there is no adapter."""
        if self.lora.target_modules == "none":
            return self.rounds.number
        return self.optimizer.site.head_rounds

    @property
    def steps(self) -> int:
        """Training steps of a whole run, head-only rounds included."""
        return self.rounds.number * self.rounds.local_steps

    def training_units(self, declared_units: int) -> float:
        """Units that are expected to be trained on, of so many declared: public, like both factors."""
        return declared_units * (1.0 - self.data.test_share - self.data.validation_share)

    def rate_for(self, declared_units: int) -> float:
        """A unit's chance to be in a step, at a site that declares so many: at most 1 in `bands`."""
        if self.privacy.rate is not None:
            return self.privacy.rate
        assert self.privacy.batch is not None  # validated
        most = 1.0 / self.privacy.bands
        return min(most, self.privacy.batch / self.training_units(declared_units))

    def expected_batch(self, declared_units: int) -> float:
        """Expected units in a step, from public numbers alone: the divisor of gradient sums."""
        return self.rate_for(declared_units) * self.training_units(declared_units)
