"""People who look at a federation or run it, once it is known who they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from silotune.federation.errors import NotPermitted

PersonRole = Literal["viewer", "operator"]


@dataclass(frozen=True, kw_only=True)
class Person:
    """Somebody who is known: by a certificate, a password, or a link that only they were given."""

    name: str
    role: PersonRole

    def require_operator(self) -> None:
        """Raise `NotPermitted` for anybody but an operator."""
        if self.role != "operator":
            raise NotPermitted(f"{self.name} is a {self.role}; this needs an operator")
