"""Sites: what a site.toml says, and a look at its records; and a file divided into sites."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from silotune.data.columns import Role
from silotune.data.site import SiteConfig, load_sites
from silotune.errors import DataError, PlanInvalid, SilotuneError
from silotune.plan.plan import Plan

if TYPE_CHECKING:
    from silotune.data.examination import Examination
    from silotune.data.partition import Part, Partitioner

Stage = Callable[[str, int], Callable[[], None]]


def _no_stage(title: str, steps: int) -> Callable[[], None]:
    del title, steps
    return lambda: None


class Site:
    """A site on this machine, as its site.toml describes it.

    Parameters
    ----------
    path : path
        Its site.toml, or the folder that holds it.

    Attributes
    ----------
    config : SiteConfig
        All that site.toml says: name, datasets, policy.

    Raises
    ------
    SiteConfigInvalid
        There is none, or it has an unknown or wrong setting.

    Examples
    --------
    >>> import silotune
    >>> site = silotune.Site("hospitals/alpha")
    >>> site.name, list(site.config.datasets)
    ('alpha', ['notes'])
    >>> site.look().records
    60
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        given = Path(path)
        self.config = SiteConfig.load(given / "site.toml" if given.is_dir() else given)

    def __repr__(self) -> str:
        return f"<silotune site {self.name}>"

    @property
    def name(self) -> str:
        """The site's name in every log and report."""
        return self.config.name

    @staticmethod
    def all_in(folder: str | PathLike[str]) -> list[Site]:
        """The sites whose folders lie in a folder, in the order of their names."""
        return [Site(config.folder) for config in load_sites(Path(folder))]

    def look(
        self,
        dataset: str | None = None,
        *,
        plan: Plan | None = None,
        names: Path | None = None,
        stage: Stage = _no_stage,
    ) -> Examination:
        """Look at records before anybody trains on them, as ``silotune data check`` does.

        Parameters
        ----------
        dataset : str, optional
            Which one; may be left out where there is one only, or a plan names it.
        plan : Plan, optional
            Read the records as this plan's run would.
        names : Path, optional
            Folder of a spaCy model of your own: look for names, too.
        stage : callable, optional
            ``stage(title, steps)`` is told what begins, and gives what is called after each step.

        Returns
        -------
        Examination
            Counts, shares and remarks; no text of any record. Counts are exact: they are for the site's
            own people, and not for sharing.

        Raises
        ------
        PlanInvalid
            The plan counts and trains on nothing.
        DataError
            The records can't be read; the message quotes none.
        """
        from silotune.data.examine import examine

        if plan is not None and plan.only_sums:
            raise PlanInvalid(
                "it counts, and trains on nothing: leave it out, or give one that trains"
            )
        if dataset is None:
            dataset = plan.data.dataset if plan else self._only_dataset()
        try:
            return examine(self.config, dataset, plan=plan, names=names, stage=stage)
        except (SilotuneError, KeyboardInterrupt):
            raise
        except Exception as exc:
            # Never the message of a foreign error, nor its traceback: they may quote a record.
            raise DataError(f"the check failed with {type(exc).__name__}") from None

    def _only_dataset(self) -> str:
        if len(self.config.datasets) == 1:
            return next(iter(self.config.datasets))
        raise DataError(
            f"{self.name} offers several datasets", remedy=f"Name one: {list(self.config.datasets)}"
        )


def partition(
    source: str | PathLike[str],
    folder: str | PathLike[str],
    *,
    columns: Mapping[Role, str],
    sites: int = 5,
    by: Partitioner | None = None,
    dataset: str = "records",
    unit: str = "record",
    epsilon: float = 10.0,
    delta: float = 1e-5,
    seed: int = 0,
) -> tuple[Part, ...]:
    """Divide one data file into site folders, to simulate a federation that does not exist yet.

    Every row goes to exactly one site, and a unit (a patient, say) is never split between two.

    Parameters
    ----------
    source : path
        A .csv, .jsonl, .json, .parquet, .arrow or .xlsx file; .gz and .zst too.
    folder : path
        Where to make the site folders.
    columns : mapping of role to str
        The column of each role, such as ``{"text": "note", "label": "diagnosis"}``.
    sites : int
        How many, dealt out at random, unless `by` says otherwise.
    by : Partitioner, optional
        One of `silotune.data.partition`: ``ByColumn("hospital")``, ``DirichletLabels(5, alpha=0.5)``,
        ``QuantitySkew(5, alpha=0.5)``.
    dataset, unit, epsilon, delta
        Terms of every site: the name that plans ask for, what one value of the unit column is, and the
        budget.
    seed : int
        Of everything drawn at random.

    Returns
    -------
    tuple of Part
        Each site's ``folder``, and how many ``records`` and ``units`` it got.

    Raises
    ------
    DataError
        The file can't be read, lacks a column, or the folder holds other sites.

    Examples
    --------
    >>> import silotune
    >>> columns = {"text": "note", "label": "kind"}
    >>> made = silotune.partition("notes.csv", "divided", columns=columns, sites=2)
    >>> [silotune.Site(part.folder).name for part in made]
    ['site-1', 'site-2']
    """
    from silotune.data.partition import Iid, partition_file
    from silotune.data.site import BudgetConfig

    return partition_file(
        Path(source),
        Path(folder),
        partitioner=by or Iid(sites),
        columns=columns,
        budget=BudgetConfig(epsilon=epsilon, delta=delta),
        dataset=dataset,
        unit=unit,
        seed=seed,
    )
