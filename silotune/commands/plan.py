"""`silotune plan`: write a plan, and check one before anybody runs it."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from silotune.commands import costs
from silotune.commands.folder import AsJson, numbers_of_units
from silotune.commands.new_plan import new
from silotune.commands.vote import chosen, vote
from silotune.data.site import SiteConfig, declared_units, load_sites
from silotune.errors import ModelNotFound, PlanInvalid
from silotune.plan.counted import part_scale
from silotune.plan.left_out import left_out
from silotune.plan.plan import Plan, candidates_of, notes_on, plan_in_words, schema
from silotune.plan.voted import blocks_at
from silotune.plan.written import toml_text
from silotune.terminal import headed, octets, terminal

app = typer.Typer(no_args_is_help=True, help="Write and check plans, and print their schema.")
app.command("new")(new)
app.command("vote")(vote)
app.command("chosen")(chosen)

Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="Replace a plan setting, e.g. --set privacy.epsilon=3"),
]
PlanPath = Annotated[Path, typer.Argument(help="The plan's TOML file.", show_default=False)]


@app.command("check")
def check(
    path: PlanPath,
    sizes: Annotated[
        str,
        typer.Option(help="Units at each site, e.g. 1000,2500. Default: the site folders' own."),
    ] = "",
    link: Annotated[
        float,
        typer.Option(min=0.0, help="What a site can send, in Mbit/s: gives the time of a run."),
    ] = 100.0,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Validate a plan and say in plain words what it does and what it costs.

    Costs are the trainable parameters, the bytes of a round and of the run, the time, the number of
    steps, and for each site the noise and the epsilon that the plan comes to. What was left out of
    the file is told with the rule that it follows, and settings in a bad corner with what is better.
    Where site folders lie beside the plan, their records are read: what a site would refuse or leave
    out is told.
    """
    settings = parsed(overrides or [])
    written = Plan.written_in(path, settings)
    numbers = left_out(written)
    plan = written.completed(numbers, source=str(path))
    sites = () if sizes or not any(path.parent.glob("*/site.toml")) else load_sites(path.parent)
    with terminal(stderr=True).status("Trying the model") as status:
        facts = assess(plan, _given(sizes) if sizes else declared_units(sites, plan.data.dataset))
        facts["link_seconds"] = _link_seconds(facts, link)
        status.update("Reading the sites' records")
        facts["notes"] = [*_start_notes(plan), *_notes(plan, sites), *facts.pop("corners")]
    facts["left_out"] = [asdict(number) for number in numbers]
    if as_json:
        typer.echo(json.dumps(facts))
        return
    _print(plan, facts, terminal())


@app.command("schema")
def print_schema() -> None:
    """Print the JSON schema of a plan, for editors and other tools."""
    typer.echo(json.dumps(schema(), indent=2))


def parsed(settings: Sequence[str]) -> dict[str, Any]:
    """``key=value`` with values as TOML; an empty value removes the key. Raises `PlanInvalid`."""
    found: dict[str, Any] = {}
    for setting in settings:
        key, sign, text = setting.partition("=")
        if not sign or not key:
            raise PlanInvalid(f"--set {setting}: expected key=value")
        try:
            found[key] = tomllib.loads(f"value = {text}")["value"] if text else None
        except tomllib.TOMLDecodeError:
            found[key] = text  # a bare word is a string
    return found


def _given(sizes: str) -> dict[str, int]:
    """Declared units by site, from the command line."""
    numbers = numbers_of_units(sizes, option="--sizes")
    return {f"site {i}": number for i, number in enumerate(numbers, start=1)}


def _notes(plan: Plan, sites: Sequence[SiteConfig]) -> list[str]:
    """What the plan leaves open, and what each site would say of it to its own team."""
    from silotune.client.terms import delta_notes
    from silotune.data.checks import notes_on_sites, survey
    from silotune.data.declared import new_secret

    notes = notes_on(plan)
    secrets = {site.name: new_secret() for site in sites}
    looked = survey(sites, plan, roles=plan.roles, secrets=secrets)
    notes += notes_on_sites(looked, split_by=plan.data.split_by)
    for site in sites:
        notes += delta_notes(plan, site) if plan.data.dataset in site.datasets else []
    return notes


def assess(plan: Plan, declared: dict[str, int]) -> dict[str, Any]:
    """What a plan costs.

    Returns
    -------
    dict
        ``plan_sha256``, ``steps``, ``model`` (description, or why it can't be loaded here),
        ``base_bytes`` that its frozen weights take in memory, ``trainable_parameters``, ``bytes_up``
        and ``bytes_down`` a site and round, ``run_bytes_up`` and ``run_bytes_down`` a site and run
        (None where the model isn't here), ``kept_bytes`` of the adapters that a simulation leaves,
        ``noise_beside_independent`` (what noise that is correlated over rounds leaves in the adapters,
        over what independent noise does), ``corners`` (settings that contradict what was measured),
        ``rounds_a_site`` (in how many rounds one of these sites is expected to be asked; None without
        any), for statistics ``noise_of_a_count`` (one standard deviation, in units), for a vote
        ``noise_of_votes``, and ``sites``: declared units, expected batch, rate, sigma, epsilon, and the
        seconds of computing that a run would take on this machine.
    """
    model = _model_facts(plan)
    layout, record = model.pop("layout"), model.pop("seconds_a_record")
    sites = {
        name: {
            **_site_facts(plan, units),
            "seconds": record and costs.seconds(plan, record=record, units=units),
        }
        for name, units in declared.items()
    }
    counted = _count_facts(plan, [facts["sigma"] for facts in sites.values()])
    corners = costs.corners(plan, layout, declared)
    if noise := counted.get("noise_of_votes"):
        corners += costs.close_votes(plan, declared, noise=noise)
    return {
        "name": plan.plan.name,
        "plan_sha256": plan.sha256,
        "steps": plan.steps,
        "private": plan.private and plan.plan.seed is None,
        **model,
        "noise_beside_independent": costs.beside_independent(plan, declared),
        "rounds_a_site": _rounds_a_site(plan, len(declared)),
        **counted,
        "corners": corners,
        "sites": sites,
    }


def _rounds_a_site(plan: Plan, sites: int) -> float | None:
    """In how many rounds one of so many sites is expected to be asked; None without any."""
    return plan.rounds.number * costs.sites_a_round(plan, sites) / sites if sites else None


def _count_facts(plan: Plan, sigmas: Sequence[float]) -> dict[str, float]:
    """Of a plan that counts: the noise of a count, in units, if all these sites take part."""
    if not plan.only_sums or not sigmas:
        return {}
    sharers = plan.aggregation.threshold if plan.privacy.noise == "shared" else 1
    variance = math.fsum(sigma**2 for sigma in sigmas) / (sharers or 1)
    noise = math.sqrt(variance) / part_scale(plan)
    return {"noise_of_a_count" if plan.vote is None else "noise_of_votes": noise}


def _link_seconds(facts: dict[str, Any], link: float) -> float | None:
    """What a run's adapters and updates take over a site's link."""
    if facts["run_bytes_up"] is None or not link:
        return None
    return float(8e-6 * (facts["run_bytes_up"] + facts["run_bytes_down"]) / link)


_UNKNOWN = dict.fromkeys(
    (
        "base_bytes", "trainable_parameters", "bytes_up", "bytes_down", "run_bytes_up",
        "run_bytes_down", "kept_bytes", "layout", "seconds_a_record",
    )
)  # fmt: skip


def _model_facts(plan: Plan) -> dict[str, Any]:
    from silotune.models.layout import statistics_layout

    if plan.statistics is not None:
        nbytes = statistics_layout(plan).nbytes
        told = {"trainable_parameters": 0, "bytes_up": nbytes, "bytes_down": nbytes}
        told |= {"run_bytes_up": nbytes, "run_bytes_down": nbytes, "kept_bytes": nbytes}
        return {**_UNKNOWN, "model": "no model takes part", **told}
    from silotune.models.base import load_model
    from silotune.models.pretrained import locate
    from silotune.privacy.quantized import frozen_bytes
    from silotune.rounds.run_directory import most_kept

    try:
        locate(plan.model.base)
    except ModelNotFound as exc:  # whoever has it will see; every other trouble is the plan's
        return {"model": f"{exc.code} {exc.detail}", **_UNKNOWN}
    model = load_model(plan, device="cpu")
    layout = model.layout if plan.vote is None else statistics_layout(plan)
    nbytes = layout.nbytes
    measured = plan.plan.seed is None and plan.model.dtype == "auto"
    later = "; a simulation measures what is fastest, once a run, and writes it down"
    up, down = (nbytes, nbytes) if plan.only_sums else costs.moved(plan, model.layout)
    return {
        "model": model.description + later * measured,
        "base_bytes": frozen_bytes(model.module),
        "trainable_parameters": 0 if plan.only_sums else model.layout.size,
        "bytes_up": nbytes,
        "bytes_down": nbytes,
        "run_bytes_up": up,
        "run_bytes_down": down,
        "kept_bytes": nbytes * most_kept(plan.rounds.number),
        "layout": model.layout,
        "seconds_a_record": costs.seconds_a_record(model),
    }


def untried(plan: Plan) -> str:
    """Why the plan can't be tried here; empty if it was. Raises `ModelError` if the model fails."""
    if plan.statistics is not None:
        return ""
    try:
        from silotune.models.base import require_taken
        from silotune.models.pretrained import locate
    except ImportError:  # a coordinator needs no PyTorch
        return "for this machine has no PyTorch"
    try:
        locate(plan.model.base)
    except ModelNotFound as exc:
        return f"for {exc.detail}"
    require_taken(plan if plan.vote is None else candidates_of(plan)[0])
    return "".join(f"for {note}" for note in _start_notes(plan))


def _start_notes(plan: Plan) -> list[str]:
    """That the start adapter is not here. Raises `AdapterMismatch` if it is, and does not fit."""
    from silotune.models.start import require_start

    start = plan.lora.start
    if start is not None and not Path(start.adapter).expanduser().is_dir():
        return [
            f"lora.start.adapter, {start.adapter}, is not here: a coordinator looks at its own runs"
        ]
    require_start(plan)
    return []


def _site_facts(plan: Plan, units: int) -> dict[str, Any]:
    from silotune.client.terms import run_events, sigma_for
    from silotune.privacy.accounting import epsilon

    facts: dict[str, Any] = {
        "declared_units": units,
        "rate": plan.rate_for(units),
        "expected_batch": plan.expected_batch(units),
        "sigma": None,
        "epsilon": None,
    }
    if plan.private:
        assert plan.privacy.delta is not None
        sigma = sigma_for(plan, units)
        facts["sigma"] = sigma
        facts["epsilon"] = epsilon(run_events(plan, units, sigma=sigma), delta=plan.privacy.delta)
    return facts


def _print(plan: Plan, facts: dict[str, Any], console: Console) -> None:
    from silotune.report.verdict import plural
    from silotune.rounds.run_directory import every, most_kept

    console.print(headed(plan.plan.name, f"is a valid plan. SHA-256 {plan.sha256}"))
    for heading, sentence in plan_in_words(plan):
        console.print(headed(f"{heading}.", sentence, indent=2))
    if plan.plan.seed is not None:
        console.print(headed("Seeded:", "repeatable, and therefore not private.", indent=2))
    console.print(headed("Here.", str(facts["model"]), indent=2))
    if facts["base_bytes"]:
        console.print(f"  {_memory(plan, facts['base_bytes'])}.")
    if facts["trainable_parameters"]:
        console.print(
            f"  Trains {facts['trainable_parameters']:,} parameters: {facts['bytes_up']:,} bytes up and "
            f"{facts['bytes_down']:,} down, a site and round."
        )
        number = plan.rounds.number
        console.print(
            f"  A simulation keeps at most {plural(most_kept(number), 'adapter')}, the last, the best "
            f"and one in {every(number)}: {octets(facts['kept_bytes'])}."
        )
        _print_times(plan, facts, console)
    _print_noise(plan, facts, console)
    for number in facts["left_out"]:
        line = f"{number['key']} = {_shortened(number['value'])}: {number['why']}."
        console.print(headed("Left out.", line, indent=2))
    for sentence in facts["notes"]:
        console.print(headed("Note.", f"{sentence}.", style="yellow", indent=2))
    if not facts["sites"]:
        console.print("  Give --sizes 1000,2500 to see epsilon for sites of these sizes.")
        return
    console.print(_site_table(facts))


def _site_table(facts: dict[str, Any]) -> Table:
    """What each site has, adds and pays."""
    table = Table("site", "units", "batch", "rate", "noise (sigma)", "epsilon", box=None)
    for name, site in facts["sites"].items():
        found = (site[key] for key in ("sigma", "epsilon"))
        cells = ["none" if figure is None else f"{figure:.3f}" for figure in found]
        rate, batch = f"{site['rate']:.4f}", f"{site['expected_batch']:.0f}"
        table.add_row(name, f"{site['declared_units']:,}", batch, rate, *cells)
    return table


def _print_noise(plan: Plan, facts: dict[str, Any], console: Console) -> None:
    """How much noise there is in what is counted, voted or trained, and how it is charged."""
    from silotune.report.verdict import plural

    if "noise_of_a_count" in facts:
        noise = f"{facts['noise_of_a_count']:.1f} {plan.privacy.unit}s"
        console.print(
            f"  A count comes with noise of {noise} (one standard deviation), if all "
            f"{len(facts['sites'])} sites take part; more epsilon or fewer things counted make it less."
        )
    if (left := facts["noise_beside_independent"]) is not None:
        console.print(
            f"  The noise that rounds leave in the adapters is {left:.2f} of that of independent "
            "noise, at the same epsilon."
        )
    if (bands := plan.privacy.bands) > 1 and facts["sites"]:
        console.print(
            f"  The ledger is charged once for {bands} rounds, {plural(plan.releases, 'time')} in all, "
            f"for a sampling rate that is {bands} times the one below."
        )
    if "noise_of_votes" in facts:
        _print_vote(plan, facts, console)


def _print_vote(plan: Plan, facts: dict[str, Any], console: Console) -> None:
    """How many votes there are, and how long they take."""
    blocks = sum(blocks_at(plan, site["declared_units"]) for site in facts["sites"].values())
    noise, sites = facts["noise_of_votes"], len(facts["sites"])
    console.print(
        f"  {blocks} blocks vote; each number of votes comes with noise of {noise:.1f} (one standard "
        f"deviation), if all {sites} sites take part."
    )
    deadline = _time(plan.rounds.deadline).removeprefix("about ")
    _print_computing(facts, f"; a round waits {deadline} (rounds.deadline)", console)


def _print_computing(facts: dict[str, Any], more: str, console: Console) -> None:
    """How long computing takes at the site that has most to do, where it was measured."""
    seconds = [site["seconds"] for site in facts["sites"].values() if site["seconds"]]
    if seconds:
        console.print(
            f"  Computing takes {_time(max(seconds))} at the largest site, on a machine like this "
            f"one{more}."
        )


def _memory(plan: Plan, octets_kept: int) -> str:
    """What the base model takes of memory, in a sentence."""
    kept = f"The frozen weights take {octets(octets_kept)} of each process's memory"
    if plan.model.quantization == "none":
        return kept
    return f"{kept} in {plan.model.quantization}, and all of float32 while it is loaded"


def _print_times(plan: Plan, facts: dict[str, Any], console: Console) -> None:
    """How much a run moves, and how long that and its computing take."""
    moved = f"{octets(facts['run_bytes_up'])} up and {octets(facts['run_bytes_down'])} down"
    link = facts["link_seconds"]
    over = "" if link is None else f", {_time(link)} of a site's link"
    console.print(f"  The whole run of {plan.rounds.number} rounds moves {moved} a site{over}.")
    if (rounds := facts["rounds_a_site"]) is not None and rounds < plan.rounds.number:
        console.print(
            f"  Of these {len(facts['sites'])} sites each is asked in about {rounds:.0f} rounds: it "
            "moves, computes and pays for those. Its ledger sets all rounds aside, and the noise is "
            "sized for all."
        )
    _print_computing(facts, " and at texts of full length", console)


def _time(seconds: float) -> str:
    """A rough time in words."""
    for size, unit in ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes")):
        if seconds >= 1.5 * size:
            return f"about {seconds / size:.0f} {unit}"
    return f"about {seconds:.0f} seconds" if seconds >= 1.5 else "about 1 second"


def _shortened(value: object) -> str:
    """A value as TOML has it, a long list cut."""
    if isinstance(value, list) and len(value) > 3:
        return f"{json.dumps(value[:3], ensure_ascii=False)[:-1]}, ... {len(value)} in all]"
    return toml_text(value)
