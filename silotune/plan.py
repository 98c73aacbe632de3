"""The plan: what is to be trained, as a small, typed, signed document.

A plan is data and nothing else (promise 2): frozen models with strict types, read from TOML, hashed
as canonical JSON. The hash is what sites approve and what every log carries.
"""

from __future__ import annotations

import base64
import hashlib
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from silotune.errors import PlanInvalid, PlanSignatureInvalid, PlanUnreadable
from silotune.explain import explain

_SIGNING_CONTEXT = b"silotune plan v1\0"

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")]
Share = Annotated[float, Field(gt=0.0, lt=1.0)]
Positive = Annotated[float, Field(gt=0.0)]


class Section(BaseModel):
    """Base of every table of a plan: frozen, strict, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class About(Section):
    """``[plan]``: what this is and what for."""

    name: Name
    purpose: str = Field(min_length=1, max_length=2000)
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = Field(
        None,
        description="Repeatable initialisation, sampling and noise. A seeded run is NOT private.",
    )


class ModelSection(Section):
    """``[model]``: the base model and the task it is tuned for."""

    base: str = Field(
        min_length=1, description="Hugging Face model id or a folder on this machine."
    )
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    task: Literal["text_classification", "causal_lm"]
    labels: tuple[str, ...] = ()
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    pooling: Literal["mean", "first", "last"] = "mean"
    centre_texts: tuple[str, ...] = Field(
        (), description="Public texts whose mean embedding is subtracted from every feature."
    )
    feature_scale: Positive = 4.0


class LoraSection(Section):
    """``[lora]``: the adapter's shape."""

    r: Annotated[int, Field(ge=1, le=512)] = 8
    alpha: Positive = 16.0
    target_modules: Literal["auto", "all-linear"] | tuple[str, ...] = "auto"
    last_layers: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Adapt only this many of the last layers; all of them when absent."
    )
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    freeze_a: bool = Field(False, description="FFA-LoRA: train only B, A stays at its start.")


class DataSection(Section):
    """``[data]``: the dataset each site must offer under this name."""

    dataset: Name
    max_length: Annotated[int, Field(ge=8, le=131072)] = 128
    test_share: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.2
    validation_share: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    split_by: Literal["unit", "group"] = Field(
        "unit", description="What is kept whole by the held-out split."
    )


class RoundsSection(Section):
    """``[rounds]``: how long, with whom, how patiently."""

    number: Annotated[int, Field(ge=1, le=100_000)]
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


class ServerOptimizer(Section):
    """``[optimizer.server]``: what the coordinator does with the aggregate."""

    name: Literal["none", "sgd", "adam"] = "adam"
    lr: Positive = 1.0
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    beta2: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.999
    epsilon: Positive = 1e-8


class OptimizerSection(Section):
    """``[optimizer]``: the two optimizers."""

    site: ClientOptimizer = ClientOptimizer()
    server: ServerOptimizer = ServerOptimizer()


class Clip(Section):
    """``[privacy.clip]``: one norm a group, composed to one Gaussian mechanism."""

    head: Positive
    adapter: Positive
    head_share: Share = Field(
        0.5, description="Part of the squared sensitivity that the head may use."
    )


class PrivacySection(Section):
    """``[privacy]``: whose data is protected and how well."""

    mode: Literal["record", "none"]
    unit: Name = Field("record", description="'record', or what one value of the unit column is.")
    epsilon: Positive | None = None
    delta: Annotated[float, Field(gt=0.0, lt=0.01)] | None = None
    clip: Positive | Clip | None = None
    rate: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    batch: Annotated[int, Field(ge=1)] | None = Field(None, description="Expected units a step.")
    max_records_per_unit: Annotated[int, Field(ge=1)] = 1
    metrics_share: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    max_physical_batch: Annotated[int, Field(ge=1)] = 128


class AggregationSection(Section):
    """``[aggregation]``: how updates become one adapter."""

    strategy: Literal["fedavg"] = "fedavg"
    weights: Literal["declared", "equal"] = "declared"


class Plan(Section):
    """A whole plan. Build it with `Plan.load` or `Plan.from_mapping`."""

    plan: About
    model: ModelSection
    lora: LoraSection = LoraSection()
    data: DataSection
    rounds: RoundsSection
    optimizer: OptimizerSection = OptimizerSection()
    privacy: PrivacySection
    aggregation: AggregationSection = AggregationSection()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        problems = [*_model_conflicts(self), *_privacy_conflicts(self), *_step_conflicts(self)]
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Read a plan from a TOML file.

        Raises
        ------
        PlanUnreadable
            No such file, or not TOML.
        PlanInvalid
            Unknown key, wrong type or impossible combination; the message lists every one.
        """
        try:
            raw = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as exc:
            raise PlanUnreadable(f"{path}: {exc.strerror or exc}") from exc
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
            raise PlanUnreadable(f"{path} is not valid TOML: {exc}") from exc
        return cls.from_mapping(raw, source=str(path))

    @classmethod
    def from_mapping(cls, raw: Mapping[str, Any], *, source: str = "plan") -> Plan:
        """Validate plain data, e.g. parsed TOML. Raises `PlanInvalid`."""
        try:
            # Strict JSON mode takes arrays as tuples, which strict Python mode refuses.
            return cls.model_validate_json(json.dumps(raw, default=str))
        except ValidationError as exc:
            listed = "\n".join(f"  - {line}" for line in explain(exc, cls))
            raise PlanInvalid(f"{source}:\n{listed}") from exc

    @classmethod
    def from_canonical(cls, text: str) -> Plan:
        """Read back what `canonical` wrote. Raises `PlanInvalid`."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as exc:
            raise PlanInvalid("the plan in the message is not valid") from exc

    def canonical(self) -> str:
        """JSON with sorted keys and no white space: equal plans, equal bytes."""
        return json.dumps(
            self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), allow_nan=False
        )

    @property
    def sha256(self) -> str:
        """SHA-256 of the canonical JSON, in hex: the plan's identity."""
        return hashlib.sha256(self.canonical().encode()).hexdigest()

    def override(self, settings: Mapping[str, Any]) -> Plan:
        """A new plan with dotted keys replaced (``None`` removes a key), validated again."""
        raw = self.model_dump(mode="json", exclude_none=True)
        for key, value in settings.items():
            *parents, leaf = key.split(".")
            table = raw
            for part in parents:
                table = table.setdefault(part, {})
                if not isinstance(table, dict):
                    raise PlanInvalid(f"{key}: {part} is a value, not a table")
            if value is None:
                table.pop(leaf, None)
            else:
                table[leaf] = value
        return Plan.from_mapping(raw, source="plan with overrides")

    @property
    def private(self) -> bool:
        """Whether training is under differential privacy."""
        return self.privacy.mode != "none"

    @property
    def steps(self) -> int:
        """Training steps of a whole run, head-only rounds included."""
        return self.rounds.number * self.rounds.local_steps

    def training_units(self, declared_units: int) -> float:
        """Units that are expected to be trained on, of so many declared: public, like both factors."""
        return declared_units * (1.0 - self.data.test_share - self.data.validation_share)

    def rate_for(self, declared_units: int) -> float:
        """Poisson sampling rate q at a site that declares so many units (at most 1)."""
        if self.privacy.rate is not None:
            return self.privacy.rate
        assert self.privacy.batch is not None  # validated
        return min(1.0, self.privacy.batch / self.training_units(declared_units))

    def expected_batch(self, declared_units: int) -> float:
        """Expected units in a step, from public numbers alone: the divisor of gradient sums."""
        return self.rate_for(declared_units) * self.training_units(declared_units)


class SignedPlan(Section):
    """A plan and the Ed25519 signature (RFC 8032) of the federation's key over its text."""

    plan: str
    signature: str
    key: str

    @classmethod
    def sign(cls, plan: Plan, key: Ed25519PrivateKey) -> SignedPlan:
        """Sign the canonical JSON."""
        text = plan.canonical()
        signature = key.sign(_SIGNING_CONTEXT + text.encode())
        public = key.public_key().public_bytes_raw()
        return cls(
            plan=text,
            signature=base64.b64encode(signature).decode(),
            key=base64.b64encode(public).decode(),
        )

    def verify(self, trusted: Ed25519PublicKey) -> Plan:
        """The plan, if `trusted` signed it. Raises `PlanSignatureInvalid`."""
        try:
            trusted.verify(
                base64.b64decode(self.signature, validate=True),
                _SIGNING_CONTEXT + self.plan.encode(),
            )
        except (InvalidSignature, ValueError) as exc:
            raise PlanSignatureInvalid("the signature does not fit the plan") from exc
        plan = Plan.from_canonical(self.plan)
        if plan.canonical() != self.plan:
            raise PlanSignatureInvalid("the signed text is not the plan's canonical form")
        return plan


def schema() -> dict[str, Any]:
    """JSON schema of a plan."""
    return Plan.model_json_schema()


def _model_conflicts(plan: Plan) -> list[str]:
    labels, task = plan.model.labels, plan.model.task
    found = []
    if task == "text_classification" and len(labels) < 2:
        found.append("model.labels: text_classification needs at least two labels")
    if len(set(labels)) != len(labels):
        found.append("model.labels: a label is listed twice")
    if task == "causal_lm" and labels:
        found.append("model.labels: causal_lm has no labels; remove them")
    if task == "causal_lm" and plan.optimizer.site.head_rounds:
        found.append("optimizer.site.head_rounds: causal_lm has no head to train; set 0")
    if plan.data.test_share + plan.data.validation_share >= 1.0:
        found.append("data.test_share: with data.validation_share it leaves nothing to train on")
    return found


def _privacy_conflicts(plan: Plan) -> list[str]:
    privacy, found = plan.privacy, []
    protected = {"epsilon": privacy.epsilon, "delta": privacy.delta, "clip": privacy.clip}
    for key, value in protected.items():
        if plan.private and value is None:
            found.append(f"privacy.{key}: needed when privacy.mode is '{privacy.mode}'")
        if not plan.private and value is not None:
            found.append(f"privacy.{key}: has no meaning when privacy.mode is 'none'; remove it")
    if (privacy.rate is None) == (privacy.batch is None):
        found.append("privacy.rate: give exactly one of privacy.rate and privacy.batch")
    if privacy.unit == "record" and privacy.max_records_per_unit != 1:
        found.append("privacy.max_records_per_unit: must be 1 when privacy.unit is 'record'")
    if privacy.max_records_per_unit > privacy.max_physical_batch:
        found.append("privacy.max_physical_batch: must hold the records of one unit")
    if not plan.private and privacy.metrics_share:
        found.append("privacy.metrics_share: has no meaning when privacy.mode is 'none'")
    if isinstance(privacy.clip, Clip) and plan.model.task == "causal_lm":
        found.append("privacy.clip: causal_lm has no head; give one number")
    return found


def _step_conflicts(plan: Plan) -> list[str]:
    found = []
    if plan.rounds.local_steps == 1 and plan.optimizer.server.name == "none":
        found.append(
            "optimizer.server.name: with rounds.local_steps = 1 sites send gradients, "
            "which need 'sgd' or 'adam' at the server"
        )
    if plan.optimizer.site.head_rounds > plan.rounds.number:
        found.append("optimizer.site.head_rounds: more than rounds.number")
    return found
