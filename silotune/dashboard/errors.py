"""Errors of the web pages."""

from __future__ import annotations

from silotune.errors import EnvironmentFault


class AccountsInvalid(EnvironmentFault):
    """The file with the accounts can't be used."""

    code = "ST-730"
    title = "The dashboard's accounts can't be used"
    cause = "The file is damaged, a name is not usable, or a password is too short."
    advice = "Passwords need 12 characters; names a-z, 0-9, - and _. Add the person again."


class TooManyAttempts(EnvironmentFault):
    """Somebody guesses."""

    code = "ST-731"
    title = "Too many attempts to sign in"
    cause = "Several passwords in a row were wrong, for this account or from this address."
    advice = "Wait for the time that the page says, then try again."


class RequestForged(EnvironmentFault):
    """A request does not come from our own page."""

    code = "ST-732"
    title = "The request did not come from this page"
    cause = "Its token is missing or old, or it was sent by another site's page."
    advice = "Load the page again and repeat what you did."


class PageUnknown(EnvironmentFault):
    """There is no such page."""

    code = "ST-733"
    title = "There is no such page"
    cause = "The address is wrong, or this dashboard has no such part."
    advice = "Begin at the overview."
