"""Errors of what a site and the coordinator have in common: files at rest and audit logs."""

from __future__ import annotations

from silotune.errors import PrivacyError


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
