"""Errors of releasing an adapter."""

from __future__ import annotations

from silotune.errors import PrivacyError


class ReleaseRefused(PrivacyError):
    """A control that an adapter has to pass before it leaves was not passed."""

    code = "ST-415"
    title = "The adapter does not pass the gate"
    cause = (
        "A certificate, an attack or a bound says that it should not leave the consortium as it is."
    )
    advice = "Read the control that the message names; `silotune release RUN` lists all of them."


class ReleaseInvalid(PrivacyError):
    """A signed release doesn't fit the adapter beside it."""

    code = "ST-416"
    title = "The signed release does not verify"
    cause = "Its signature does not fit, or the adapter or a certificate was changed after signing."
    advice = "Use the adapter that was signed, or have this one pass the gate again."
