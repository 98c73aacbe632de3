"""A site's records on one page, for its own people: figures, pictures, what to do.

The page is one file that fetches nothing and runs no script, with mode 0600. Its numbers are exact, so
it says at the head that it is not for sharing.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from silotune.data.examination import Examination
from silotune.errors import EnvironmentFault
from silotune.percents import percent
from silotune.report.page import TextTable
from silotune.report.report import InlineChart, can_draw, fill
from silotune.report.verdict import plural, printable
from silotune.trust.files import replace_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from silotune.report.charts import Canvas, Chart

_MOST_BARS = 12
_Rows = tuple[tuple[str, ...], list[tuple[str, ...]]]


def write_records_page(path: Path, found: Sequence[Examination]) -> None:
    """Write the page of some datasets of a site; only its owner can read it.

    Raises
    ------
    EnvironmentFault
        There is no such folder, or it can't be written.
    """
    try:
        replace_file(path, render_records_page(found).encode())
    except OSError as exc:
        raise EnvironmentFault(f"{path}: {exc.strerror or type(exc).__name__}") from None


def render_records_page(found: Sequence[Examination]) -> str:
    """The page as text; everything that is not ours is escaped by Jinja."""
    sections = [
        {
            "found": one,
            "title": printable(one.dataset),
            "facts": facts_of(one),
            "labels": _table(label_rows(one)),
            "identifiers": _table(identifier_rows(one)),
            "charts": {name: InlineChart(chart) for name, chart in draw_records(one).items()},
        }
        for one in found
    ]
    return fill(
        "records.html", site=printable(found[0].site), sections=sections, can_draw=can_draw()
    )


def _table(told: _Rows) -> TextTable | None:
    head, rows = told
    return TextTable(head, tuple(rows)) if rows else None


def facts_of(found: Examination) -> list[tuple[str, str]]:
    """What there is, in sentences under headings."""
    split = "; ".join(
        f"{part} {plural(units, 'unit')}, {plural(records, 'record')}"
        for part, (units, records) in found.by_split.items()
    )
    number = found.declared_units
    declared = "" if number is None else f"; site.toml declares {number:,}"
    facts = [
        ("Rows", f"{found.rows:,}, of which a run uses {found.records:,}"),
        *(("Left out", part) for part in found.left_out),
        ("Units", f"{found.units:,} by {found.unit}{declared}"),
        ("Records of a unit", _per_unit(found)),
        ("Split", f"{split} (of the plan's shares, not the site's own split)"),
    ]
    if found.versions is not None:
        facts.append(
            ("Augmentation", f"{found.versions:,} versions of training texts, in their units")
        )
    return [*facts, *_lengths(found), *_resemblance(found)]


def _per_unit(found: Examination) -> str:
    if not found.units:
        return "none"
    most = max(found.per_unit)
    mean = found.records / found.units
    over = (
        f"; {plural(found.over_bound, 'unit')} over the {found.bound:,} that a step uses"
        if found.over_bound
        else f"; none over the {found.bound:,} that a step uses"
    )
    return f"{mean:.2f} on average, {most:,} at most{over}"


def _lengths(found: Examination) -> list[tuple[str, str]]:
    lengths = found.lengths
    if lengths is None:
        return []
    at = lengths.quantiles
    told = (
        f"{at['half']:,} {lengths.measure} in the middle, {at['nine tenths']:,} at nine tenths, "
        f"{at['longest']:,} at most"
    )
    if lengths.cut is not None:
        share = lengths.cut / found.records
        told += (
            f"; {plural(lengths.cut, 'record')} ({share:.1%}) cut at the plan's {lengths.limit:,}, "
            f"{lengths.lost:.1%} of all tokens"
        )
    elif found.plan:
        told += "; the plan's model is not on this machine, so words are counted and not tokens"
    return [("Lengths", told)]


def _resemblance(found: Examination) -> list[tuple[str, str]]:
    seen = found.resemblance
    within = (
        f"{plural(seen.copies, 'record')} repeat an earlier text word by word, "
        f"{seen.repeats - seen.copies:,} more nearly"
    )
    across = "; ".join(
        f"{part} {alike:,} of {plural(units, 'unit')}"
        for part, (alike, units) in seen.held_out.items()
        if units
    )
    facts = [("Duplicates", within)]
    if across:
        facts.append(("Across the split", f"with a text that resembles one of training: {across}"))
    if (gain := seen.flattery) is not None:
        facts.append(
            (
                "What that is worth",
                f"of {plural(gain.asked, 'held-out text')}, the nearest training text has the label of "
                f"{gain.nearest:.1%}, and {gain.nearest_without:.1%} without the text's own look-alikes "
                f"({_difference(gain.nearest - gain.nearest_without, gain.nearest_error)}); "
                f"naive Bayes finds {gain.words:.1%} and {gain.words_without:.1%} "
                f"({_difference(gain.words - gain.words_without, gain.words_error)})",
            )
        )
    return facts


def _difference(value: float, error: float) -> str:
    told = f"{100 * value:+.1f}".replace("-", "\N{MINUS SIGN}")
    return f"{told} ± {100 * error:.1f} points"


def label_rows(found: Examination) -> _Rows:
    """Labels with their records, units and parts of the split."""
    rows: list[tuple[str, ...]] = [
        (
            printable(one.label),
            f"{one.records:,}",
            f"{one.records / found.records:.1%}",
            f"{one.units:,}",
            *(f"{part:,}" for part in one.by_split),
        )
        for one in found.labels
    ]
    rows += [(printable(label), *["0"] * 6) for label in found.lacking]
    if found.other_labels[0]:
        share = found.other_labels[1] / found.records
        other = (f"{found.other_labels[1]:,}", f"{share:.1%}", *["\N{EN DASH}"] * 4)
        rows.append((f"{found.other_labels[0]:,} labels that are rare or long", *other))
    head = ("label", "records", "share", "units", "training", "validation", "test")
    return head, rows


def identifier_rows(found: Examination) -> _Rows:
    """What looks like an identifier: how many records and units, and what chance would have."""
    rows: list[tuple[str, ...]] = [
        (
            seen.title,
            f"{seen.records:,}",
            f"{seen.units:,}",
            f"{seen.passed:,} of {seen.seen:,}" if seen.checked else "\N{EN DASH}",
            "\N{EN DASH}" if seen.by_chance is None else f"{seen.by_chance:,.0f}",
            "yes" if seen.likely else "chance",
        )
        for seen in found.identifiers
        if seen.passed
    ]
    head = ("looks like", "records", "units", "check passed", "by chance", "likely")
    return head, rows


def draw_records(found: Examination) -> dict[str, Chart]:
    """Every picture that there is something to draw for, by name; none without matplotlib."""
    if not can_draw():
        return {}
    from silotune.report.charts import render

    drawn: dict[str, Chart] = {}
    if found.labels:
        told = ", ".join(f"{printable(one.label)} {one.records:,}" for one in found.labels)
        drawn["labels"] = render(
            "labels", partial(_draw_labels, found=found), description=f"Records by label: {told}"
        )
    if found.lengths is not None:
        median = found.lengths.quantiles["half"]
        drawn["lengths"] = render(
            "lengths",
            partial(_draw_lengths, found=found),
            description=f"Lengths of texts: half have at most {median:,} {found.lengths.measure}",
        )
    if len(found.per_unit) > 1:
        drawn["units"] = render(
            "units",
            partial(_draw_units, found=found),
            description=f"Records of a unit: {max(found.per_unit):,} at most",
        )
    if found.resemblance.flattery is not None:
        drawn["flattery"] = render(
            "flattery",
            partial(_draw_flattery, found=found),
            description="Accuracy of two simple models with and without look-alikes in training",
        )
    return drawn


def _draw_labels(canvas: Canvas, *, found: Examination) -> Figure:
    from silotune.report.charts import BLUE, GREEN, VERMILION, frame, key, site_names

    shown = found.labels[:_MOST_BARS]
    height = 0.75 + (0.5 if canvas.narrow else 0.3) * len(shown)
    figure, axes = frame(canvas, height=height)
    colours = (("training", BLUE), ("validation", VERMILION), ("test", GREEN))
    for place, one in enumerate(shown):
        start = 0
        for count, (_, colour) in zip(one.by_split, colours, strict=True):
            axes.barh(place, count, left=start, height=0.55, color=colour)
            start += count
        axes.annotate(
            f"{one.records:,}",
            (start, place),
            textcoords="offset points",
            xytext=(3, 0),
            va="center",
        )
    names = [(float(place), printable(one.label, most=40)) for place, one in enumerate(shown)]
    site_names(axes, names, canvas, head=0.28)
    axes.set_ylim(len(shown) - 0.5, -0.9 if canvas.narrow else -0.6)
    axes.set_xlim(0, 1.14 * max(one.records for one in shown))
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("records")
    key(axes, colours, canvas)
    return figure


def _draw_lengths(canvas: Canvas, *, found: Examination) -> Figure:
    from silotune.report.charts import BLUE, VERMILION, frame, note, title

    lengths = found.lengths
    assert lengths is not None
    edges, counts = lengths.histogram.edges, lengths.histogram.counts
    figure, axes = frame(canvas, height=2.6)
    widths = [high - low for low, high in pairwise(edges)]
    axes.bar(edges[:-1], counts, widths, align="edge", color=BLUE, linewidth=0, alpha=0.85)
    if lengths.limit is not None:
        inside = lengths.limit <= edges[-1]
        at = min(lengths.limit, edges[-1])
        axes.axvline(at, color=VERMILION, linewidth=1.4, linestyle=(0, (5, 3)))
        told = "cut here" if inside else f"cut at {lengths.limit:,}, further right"
        axes.set_ylim(0, 1.18 * max(counts))
        place = "right" if at > edges[-1] / 2 else "left"
        note(axes, at, 1.16 * max(counts), told, ha=place, rise=-2)
    axes.set_xlabel(f"{lengths.measure} of a record (the last bar has all that are longer)")
    axes.grid(visible=False, axis="x")
    title(axes, "records")
    return figure


def _draw_units(canvas: Canvas, *, found: Examination) -> Figure:
    from silotune.report.charts import BLUE, VERMILION, frame, title

    shown = dict(list(found.per_unit.items())[: 2 * _MOST_BARS])
    figure, axes = frame(canvas, height=2.4)
    places = list(range(len(shown)))
    colours = [VERMILION if size > found.bound else BLUE for size in shown]
    axes.bar(places, list(shown.values()), 0.8, color=colours, linewidth=0)
    axes.set_xticks(places, [f"{size:,}" for size in shown])
    axes.set_xlabel(f"records of a unit (a step uses {found.bound:,} at most)")
    axes.grid(visible=False, axis="x")
    title(axes, "units")
    return figure


def _draw_flattery(canvas: Canvas, *, found: Examination) -> Figure:
    from silotune.report.charts import BLUE, VERMILION, frame, key, site_names

    gain = found.resemblance.flattery
    assert gain is not None
    rows = (
        ("nearest text", gain.nearest, gain.nearest_without),
        ("naive Bayes", gain.words, gain.words_without),
    )
    figure, axes = frame(canvas, height=2.3 if canvas.narrow else 1.9)
    for place, (_, seen, without) in enumerate(rows):
        for offset, value, colour in ((-0.2, seen, VERMILION), (0.2, without, BLUE)):
            axes.barh(place + offset, value, height=0.34, color=colour)
            axes.annotate(
                f"{value:.1%}",
                (value, place + offset),
                textcoords="offset points",
                xytext=(3, 0),
                va="center",
            )
    names = [(float(place), name) for place, (name, _, _) in enumerate(rows)]
    site_names(axes, names, canvas, head=0.38)
    axes.set_ylim(1.6, -0.9 if canvas.narrow else -0.6)
    axes.set_xlim(0, 1.12)
    axes.xaxis.set_major_formatter(lambda value, _: percent(value))
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("held-out texts whose label is found")
    key(axes, (("with look-alikes", VERMILION), ("without them", BLUE)), canvas)
    return figure
