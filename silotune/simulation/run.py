"""Run a plan over simulated sites, from the plan file to a finished run directory.

The ServerApp, ClientApp, strategies and privacy code are those of a deployment; only the grid
differs. A run that was killed goes on from its last finished round.

A simulation looks at the sites' records before it begins, and again before it goes on. A real
coordinator can't; here all sites are this machine's, so what each of them would say to its own team
is told to whoever simulates.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from flwr.app import Context, RecordDict
from flwr.serverapp import ServerApp

from silotune.client.isolation.confinement import checked
from silotune.client.terms import delta_notes
from silotune.data.checks import Surveyed, notes_on_sites, survey
from silotune.data.declared import new_secret, own_secret
from silotune.data.site import SiteConfig, load_sites
from silotune.errors import (
    PlanInvalid,
    QuorumLost,
    RecordsChanged,
    RunDirectoryInvalid,
    SilotuneError,
    TooFewRecords,
)
from silotune.events.source import held
from silotune.models.choices import Choices, choose
from silotune.models.start import require_start
from silotune.percents import said_percent
from silotune.plan.plan import Plan, candidates_of, notes_on
from silotune.rounds.rounds import build_server_app
from silotune.rounds.run_directory import FOUND_FILES, RunDirectory
from silotune.simulation.ancestry import carry_ledgers, secrets_of, states_of_start
from silotune.simulation.grid import WorkerGrid
from silotune.simulation.outcome import (
    AdapterScorer,
    LoggedStore,
    View,
    write_privacy,
    write_results,
    write_timings,
)
from silotune.simulation.pool import SiteSlot, spread
from silotune.simulation.program import SimulatedSites, payload_for
from silotune.trust.vault import Vault
from silotune.version import __version__

Note = Callable[[str], None]

RECORDS_FILE = "records.json"
"""In the run directory: what each site trained on, by the fingerprint of its content."""


def survey_sites(
    plan: Plan, sites: Sequence[SiteConfig], *, secrets: Mapping[str, bytes], note: Note
) -> tuple[Surveyed, ...]:
    """Look at all sites' records, and tell what should be known.

    Raises
    ------
    SilotuneError
        Fewer sites than ``rounds.min_sites`` can take part: the first site's own reason.
    TooFewRecords
        No site has a record to train on.
    """
    for sentence in notes_on(plan):
        note(sentence)
    found = survey(sites, plan, roles=plan.roles, secrets=secrets)
    for sentence in notes_on_sites(found, split_by=plan.data.split_by):
        note(sentence)
    for site, one in zip(sites, found, strict=True):
        if one.problem is None:
            for sentence in delta_notes(plan, site):
                note(sentence)
    problems = [one for one in found if one.problem is not None]
    if len(found) - len(problems) < plan.rounds.min_sites and problems:
        problem = problems[0].problem
        assert problem is not None
        raise type(problem)(f"{problems[0].site}: {problem.detail}")
    if not any(one.trains for one in found):
        raise TooFewRecords(
            "no site has a record to train on: the notes above say what was left out"
        )
    return found


def keep_survey(
    directory: RunDirectory, found: Sequence[Surveyed], secrets: Mapping[str, bytes]
) -> None:
    """Write the sites' secrets into their state, and down what they train on."""
    for one in found:
        state = directory.site(one.site)
        own_secret(state, Vault(state, to_disk=False), new=secrets[one.site])
    directory.write_json(RECORDS_FILE, _fingerprints(found, secrets))


def require_same_records(
    directory: RunDirectory, plan: Plan, sites: Sequence[SiteConfig], *, note: Note
) -> None:
    """Refuse to go on with other records than the run began with.

    Raises
    ------
    RecordsChanged
        A site's records differ; the message names the sites.
    """
    began = directory.find_json(RECORDS_FILE)
    if began is None:
        note(
            "the run directory does not say which records the run began with: they may have changed"
        )
        return
    secrets = secrets_of({site.name: directory.site(site.name) for site in sites})
    found = survey(sites, plan, roles=plan.roles, secrets=secrets)
    now = _fingerprints(found, secrets)
    changed = sorted(name for name in now if now[name] != began.get(name))
    if changed:
        raise RecordsChanged(f"the records of {', '.join(changed)} changed since the run began")


def _fingerprints(found: Sequence[Surveyed], secrets: Mapping[str, bytes]) -> dict[str, str | None]:
    return {
        one.site: None if one.records is None else one.records.fingerprint(secrets[one.site])
        for one in found
    }


EngineName = Literal["processes", "ray"]
Listener = Callable[[Mapping[str, Any]], None]


def _no_note(sentence: str) -> None:
    """Tell nobody."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to simulate, beside what the plan says.

    Attributes
    ----------
    engine : str
        ``processes`` (worker processes of this machine) or ``ray`` (Flower's Ray engine).
    workers : int
        Worker processes, or Ray actors; each computes on one thread.
    baselines : bool
        Whether to train the comparison models too.
    address : str or None
        Of a Ray cluster; None starts Ray on this machine.
    device : str
        ``auto``, ``cpu`` or ``cuda:N``.
    isolate : bool
        Whether each site's records are read in a confined process of their own.
    """

    engine: EngineName = "processes"
    workers: int = 0
    baselines: bool = False
    address: str | None = None
    device: str = "auto"
    isolate: bool = False

    def worker_count(self, sites: int) -> int:
        """Workers really used: by default one a core, never more than sites."""
        wanted = self.workers or len(os.sched_getaffinity(0))
        return max(1, min(wanted, sites))


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """What a run directory says it was made of."""

    plan: Plan
    sites: list[SiteConfig]
    choices: Choices


@dataclass(frozen=True, kw_only=True)
class _Job(Recorded):
    """A run that is ready to go: new or resumed."""

    directory: RunDirectory
    settings: Settings

    @property
    def payload(self) -> dict[str, Any]:
        states = [self.directory.site(site.name).resolve() for site in self.sites]
        return payload_for(
            self.plan,
            run=self.directory.name,
            sites=self.sites,
            states=states,
            choices=self.choices,
            shared=self.shared,
            isolate=self.settings.isolate,
        )

    @property
    def shared(self) -> Path:
        """Scratch that the run's processes share; removed at its end."""
        return (self.directory.root / "scratch").resolve()


def simulate(
    plan_path: Path,
    *,
    runs: Path,
    settings: Settings,
    listener: Listener,
    sites_folder: Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    secrets: Mapping[str, bytes] | None = None,
    note: Note = _no_note,
) -> RunDirectory:
    """Start a new run of a plan.

    Parameters
    ----------
    plan_path : Path
        The plan's TOML file.
    runs : Path
        Where the run directory is made.
    settings : Settings
        How to simulate.
    listener : callable
        Given every event as it is written.
    sites_folder : Path, optional
        Folder whose subfolders are sites; by default the plan's own.
    overrides : mapping, optional
        Dotted plan keys to replace.
    secrets : mapping, optional
        By site's name: equal secrets hold the same units out. Drawn anew by default. Where the plan goes
        on with an earlier run, that run's secrets are taken before these.
    note : callable, optional
        Given sentences about the sites' records and the plan, for whoever simulates.

    Raises
    ------
    SilotuneError
        Of any family; the run directory keeps what was finished.
    """
    return start(
        Plan.load(plan_path, overrides),
        sites=load_sites(sites_folder or plan_path.resolve().parent),
        plan_toml=plan_path.read_text("utf-8"),
        runs=runs,
        settings=settings,
        listener=listener,
        secrets=secrets,
        note=note,
    )


def start(
    plan: Plan,
    *,
    sites: Sequence[SiteConfig],
    plan_toml: str,
    runs: Path,
    settings: Settings,
    listener: Listener,
    secrets: Mapping[str, bytes] | None = None,
    note: Note = _no_note,
) -> RunDirectory:
    """Start a new run of a plan over some sites; `plan_toml` is the plan as its author wrote it.

    The rest is as for `simulate`.
    """
    if plan.only_sums and settings.baselines:
        raise PlanInvalid("a plan that counts trains nothing that baselines could stand beside")
    sites = list(sites)
    _require_sites(plan, sites)
    if settings.isolate:
        for site in sites:
            missing = [each.lack for each in checked(site) if not each.in_force]
            note(f"{site.name} would be confined without: {'; '.join(missing) or 'nothing'}")
    if plan.rounds.sites is not None and len(sites) <= plan.rounds.sites:
        note(
            f"rounds.sites = {plan.rounds.sites}, and {len(sites)} sites are here: every round asks all"
        )
    require_start(plan)
    earlier = states_of_start(plan, sites)
    # What the start was trained on decides, also against secrets that were given.
    drawn = {site.name: new_secret() for site in sites}
    secrets = {**drawn, **(secrets or {}), **secrets_of(earlier)}
    if plan.lora.start is not None and (new := [s.name for s in sites if s.name not in earlier]):
        note(
            f"{', '.join(new)}: not in the run that lora.start is of, as far as that is here. Its "
            "ledger begins anew, and what is held out may have been trained on then"
        )
    found = survey_sites(plan, sites, secrets=secrets, note=note)
    tried = plan if plan.vote is None else candidates_of(plan)[0]
    choices = choose(tried, device=settings.device) if plan.statistics is None else _NO_MODEL
    directory = RunDirectory.create(runs, plan.plan.name, plan_toml=plan_toml)
    keep_survey(directory, found, secrets)
    del found  # all sites' records, for as long as the run takes: workers read them for themselves
    carry_ledgers(earlier, directory)
    job = _Job(directory=directory, plan=plan, sites=sites, choices=choices, settings=settings)
    directory.write_json("resolved.json", _resolved(job))
    return _execute(job, listener)


_NO_MODEL = Choices(device="cpu", dtype="float64", attention="none", reason="no model takes part")


def _require_sites(plan: Plan, sites: Sequence[SiteConfig]) -> None:
    """A round that can't come about is told now, not when its deadline is over."""
    for key, needed in (
        ("rounds.min_sites", plan.rounds.min_sites),
        ("aggregation.threshold", plan.aggregation.threshold or 0),
    ):
        if len(sites) < needed:
            raise QuorumLost(f"{len(sites)} sites are here; {key} asks for {needed}")


def recorded(directory: RunDirectory) -> Recorded:
    """The plan, sites and choices of a run; the sites as they are now."""
    facts = directory.read_json("resolved.json")
    return Recorded(
        plan=Plan.from_mapping(_without_nulls(facts["plan"])),
        sites=[SiteConfig.load(Path(site["path"])) for site in facts["sites"]],
        choices=Choices(**facts["choices"]),
    )


def resume(
    path: Path, *, settings: Settings, listener: Listener, note: Note = _no_note
) -> RunDirectory:
    """Go on with a run that was stopped or killed, with its own plan, sites and choices.

    Raises
    ------
    RunDirectoryInvalid
        It is no run directory, or its run is finished.
    RecordsChanged
        A site's records are not those that the run began with.
    """
    directory = RunDirectory.open(path)
    if directory.find_json("results.json") is not None:
        raise RunDirectoryInvalid(f"{path} is finished; there is nothing to resume")
    run = recorded(directory)
    job = _Job(directory=directory, settings=settings, **vars(run))
    require_same_records(directory, job.plan, job.sites, note=note)
    return _execute(job, listener)


def _execute(job: _Job, listener: Listener) -> RunDirectory:
    with held(job.directory.root):
        store = _store(job, listener)
        with _telling_how_it_ends(store):
            (_play_on_ray if job.settings.engine == "ray" else _play)(job, store)
    return job.directory


@contextmanager
def _telling_how_it_ends(store: LoggedStore) -> Iterator[None]:
    """Write down why a run came to no end of its own: who looks at it later must not wait."""
    try:
        yield
    except KeyboardInterrupt:
        store.append_event("run_stopped", round=store.done)
        raise
    except SilotuneError as exc:
        store.append_event("run_failed", code=exc.code, detail=exc.detail)
        raise
    except Exception as exc:
        store.append_event("run_failed", code=SilotuneError.code, detail=type(exc).__name__)
        raise


def _play(job: _Job, store: LoggedStore) -> None:
    slots = _slots(job)
    store.append_event("run_started", run=job.directory.name, **_scope(job))
    with WorkerGrid(
        "silotune.simulation.program:build",
        job.payload,
        slots,
        workers=job.settings.worker_count(len(slots)),
        log_folder=job.directory.root / "logs",
        on_receipt=store.on_receipt,
    ) as grid:
        grid.wait_until_ready(
            lambda ready: store.append_event(
                "worker_ready", worker=ready.worker, sites=list(ready.sites), seconds=ready.seconds
            )
        )
        view = View(grid.inspect_all)
        scorer = AdapterScorer(job.plan, store=store, view=view)
        app = _server_app(job, store, scorer)
        context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config={})
        app(grid=grid, context=context)
        _conclude(job, store, scorer, view)


def _play_on_ray(job: _Job, store: LoggedStore) -> None:
    """The very same apps on Flower's Ray engine; the simulator looks on from its own process."""
    from silotune.simulation.ray_engine import run_with_ray

    store.append_event("run_started", run=job.directory.name, **_scope(job))
    payload = job.payload
    own = SimulatedSites(payload)

    def inspect_all(
        request: Mapping[str, Any], arrays: Mapping[str, Any], sites: Iterable[str] | None = None
    ) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
        asked = None if sites is None else set(sites)
        return {
            site.name: own.inspect(index, dict(request), dict(arrays))
            for index, site in enumerate(job.sites)
            if asked is None or site.name in asked
        }

    view = View(inspect_all)
    scorer = AdapterScorer(job.plan, store=store, view=view)
    run_with_ray(
        _server_app(job, store, scorer),
        "silotune.simulation.program:build",
        payload=payload,
        sites=_slots(job),
        workers=job.settings.worker_count(len(job.sites)),
        address=job.settings.address,
    )
    _conclude(job, store, scorer, view)


def _store(job: _Job, listener: Listener) -> LoggedStore:
    names = [site.name for site in job.sites]
    return LoggedStore(job.directory, plan=job.plan, names=names, listener=listener)


def _slots(job: _Job) -> list[SiteSlot]:
    return [SiteSlot(site.name, site.units_for(job.plan)) for site in job.sites]


def _server_app(job: _Job, store: LoggedStore, scorer: AdapterScorer) -> ServerApp:
    return build_server_app(plan=job.plan, run=job.directory.name, store=store, observer=scorer)


def _conclude(job: _Job, store: LoggedStore, scorer: AdapterScorer, view: View) -> None:
    """Final adapter, certificates, results and baselines."""
    saved = job.directory.load_checkpoint()
    assert saved is not None  # every round ends with one
    final = saved[0]["adapter"]
    joined = [site for site in job.sites if site.name in store.joined]
    if job.plan.only_sums:
        told = {"run": job.directory.name, **(store.found or {})}
        job.directory.write_json(FOUND_FILES[job.plan.finds], told)
        _close_books(job, store, view)
        job.directory.write_json("results.json", {"methods": []})
        return
    scorer.look_at_final(final)
    model = view.save(final, job.directory.final_adapter.resolve(), site=joined[0].name)
    facts = job.directory.read_json("resolved.json")
    facts |= {"model": model["description"], "trainable_parameters": model["parameters"]}
    job.directory.write_json("resolved.json", facts)
    finished = _close_books(job, store, view)
    count = job.settings.worker_count(len(job.sites))
    write_results(
        job.directory,
        job.plan,
        joined,
        choices=asdict(job.choices),
        adapter=final,
        final=scorer.final_counts,
        base=scorer.base_counts(final.size),
        finished=finished,
        workers=count if job.settings.baselines else 0,
        shared=job.shared,
        store=store,
    )
    shutil.rmtree(job.shared, ignore_errors=True)


def _close_books(job: _Job, store: LoggedStore, view: View) -> dict[str, dict[str, Any]]:
    """Have the sites settle and certify; write down what they spent, and what took time."""
    finished = view.finish(store.joined)
    write_privacy(job.directory, job.plan, finished)
    slots, count = _slots(job), job.settings.worker_count(len(job.sites))
    parts = spread([slot.weight for slot in slots], count)
    workers = [[slots[index].name for index in part] for part in parts]
    write_timings(job.directory, finished, workers=workers)
    return finished


def _scope(job: _Job) -> dict[str, Any]:
    return {
        "sites": [site.name for site in job.sites],
        "rounds": job.plan.rounds.number,
        "computing": str(job.choices),
    }


def _resolved(job: _Job) -> dict[str, Any]:
    plan = job.plan
    libraries = ("flwr", "torch", "transformers", "peft", "opacus", "dp-accounting", "numpy")
    return {
        "run": job.directory.name,
        "plan": json.loads(plan.canonical()),
        "plan_sha256": plan.sha256,
        "engine": job.settings.engine,
        "workers": job.settings.worker_count(len(job.sites)),
        "seed": plan.plan.seed,
        "choices": asdict(job.choices),
        "versions": {"silotune": __version__, **{name: version(name) for name in libraries}},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "model": f"{plan.model.base or 'none'}, {job.choices}",
        "sites": [
            {
                "name": site.name,
                "declared_units": site.units_for(plan),
                "path": str(site.folder / "site.toml"),
            }
            for site in job.sites
        ],
        "split": f"{said_percent(plan.data.test_share)} test, "
        f"{said_percent(plan.data.validation_share)} validation, "
        f"by {plan.data.split_by if plan.data.split_by == 'group' else plan.privacy.unit}",
        "selection": "hyper-parameters chosen on validation data only",
    }


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return value
