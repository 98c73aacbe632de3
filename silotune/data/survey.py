"""What sites have for a plan, told to whoever looks at them from the same machine.

At a real site that is its own team; in a simulation, whoever simulates. Nothing of it is ever sent.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from silotune.data.look_alikes import LookAlikes, find_look_alikes
from silotune.data.reader import load_records
from silotune.data.records import Records
from silotune.data.site import SiteConfig
from silotune.data.splits import Split
from silotune.errors import SilotuneError
from silotune.plan import Plan


@dataclass(frozen=True)
class Surveyed:
    """One site's records, seen with a plan.

    Attributes
    ----------
    site : str
        Its name.
    records : Records or None
        What it would train and test on; None if it refuses the plan or can't read its dataset.
    look_alikes : LookAlikes or None
        Across its split.
    problem : SilotuneError or None
        Why there are no records.
    """

    site: str
    records: Records | None
    look_alikes: LookAlikes | None = None
    problem: SilotuneError | None = None

    @property
    def trains(self) -> bool:
        """Whether there is anything to train on."""
        return self.records is not None and self.records.n_units(Split.TRAIN) > 0

    def notes(self, *, split_by: str) -> list[str]:
        """What somebody at the site should know before the run, in sentences."""
        if self.problem is not None:
            return [f"{self.site} can't take part: {self.problem.code} {self.problem.detail}"]
        assert self.records is not None
        notes = [f"{self.site} leaves out {part.told}" for part in self.records.left_out]
        if not self.trains:
            notes.append(f"{self.site} has no record to train on: it would add noise alone")
        elif self.look_alikes is not None and self.look_alikes.worth_telling:
            hint = '; data.split_by = "group" keeps a group on one side' * (split_by == "unit")
            notes.append(f"{self.site}: {self.look_alikes}{hint}")
        return notes


def survey(
    sites: Sequence[SiteConfig],
    plan: Plan,
    *,
    roles: Collection[str],
    secrets: Mapping[str, bytes],
) -> tuple[Surveyed, ...]:
    """Read what each site has for a plan.

    Parameters
    ----------
    sites, plan
        Who is asked, and for what.
    roles : collection of str
        What the plan's task reads.
    secrets : mapping of site to bytes
        Each site's own, which decides its split.
    """
    return tuple(_look(site, plan, roles=roles, secret=secrets[site.name]) for site in sites)


def _look(site: SiteConfig, plan: Plan, *, roles: Collection[str], secret: bytes) -> Surveyed:
    try:
        records = load_records(site, plan, roles=roles, secret=secret)
    except SilotuneError as exc:
        return Surveyed(site.name, None, problem=exc)
    return Surveyed(site.name, records, find_look_alikes(records))
