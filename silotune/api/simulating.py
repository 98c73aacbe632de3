"""Plans tried on this machine: a run over simulated sites, its continuation, and attacks on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from rich.console import Console

from silotune.api import progress as showing
from silotune.api.run import Run
from silotune.api.site import Site
from silotune.data.site import load_sites
from silotune.errors import PlanInvalid
from silotune.plan.plan import Plan
from silotune.plan.written import plan_toml
from silotune.rounds.run_directory import RunDirectory
from silotune.simulation import run as simulation
from silotune.simulation.run import EngineName, Settings

PathText = str | PathLike[str]


def simulate(
    plan: Plan | PathText,
    *,
    sites: PathText | Sequence[Site] | None = None,
    runs: PathText = "runs",
    settings: Mapping[str, Any] | None = None,
    baselines: bool = False,
    attack: bool = False,
    workers: int = 0,
    engine: EngineName = "processes",
    address: str | None = None,
    device: str = "auto",
    isolate: bool = False,
    progress: bool | Console = True,
) -> Run:
    """Run a plan over simulated sites on this machine, as ``silotune simulate`` does.

    Parameters
    ----------
    plan : Plan or path
        A plan, or its TOML file.
    sites : path or sequence of Site, optional
        A folder that holds a folder with a site.toml for each site, or the sites themselves; by default
        the folder of the plan's file.
    runs : path
        Where the run directory is made.
    settings : mapping, optional
        Plan keys to replace for this run, such as ``{"privacy.epsilon": 3.0}``.
    baselines : bool
        Also train each site alone, pooled records, and a head on frozen features.
    attack : bool
        Attack the result too: an audited step, and the run again with planted canaries.
    workers : int
        Worker processes; 0 takes one a core.
    engine, address : str
        ``processes`` of this machine, or ``ray``, perhaps of the cluster at an address.
    device : str
        ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
    isolate : bool
        Read records in confined processes, one a site, as real sites do.
    progress : bool or Console
        Show how the run goes on.

    Returns
    -------
    Run
        The finished run.

    Raises
    ------
    SilotuneError
        Of any family; the run directory keeps what was finished.

    Examples
    --------
    >>> import silotune
    >>> run = silotune.simulate("hospitals/plan.toml", settings={"rounds.number": 2}, progress=False)
    >>> len(run.rounds())
    2
    """
    chosen = _chosen(engine, workers, device, address=address, isolate=isolate, baselines=baselines)
    read, text = _read(plan, settings)
    offered = _sites(plan, sites)
    console = showing.console_of(progress)
    with showing.rounds(console) as listener:
        directory = simulation.start(
            read,
            sites=offered,
            plan_toml=text,
            runs=Path(runs),
            settings=chosen,
            listener=listener,
            note=showing.noting(console),
        )
    if attack:
        _attack(directory, chosen, console)
    return Run(directory.root)


def resume(
    run: Run | PathText,
    *,
    attack: bool = False,
    workers: int = 0,
    engine: EngineName = "processes",
    address: str | None = None,
    device: str = "auto",
    isolate: bool = False,
    baselines: bool = False,
    progress: bool | Console = True,
) -> Run:
    """Go on with a run that was stopped or killed, from its last finished round, to the same adapter.

    Parameters
    ----------
    run : Run or path
        Its directory.
    attack : bool
        Attack the result too; then a run that is finished already is no error.
    workers, engine, address, device, isolate, baselines, progress
        As for `simulate`.

    Raises
    ------
    RunDirectoryInvalid
        It is no run directory, or there is nothing left to do.
    RecordsChanged
        A site's records are not those that the run began with.
    """
    chosen = _chosen(engine, workers, device, address=address, isolate=isolate, baselines=baselines)
    directory = RunDirectory.open(Path(run))
    console = showing.console_of(progress)
    if not attack or directory.find_json("results.json") is None:
        with showing.rounds(console) as listener:
            simulation.resume(
                directory.root, settings=chosen, listener=listener, note=showing.noting(console)
            )
    if attack:
        _attack(directory, chosen, console)
    return Run(directory.root)


def _chosen(engine: EngineName, workers: int, device: str, **more: Any) -> Settings:
    if engine not in {"processes", "ray"}:
        raise ValueError("engine is 'processes' or 'ray'")
    return Settings(engine=engine, workers=workers, device=device, **more)


def _read(plan: Plan | PathText, settings: Mapping[str, Any] | None) -> tuple[Plan, str]:
    """The plan with its overrides, and its text as the run directory keeps it."""
    if isinstance(plan, Plan):
        return plan.override(settings or {}), plan_toml(plan)
    path = Path(plan)
    return Plan.load(path, settings), path.read_text("utf-8")


def _sites(plan: Plan | PathText, sites: PathText | Sequence[Site] | None) -> list[Any]:
    if sites is None:
        if isinstance(plan, Plan):
            raise PlanInvalid("a plan that is not a file says nothing of where the sites are")
        return list(load_sites(Path(plan).resolve().parent))
    if isinstance(sites, str | PathLike):
        return list(load_sites(Path(sites)))
    return [site.config for site in sites]


def _attack(directory: RunDirectory, settings: Settings, console: Console | None) -> None:
    from silotune.simulation.attack import attack

    with showing.attacking(console) as say:
        attack(directory, settings=settings, say=say)
