"""The report of a run: one HTML file that needs nothing else, and its charts as PNG files.

The page fetches nothing and runs no script (its content security policy forbids both), so it can be
mailed, archived and opened on a machine without a network. A run in a few numbers is what ``silotune
report --json`` and the table at the end of a run give.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup
from rich.console import Console
from rich.table import Table
from rich.text import Text

from silotune.percents import likelihood, said_percent
from silotune.plan.plan import stored_plan_in_words
from silotune.report import page, statistics, votes
from silotune.report.figures import MOST_SITES, Summary, summarise
from silotune.report.verdict import (
    DASH,
    attack_sentences,
    epsilon,
    plural,
    power,
    printable,
    score,
    signed,
    site_verdict,
    verdict,
)
from silotune.rounds.run_directory import (
    RunRecord,
    jsonable,
    read_beside,
    read_record,
    write_atomically,
)
from silotune.terminal import octets
from silotune.version import __version__

if TYPE_CHECKING:
    from silotune.report.charts import Chart


def write_report(run_dir: Path, *, beside: Sequence[Path] = ()) -> Path:
    """Write ``report.html`` and ``report-*.png`` into a run directory, finished or not.

    Equal runs give equal bytes: nothing in the report is the time it was written at.

    Parameters
    ----------
    run_dir : Path
        The run.
    beside : sequence of Path
        Other runs of its plan, seeds apart, for the spread of the scores.

    Returns
    -------
    Path
        The HTML file.

    Raises
    ------
    RunDirectoryInvalid
        A folder is no run or damaged, or a run beside it is of another plan.
    """
    record = read_record(run_dir)
    if record.finds == "votes":
        charts, page_text = {}, render_votes(record)
    elif record.finds:
        charts = draw_histograms(record.history.found)
        page_text = render_statistics(record, charts)
    else:
        found = summarise(record, beside=read_beside(record, beside))
        charts = draw_charts(record, found)
        page_text = render_page(record, found, charts)
    for chart in charts.values():
        write_atomically(run_dir / f"report-{chart.name}.png", chart.png)
    path = record.directory.report_path
    write_atomically(path, page_text.encode())
    return path


def draw_charts(record: RunRecord, found: Summary) -> dict[str, Chart]:
    """Every chart that there is something to draw for, by name; none without matplotlib."""
    if not can_draw():
        return {}
    from silotune.report.charts import (
        bytes_chart,
        epsilon_chart,
        learning_chart,
        site_chart,
        time_chart,
        timeline_chart,
    )

    history = record.history
    drawn = (
        learning_chart(page.view(record, "simulator"), found.metric, history.every_round),
        site_chart(found.by_site, found.metric),
        epsilon_chart(found.epsilon_curves, found.privacy.budget),
        timeline_chart(history, record.sites),
        time_chart(history.finished_rounds, found.time.workers),
        bytes_chart(history.finished_rounds),
    )
    return {chart.name: chart for chart in drawn if chart is not None}


def can_draw() -> bool:
    """Whether charts can be drawn here."""
    return importlib.util.find_spec("matplotlib") is not None


def draw_histograms(found: statistics.Found | None) -> dict[str, Chart]:
    """A chart for each histogram of a statistics run, by name; none without matplotlib."""
    if found is None or not can_draw():
        return {}
    from silotune.report.histograms import histogram_chart

    drawn = (
        (name, histogram_chart(name, heading, rows, floor=found["floor"]))
        for name, heading, rows in statistics.histograms(found)
    )
    return {name: chart for name, chart in drawn if chart is not None}


def render_votes(record: RunRecord) -> str:
    """The page of a vote as text, escaped as `render_page` is."""
    found, words = record.history.found, _of_sums(record)
    if found is not None:
        told = {"told": votes.sentences(found), "table": votes.table(found)}
        words |= {**told, "cost": votes.cost(found)}
    return fill("votes.html", charts={}, **words)


def _of_sums(record: RunRecord) -> dict[str, Any]:
    """What the pages of runs that train nothing have in common."""
    about, found = record.plan.get("plan") or {}, record.history.found
    return {
        "found": found,
        "title": printable(str(about.get("name") or record.directory.name)),
        "purpose": str(about.get("purpose") or ""),
        "run": record.directory.name,
        "sites_in_words": plural(len(found["sites"] if found else record.sites), "site"),
        "plan": stored_plan_in_words(record.plan),
        "facts": page.facts(record),
    }


def render_statistics(record: RunRecord, charts: Mapping[str, Chart]) -> str:
    """The page of a statistics run as text, escaped as `render_page` is."""
    found = record.history.found
    words = {**_of_sums(record), "can_draw": can_draw()}
    if found is not None:
        declared = ", ".join(
            f"{printable(site)} {told['declared_units'] or DASH}"
            for site, told in found["sites"].items()
        )
        words |= {
            "told": statistics.sentences(found),
            "tiles": statistics.tiles(found),
            "tables": list(statistics.tables(found)),
            "means": statistics.mean_table(found),
            "quantiles": statistics.quantile_table(found),
            "training": statistics.training_table(found),
            "rounds": statistics.ROUNDS,
            "epsilon": epsilon(found["epsilon"]),
            "delta": power(found["delta"]),
            "declared": declared,
        }
    inline = {name: InlineChart(chart) for name, chart in charts.items()}
    return fill("statistics.html", charts=inline, **words)


def render_page(record: RunRecord, found: Summary, charts: Mapping[str, Chart]) -> str:
    """The page as text. Everything but our own CSS and SVG is escaped by Jinja."""
    inline = {name: InlineChart(chart) for name, chart in charts.items()}
    return fill("report.html", charts=inline, **_words(record, found))


def fill(name: str, **words: Any) -> str:
    """A page of this room: its template and the style of all, filled with words and charts."""
    templates = files("silotune.report") / "templates"
    # The templates are the package's own files, and autoescape is on for every value it prints.
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=FunctionLoader(lambda name: (templates / name).read_text(encoding="utf-8")),
    )
    environment.filters |= {"likelihood": likelihood, "said_percent": said_percent}
    template = environment.get_template(name)
    css = (templates / "report.css").read_text(encoding="utf-8")
    return template.render(css=Markup(css), minus="\N{MINUS SIGN}", version=__version__, **words)  # noqa: S704


class InlineChart:
    """A chart's SVG, marked as ours so that it isn't escaped."""

    def __init__(self, chart: Chart) -> None:
        self.wide_markup = self._classed(chart.wide, "wide")
        self.narrow_markup = self._classed(chart.narrow, "narrow")

    @staticmethod
    def _classed(svg: str, kind: str) -> Markup:
        # Written by an XML serialiser, which escaped every text and attribute in it.
        return Markup(svg.replace("<svg ", f'<svg class="{kind}" ', 1))  # noqa: S704


def _words(record: RunRecord, found: Summary) -> dict[str, Any]:
    """Everything that the template places."""
    curve, released = page.view(record, "simulator"), page.view(record, "released")
    alarm, alarm_words = _alarm(found)
    return {
        "found": found,
        "can_draw": can_draw(),
        "sites_in_words": plural(len(found.sites), "site"),
        "alarm": alarm,
        "alarm_words": alarm_words,
        "attacks": attack_sentences(record.directory.find_json("attacks.json")),
        "verdict": verdict(found),
        "tiles": page.tiles(found),
        "methods": page.method_table(found),
        "recall": page.recall_table(found),
        "chance": page.chance(found),
        "curve_split": curve[-1].split if curve else "",
        "released": released[-1] if released else None,
        "sites": page.site_table(found),
        "site_words": site_verdict(found),
        "sites_left_out": len(found.by_site) > MOST_SITES,
        "protected": found.privacy.guarantee in {"secret", "seeded"},
        "released_words": page.released_words(found),
        "two_sites": page.two_sites_words(found),
        "exposed": page.exposure_table(found),
        "delta": power(found.privacy.delta),
        "certified": bool(record.privacy),
        "mechanism": page.privacy_table(record),
        "spent": page.epsilon_table(found),
        "timeline_left_out": max(0, len(record.sites) - MOST_SITES),
        "time_words": _time_words(found),
        "bytes_words": _bytes_words(found),
        "rounds": page.round_table(record.history.finished_rounds),
        "faults": page.fault_rows(found.faults),
        "resumed": _resumed(record),
        "plan": stored_plan_in_words(record.plan),
        "facts": page.facts(record),
    }


def _alarm(found: Summary) -> tuple[str, str]:
    """What must be read before anything else: that a run gives no privacy."""
    facts = found.privacy
    match facts.guarantee:
        case "none":
            return "Not private.", "This run was made without differential privacy, for comparison."
        case "seeded":
            return (
                f"{facts.statement[:1].upper()}{facts.statement[1:]}.",
                "Whoever knows the seed can remove the noise. Use this run to look at accuracy and "
                "to repeat it, never as a guarantee.",
            )
        case "coordinator":
            return "Private from all but the coordinator.", "It sees the updates without noise."
        case "secret":
            return "", ""


def _time_words(found: Summary) -> str:
    time = found.time
    if time.rounds <= 0:
        return ""

    def part(seconds: float, what: str) -> str:
        return f"{what} {seconds:.1f} s ({seconds / time.rounds:.1%})"

    if time.train_all_sites is None:
        waited = part(time.wait, "waiting for the sites, which train meanwhile,")
        head = f"Of {time.rounds:.1f} s in rounds: {waited}"
    else:
        trained = part(time.train, "training")
        waited = part(time.wait, "waiting for replies beyond that")
        head = f"Of {time.rounds:.1f} s in rounds: {trained}, {waited}"
    spread = (
        f" Training adds up to {time.train_all_sites:.1f} s over all sites, on "
        f"{plural(time.workers, 'worker')} at a time."
        if time.train_all_sites is not None
        else ""
    )
    rest = f"{part(time.aggregate, 'aggregating')}, {part(time.other, 'everything else')}"
    return f"{head}, {rest}.{spread}"


def _bytes_words(found: Summary) -> str:
    rounds = max(1, found.rounds_finished)
    return (
        f"{octets(found.bytes_down)} to the sites and {octets(found.bytes_up)} from them "
        f"in all, {octets((found.bytes_down + found.bytes_up) / rounds)} a round."
    )


def _resumed(record: RunRecord) -> str:
    rounds = record.history.resumed_at
    if not rounds:
        return ""
    after = ", ".join(map(str, rounds))
    return (
        f"The run was interrupted and resumed {plural(len(rounds), 'time')}, after round {after}."
    )


_MOST_SITES = 12
_EPSILON = "\N{GREEK SMALL LETTER EPSILON}"


def summary(run_dir: Path, *, beside: Sequence[Path] = ()) -> dict[str, Any]:
    """Summarise a run, finished or not, as plain JSON data.

    Returns
    -------
    dict
        The fields of `silotune.report.figures.Summary`, and ``verdict``: its sentences.

    Raises
    ------
    RunDirectoryInvalid
        The folder is no run, or one of its files is damaged.
    """
    record = read_record(run_dir)
    if record.finds:
        return {"run": record.directory.name, **(record.history.found or {})}
    found = summarise(record, beside=read_beside(record, beside))
    plain = jsonable({**asdict(found), "verdict": verdict(found)})
    assert isinstance(plain, dict)
    return plain


def print_summary(run_dir: Path, console: Console) -> None:
    """Print methods, sites and the verdict, within the console's width.

    Raises
    ------
    RunDirectoryInvalid
        The folder is no run, or one of its files is damaged.
    """
    record = read_record(run_dir)
    if record.finds and (told := record.history.found) is not None:
        show = votes.print_votes if record.finds == "votes" else statistics.print_statistics
        show(told, console)
        return
    found = summarise(record)
    if found.methods:
        console.print(_methods(found, width=console.width))
        console.print()
    if found.by_site and found.method("own"):
        console.print(_sites(found, width=console.width))
    if found.methods:
        console.print()
    if found.privacy.guarantee in {"none", "seeded"}:
        console.print(Text(f"NOT PRIVATE: {found.privacy.statement}", style="bold red"))
    for sentence in verdict(found):
        console.print(Text(sentence), soft_wrap=False)


def _methods(found: Summary, *, width: int) -> Table:
    metrics = found.metrics
    table = _table(
        "all sites' held-out test data",
        [*(metric.title for metric in metrics), "over own", _EPSILON, "s"],
        width=width,
    )
    for row in found.methods:
        table.add_row(
            Text(row.title),
            *(score(row.test.get(metric.key)) for metric in metrics),
            signed(row.gain_over_own),
            epsilon(row.epsilon),
            DASH if row.seconds is None else f"{row.seconds:,.1f}",
            style="bold" if row.key == "federated" else "",
        )
    return table


_COLUMNS = (
    ("trivial", "trivial"),
    ("own", "own"),
    ("federated", "federated"),
    ("own head", "personal"),
)


def _sites(found: Summary, *, width: int) -> Table:
    """Each site at home, and the gain there (red where it is none) beside that on everybody's data."""
    columns = [(n, key) for n, key in _COLUMNS if any(getattr(r, key) for r in found.by_site)]
    names = [name for name, _ in columns]
    table = _table("site, own test data", [*names, "at home", "on all"], width=width)
    shown = sorted(found.by_site, key=lambda row: row.gain or 0.0)[:_MOST_SITES]
    for row in [site for site in found.by_site if site in shown]:
        scores = [score(row.score(key, found.metric)) for _, key in columns]
        gains = [_signed(gain) for gain in (row.gain, row.gain_everywhere)]
        table.add_row(Text(printable(row.site)), *scores, *gains)
    if len(found.by_site) > len(shown):
        table.add_row(f"and {len(found.by_site) - len(shown)} with larger gains")
    return table


def _signed(gain: float | None) -> Text:
    return Text(signed(gain), style="red" if gain is not None and gain < 0 else "")


def _table(first: str, numbers: list[str], *, width: int) -> Table:
    """A table for a console of this width: where it is narrow names are cut, and never a digit."""
    table = Table(box=None, padding=(0, 1), show_edge=False)
    widths = [max(len(name), 6) for name in numbers]
    room = width - 2 - sum(each + 2 for each in widths)
    table.add_column(first, no_wrap=True, overflow="ellipsis", max_width=max(room, 20))
    for name, least in zip(numbers, widths, strict=True):
        table.add_column(name, no_wrap=True, justify="right", min_width=least)
    return table
