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
from typing import Any, Self

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import ValidationError, model_validator

from silotune.errors import PlanInvalid, PlanSignatureInvalid, PlanUnreadable
from silotune.plan.explain import explain
from silotune.plan.rules import conflicts
from silotune.plan.sections import (
    About,
    AggregationSection,
    DataSection,
    LoraSection,
    ModelSection,
    OptimizerSection,
    PrivacySection,
    RoundsSection,
    Section,
)
from silotune.plan.strategies import STRATEGIES, StrategyFacts

_SIGNING_CONTEXT = b"silotune plan v1\0"


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
        if problems := conflicts(self):
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
        if not settings:
            return self
        # Without the defaults: a key that nobody gave is not given afterwards.
        raw = self.model_dump(mode="json", exclude_none=True, exclude_unset=True)
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
    def strategy(self) -> StrategyFacts:
        """What the aggregation strategy is."""
        return STRATEGIES[self.aggregation.strategy]

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

    def release_rate(self, declared_units: int) -> float:
        """Poisson sampling rate of each of these: 1 where a whole site is what is hidden."""
        return 1.0 if self.privacy.mode == "site" else self.rate_for(declared_units)

    @property
    def sends_sums(self) -> bool:
        """Whether a site sends the gradient sum of its one step, not a change of the adapter."""
        return self.rounds.local_steps == 1

    @property
    def freezes_a(self) -> bool:
        """Whether A is no part of the adapter that travels, as in FFA-LoRA."""
        return self.strategy.freezes_a

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


def dotted(tables: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A plan's tables as one: values by dotted key, as `Plan.override` takes them."""
    found: dict[str, Any] = {}
    for key, value in tables.items():
        if isinstance(value, Mapping):
            found |= dotted(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found
