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
from silotune.plan.sections import Section, Sections

_SIGNING_CONTEXT = b"silotune plan v1\0"


class Plan(Sections):
    """A whole plan. Build it with `Plan.load` or `Plan.from_mapping`."""

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
