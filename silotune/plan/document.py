"""Documents: frozen, strict models of what is stored, signed and compared, and their one text.

A document's canonical text is JSON with sorted keys and no white space. It outlives the version that
wrote it: sites approve a plan by the hash of its text, and what is signed stays signed. So a key that a
later version adds is marked `ADDED_LATER` and given the default that means what was done before it came.
It is written only where it says something else. An old text then is the canonical text of what it says,
hash and signature included, and for each document there is one text still.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Final, Self

from pydantic import BaseModel, ConfigDict, Field

from silotune.errors import PlanInvalid

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

ADDED_LATER: Final = object()
"""In `Annotated`, marks a key that documents of earlier versions lack; its default never changes."""


def canonical_json(content: object) -> str:
    """JSON with sorted keys and no white space: equal contents, equal texts."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)


def text_sha256(text: str) -> str:
    """SHA-256 of a text, in hex."""
    return hashlib.sha256(text.encode()).hexdigest()


def with_settings(tables: dict[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Tables with dotted keys replaced, in place; ``None`` removes one. Raises `PlanInvalid`."""
    for key, value in settings.items():
        *parents, leaf = key.split(".")
        table = tables
        for part in parents:
            table = table.setdefault(part, {})
            if not isinstance(table, dict):
                raise PlanInvalid(f"{key}: {part} is a value, not a table")
        if value is None:
            table.pop(leaf, None)
        else:
            table[leaf] = value
    return tables


class Document(BaseModel):
    """Base of all that is strict: frozen, no unknown keys, no value of another type."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @classmethod
    def from_canonical(cls, text: str) -> Self:
        """Read back what `canonical` wrote, in this version or an earlier one."""
        return cls.model_validate_json(text)

    def canonical(self) -> str:
        """The one text of this document."""
        return canonical_json(self.written())

    def written(self) -> dict[str, Any]:
        """What is in the text, as plain data."""
        content = self.model_dump(mode="json")
        _leave_out(self, content)
        return content


def _leave_out(said: object, content: Any) -> None:
    """Remove later keys that have their default, at every depth."""
    if isinstance(said, tuple | list):
        for part, its_content in zip(said, content, strict=True):
            _leave_out(part, its_content)
    elif isinstance(said, dict):
        for part, its_content in zip(said.values(), content.values(), strict=True):
            _leave_out(part, its_content)
    elif isinstance(said, Document):
        for name, field in type(said).model_fields.items():
            value = getattr(said, name)
            later = any(mark is ADDED_LATER for mark in field.metadata)
            if later and value == field.get_default(call_default_factory=True):
                del content[name]
            else:
                _leave_out(value, content[name])
