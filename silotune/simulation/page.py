"""The report's words and tables: a summary turned into strings that the template only places."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, TypeVar

from silotune.errors import PlanInvalid, SilotuneError, catalogue
from silotune.events.view import Evaluation, RoundView, Trouble
from silotune.plan import Plan
from silotune.plan_words import plan_in_words
from silotune.simulation.figures import Metric, Summary
from silotune.simulation.run_record import RunRecord
from silotune.simulation.wording import (
    DASH,
    epsilon,
    octets,
    plural,
    power,
    printable,
    score,
    signed,
)

_COLUMNS = {
    "macro_f1": "macro-F1",
    "accuracy": "accuracy",
    "loss": "loss",
    "perplexity": "perplexity",
}
_MOST_ROWS = 60

_Item = TypeVar("_Item")

State = Literal["", "worse", "own", "federated", "pooled", "probe"]


@dataclass(frozen=True)
class Table:
    """A table of text; the first column names the row, the others are numbers."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    marks: tuple[State, ...] = ()
    short: tuple[str, ...] = ()

    def mark(self, row: int) -> State:
        """How this row is marked (a CSS class)."""
        return self.marks[row] if row < len(self.marks) else ""

    def label(self, column: int) -> str:
        """The column's name where a row is shown as a card."""
        return (self.short or self.head)[column]


@dataclass(frozen=True)
class Tile:
    """One number at the head of the report."""

    label: str
    value: str
    note: str
    kind: State = ""


@dataclass(frozen=True)
class FaultRow:
    """One kind of trouble at one site, and what to do about it."""

    site: str
    code: str
    when: str
    title: str
    cause: str
    remedy: str
    detail: str


def tiles(found: Summary) -> list[Tile]:
    """The verdict's numbers."""
    shown = []
    kinds: tuple[tuple[str, str, State], ...] = (
        ("federated", "federated", "federated"),
        ("own", "own data only, mean", "own"),
        ("pooled", "pooled records", "pooled"),
        ("probe_federated", "head-only probe", "probe"),
    )
    federated = found.method("federated")
    for key, label, kind in kinds:
        row = found.method(key)
        if row is None or found.metric.key not in row.test:
            continue
        gain = found.metric.gain(federated.test, row.test) if federated else None
        note = found.metric.title if row is federated else f"federated: {signed(gain)}"
        shown.append(Tile(label, score(row.test[found.metric.key]), note, kind))
    facts = found.privacy
    if facts.budget is not None:
        worth = f"budget {facts.budget:g}, \N{GREEK SMALL LETTER DELTA} = {power(facts.delta)}"
        label = f"\N{GREEK SMALL LETTER EPSILON} per {facts.unit}"
        note = worth if facts.private else "not private"
        shown.append(Tile(label, epsilon(facts.epsilon), note, "" if facts.private else "worse"))
    return shown


def method_table(found: Summary) -> Table | None:
    """Every method that was run; gains are differences, positive is better."""
    if not found.methods:
        return None
    scores = _score_columns(found)
    rows = [
        (
            row.title,
            *(score(row.test.get(column)) for column in scores),
            signed(row.gain_over_own),
            signed(row.gain_over_probe),
            _guarantee(row.private and found.privacy.private, row.epsilon),
            DASH if row.examples_seen is None else f"{row.examples_seen:,.0f}",
            DASH if row.seconds is None else f"{row.seconds:,.1f}",
        )
        for row in found.methods
    ]
    head = (
        "method",
        *(_COLUMNS[column] for column in scores),
        "gain over own data",
        "gain over probe",
        "\N{GREEK SMALL LETTER EPSILON}",
        "examples seen",
        "seconds",
    )
    kinds: dict[str, State] = {"own": "own", "pooled": "pooled", "federated": "federated"}
    marks = [kinds.get(r.key, "probe" if r.key.startswith("probe") else "") for r in found.methods]
    brief = ("over own data", "over probe", head[-3], "examples", "seconds")
    short = (*head[: len(scores) + 1], *brief)
    return Table(head, tuple(rows), tuple(marks), short)


def site_table(found: Summary) -> Table | None:
    """Each site's own held-out data under the three models."""
    if not found.by_site:
        return None
    metric, title = found.metric, found.metric.title
    second = Metric("accuracy", "accuracy", higher_is_better=True)
    classes = metric.key == "macro_f1"
    rows = [
        (
            printable(row.site),
            DASH if row.n is None else f"{row.n:,}",
            *(score(s.get(metric.key)) for s in (row.own, row.federated, row.pooled)),
            signed(row.gain),
            *([signed(second.gain(row.federated, row.own))] if classes else []),
        )
        for row in found.by_site
    ]
    head: tuple[str, ...] = ("site", "held out", "own model", "federated", "pooled")
    short = (*head, "gain (F1)", "gain (acc.)") if classes else ()
    head = (*head, f"gain, {title}", *(["gain, accuracy"] if classes else []))
    marks: list[State] = ["worse" if row.site in found.sites_worse else "" for row in found.by_site]
    return Table(head, tuple(rows), tuple(marks), short)


def worse_sites(found: Summary) -> list[str]:
    """One line for each site that is worse off with the federated model."""
    key = found.metric.key
    return [
        f"{printable(row.site)}: {score(row.federated[key])} federated against "
        f"{score(row.own[key])} with its own model ({signed(row.gain)})"
        for row in found.by_site
        if row.site in found.sites_worse
    ]


def chance(found: Summary) -> str:
    """How large a difference may be luck: two binomial standard errors of an accuracy."""
    smallest_site = min((row.n for row in found.by_site if row.n), default=None)
    all_of_them, smallest = found.margin(), found.margin(smallest_site)
    if smallest_site is None or all_of_them is None:
        return "This is one run; small differences may be chance."
    return (
        "This is one run, and small differences may be chance: two standard errors of an accuracy "
        f"are {all_of_them:.3f} on all held-out data and {smallest:.3f} on the smallest site's "
        f"{smallest_site:,} texts, and more where held-out texts resemble each other."
    )


def privacy_table(record: RunRecord) -> Table | None:
    """The mechanism at each site."""
    sites = (record.privacy or {}).get("sites") or {}
    rows = [
        (
            printable(str(site)),
            epsilon(facts.get("epsilon")),
            _figure(facts.get("sigma")),
            _figure(facts.get("rate")),
            f"{facts['steps']:,}" if facts.get("steps") is not None else DASH,
        )
        for site, facts in sites.items()
    ]
    head = (
        "site",
        "\N{GREEK SMALL LETTER EPSILON}",
        "noise \N{GREEK SMALL LETTER SIGMA}",
        "sampling rate q",
        "steps",
    )
    return Table(head, tuple(rows)) if rows else None


def epsilon_table(found: Summary) -> Table | None:
    """Epsilon of each site after each round (evenly thinned to a readable number of rounds)."""
    curves = {site: dict(curve) for site, curve in found.epsilon_curves.items()}
    numbers = sorted({number for curve in curves.values() for number in curve})
    if not numbers:
        return None
    rows = [
        (f"{number}", *(epsilon(curve.get(number)) for curve in curves.values()))
        for number in thinned(numbers)
    ]
    return Table(("round", *map(printable, curves)), tuple(rows))


def round_table(rounds: Sequence[RoundView]) -> Table:
    """Each round in figures (evenly thinned)."""
    rows = [
        (
            f"{found.number}",
            found.trains,
            f"{len(found.replied)} of {len(found.cohort)}",
            f"{len(found.failed)}",
            f"{found.seconds or 0:.2f}",
            octets(found.bytes_down),
            octets(found.bytes_up),
        )
        for found in thinned(rounds)
    ]
    head = ("round", "trains", "replied", "failed", "seconds", "to the sites", "from the sites")
    return Table(head, tuple(rows))


def thinned(items: Sequence[_Item]) -> list[_Item]:
    """At most 60 of the items, evenly spaced, first and last among them."""
    if len(items) <= _MOST_ROWS:
        return list(items)
    last = len(items) - 1
    return [items[round(place * last / (_MOST_ROWS - 1))] for place in range(_MOST_ROWS)]


def fault_rows(faults: Sequence[Trouble]) -> list[FaultRow]:
    """Faults of one site and code together, explained by the catalogue of errors."""
    known: Mapping[str, type[SilotuneError]] = {error.code: error for error in catalogue()}
    grouped: dict[tuple[str, str], list[Trouble]] = {}
    for fault in faults:
        grouped.setdefault((fault.site, fault.code), []).append(fault)
    rows = []
    for (site, code), group in grouped.items():
        error = known.get(code)
        unknown = "This version of silotune has no such code; the site may run another."
        rows.append(
            FaultRow(
                site=printable(site),
                code=printable(code) or "no code",
                when=_when(group),
                title=error.title if error else "An error without a known code",
                cause=error.cause if error else unknown,
                remedy=error.advice if error else "Ask the site's team for its log.",
                detail=printable(next((f.detail for f in group if f.detail), ""), most=300),
            )
        )
    return rows


def view(record: RunRecord, name: str) -> list[Evaluation]:
    """Evaluations of one view, of the split that was looked at most often."""
    seen = [found for found in record.history.evaluations if found.view == name]
    splits = [found.split for found in seen]
    return [found for found in seen if found.split == max(splits, key=splits.count)]


def plan_rows(record: RunRecord) -> list[tuple[str, str]]:
    """The plan in words; nothing if it is of a version that can't be read any more."""
    try:
        return plan_in_words(Plan.from_canonical(json.dumps(record.plan)))
    except PlanInvalid:
        return []


def facts(record: RunRecord) -> list[tuple[str, str]]:
    """What is needed to repeat the run."""
    resolved = record.resolved
    versions = resolved.get("versions") or {}
    trainable = resolved.get("trainable_parameters")
    seed = resolved.get("seed")
    named = [
        ("Plan's SHA-256", resolved.get("plan_sha256")),
        ("Selection", resolved.get("selection")),
        ("Held-out split", resolved.get("split")),
        ("Model", resolved.get("model")),
        ("Trainable parameters", f"{trainable:,}" if trainable is not None else None),
        ("Engine", _engine(resolved)),
        ("Seed", "none: noise and sampling are secret" if seed is None else f"{seed}"),
        ("Machine", _flat(resolved.get("machine"))),
        ("Versions", ", ".join(f"{name} {number}" for name, number in versions.items())),
        ("Started", _clock(record.history.started)),
    ]
    return [(name, str(value)) for name, value in named if value]


def _score_columns(found: Summary) -> tuple[str, ...]:
    return ("macro_f1", "accuracy") if found.metric.key == "macro_f1" else ("loss", "perplexity")


def _guarantee(private: bool, value: float | None) -> str:
    if value is None:
        return "none"
    return epsilon(value) if private else f"{epsilon(value)} (not private)"


def _figure(value: float | None) -> str:
    return DASH if value is None else f"{value:.4g}"


def _when(group: Sequence[Trouble]) -> str:
    numbers = [fault.round for fault in group if fault.round is not None]
    if not numbers:
        return "refused to join"
    shown = ", ".join(map(str, numbers[:12])) + (", \N{HORIZONTAL ELLIPSIS}" * (len(numbers) > 12))
    return f"failed in {plural(len(numbers), 'round')}: {shown}"


def _engine(resolved: Mapping[str, Any]) -> str:
    workers = resolved.get("workers")
    engine = str(resolved.get("engine") or "")
    return f"{engine}, {plural(int(workers), 'worker')}" if workers else engine


def _flat(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {item}" for name, item in value.items())
    return str(value or "")


def _clock(seconds: float | None) -> str:
    return "" if seconds is None else f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"
