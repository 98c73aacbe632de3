"""A link that signs in whoever started the dashboard on their own machine."""

from __future__ import annotations

import hmac
import secrets

from silotune.federation.person import Person


class Link:
    """A secret in a link, for who started the dashboard on their own machine.

    It works any number of times for as long as the process lives; only its hash could be guessed at.
    """

    def __init__(self, person: Person) -> None:
        self.person, self.secret = person, secrets.token_urlsafe(32)

    def fits(self, given: str) -> bool:
        """Whether it is the secret; compared in constant time."""
        return hmac.compare_digest(given.encode(), self.secret.encode())
