"""Errors of what a site and the coordinator have in common: identities, messages, files at rest."""

from __future__ import annotations

from silotune.errors import PrivacyError, RunError, SilotuneError


class VaultLocked(PrivacyError):
    """Sealed files can't be opened with the key or passphrase that is given."""

    code = "ST-430"
    title = "The sealed files can't be opened"
    cause = "The key file or passphrase is missing, or is not the one the files were sealed with."
    advice = (
        "Give the key file or passphrase named in the configuration, or restore it from backup."
    )


class SealBroken(PrivacyError):
    """A sealed file was changed, exchanged for another, or written half."""

    code = "ST-431"
    title = "A sealed file is damaged"
    cause = "Its bytes were changed, it was moved from another place, or it is not a sealed file."
    advice = "Restore the file that the message names from backup, and find out who changed it."


class AuditLogDamaged(PrivacyError):
    """An audit log was edited, cut or rolled back."""

    code = "ST-432"
    title = "The audit log is damaged"
    cause = "Its hash chain is broken, lines are missing, or a counter-signed line is not in it."
    advice = "Keep the file as evidence, restore the newest backup, and find out who changed it."


# --- trust between a site and the coordinator: exit code 80 -------------------------------------


class FederationError(SilotuneError):
    """One side of a federation can't trust what came from the other."""

    code, exit_code = "ST-800", 80
    title = "The other side is not trusted"
    cause = "What was received does not fit the keys, names or order that this federation has."
    advice = "Nothing was done with it. Compare the fingerprints with the other side."


class InviteInvalid(FederationError):
    """An invitation code is damaged, expired or used."""

    code = "ST-801"
    title = "The invitation code is not valid"
    cause = "It was typed wrongly, was used before, has expired, or is of another federation."
    advice = "Ask the coordinator's operator for a new code: `silotune coordinator invite SITE`."


class IdentityInvalid(FederationError):
    """A key, certificate or certificate request is not what it should be."""

    code = "ST-802"
    title = "A key or certificate is not usable"
    cause = "It is damaged, of another kind, of another name, expired, or not of this federation."
    advice = "Check the file that the message names; if it is lost, enrol the site again."


class RosterInvalid(FederationError):
    """A roster is not signed, not the next one, or older than one already seen."""

    code = "ST-803"
    title = "The list of sites is not trusted"
    cause = "Its signature is wrong, versions are missing, or it is older than one seen before."
    advice = "Ask the coordinator's operator what happened; do not train until it is explained."


class EnvelopeInvalid(FederationError):
    """A message was changed, replayed, misdirected or not signed."""

    code = "ST-804"
    title = "A message is not trusted"
    cause = "Its signature does not fit its content, run, round, kind, sender or receiver."
    advice = "It was ignored. If it goes on, somebody or something changes messages on their way."


class BodyInvalid(FederationError):
    """A request or reply of the enrolment and plan routes breaks its schema or size limit."""

    code = "ST-805"
    title = "A request or reply has the wrong form"
    cause = "A field is missing, unknown, of the wrong type, or too large."
    advice = "The two sides probably run different versions of silotune; align them."


class RequestDeclined(FederationError):
    """The coordinator answered a site's request with an error."""

    code = "ST-806"
    title = "The coordinator did not do what was asked"
    cause = "It knows the site, and the request does not fit what it knows or the state it is in."
    advice = "Read what it said; if it goes on, ask the coordinator's operator to look at its log."


class BooksDisagree(FederationError):
    """A site's ledger or audit log is not the one that the coordinator signed last."""

    code = "ST-807"
    title = "The site's books went back"
    cause = (
        "The ledger or the audit log is older than, or another than, the one that the coordinator "
        "signed last: it was restored from a backup, deleted, or two copies of the site were run."
    )
    advice = (
        "Put the newest copy back. If there is none, stop the site and run `silotune site restore`: "
        "it charges what the coordinator's signature says was spent."
    )


class SignInNeeded(RunError):
    """Nobody who is known asks."""

    code = "ST-624"
    title = "Nobody who is known here"
    cause = "No certificate or password was given, or it is wrong, expired, revoked or of another place."
    advice = "Sign in again, or have a certificate issued: `silotune coordinator people add NAME`."


class NotPermitted(RunError):
    """A viewer tries to act."""

    code = "ST-625"
    title = "This role may not do that"
    cause = "Viewers may look at everything and change nothing."
    advice = "Ask an operator; `silotune coordinator people list` says who is one."
