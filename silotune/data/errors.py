"""What only a site's own data and configuration can be wrong with."""

from __future__ import annotations

from silotune.errors import DataError


class SiteConfigInvalid(DataError):
    """site.toml is wrong."""

    code = "ST-201"
    title = "The site configuration is not valid"
    cause = "site.toml is missing, is not TOML, or has an unknown or wrong setting."
    advice = "Correct the keys that the message lists; examples/site.toml explains each."


class UnitMismatch(DataError):
    """The plan protects another unit than the one the site offers its dataset under."""

    code = "ST-208"
    title = "The plan's privacy unit is not the site's"
    cause = "privacy.unit of the plan differs from the unit of the dataset in site.toml."
    advice = "Set privacy.unit to the site's unit; its budget and declared_units count that one."


class LabelsUnfit(DataError):
    """The site declares a label that the plan lacks."""

    code = "ST-210"
    title = "The plan lacks a label that the site declares"
    cause = "A label in labels of the dataset in site.toml is not one of model.labels of the plan."
    advice = "Add the label to model.labels, spelled as in site.toml, or take it out of site.toml."


class HeldOutTooMuch(DataError):
    """The plan holds out more than the site lends for it."""

    code = "ST-211"
    title = "The plan holds out too large a share"
    cause = "test_share and validation_share together are above max_held_out of the dataset."
    advice = "Lower the shares in the plan, or raise max_held_out in site.toml."


class RecordsChanged(DataError):
    """A run can't go on with other records than it began with."""

    code = "ST-212"
    title = "The records changed since the run began"
    cause = "A site's records are not those that the first rounds of this run were trained on."
    advice = "Put the old records back, or start a new run."
