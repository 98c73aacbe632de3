"""What only a site's own data and configuration can be wrong with."""

from __future__ import annotations

from silotune.errors import DataError


class SiteConfigInvalid(DataError):
    """site.toml is wrong."""

    code = "ST-201"
    title = "The site configuration is not valid"
    cause = "site.toml is missing, is not TOML, or has an unknown or wrong setting."
    advice = "Correct the keys that the message lists; examples/site.toml explains each."


class UnitTooLarge(DataError):
    """A privacy unit has more records than the site's configuration allows."""

    code = "ST-206"
    title = "A privacy unit has too many records"
    cause = "One patient or customer has more records than max_records_per_unit of the dataset."
    advice = "Raise the bound in site.toml, or check that the unit column is the right one."


class UnitMismatch(DataError):
    """The plan protects another unit than the one the site offers its dataset under."""

    code = "ST-208"
    title = "The plan's privacy unit is not the site's"
    cause = "privacy.unit of the plan differs from the unit of the dataset in site.toml."
    advice = "Set privacy.unit to the site's unit; its budget and declared_units count that one."
