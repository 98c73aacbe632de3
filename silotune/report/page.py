"""The report's words and tables: a summary turned into strings that the template only places."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, TypeVar

from silotune.events.view import Evaluation, RoundView, Trouble, TroubleLine, by_error
from silotune.plan.plan import stored_bands
from silotune.report.figures import TRIVIAL, MethodRow, Summary
from silotune.report.verdict import DASH, epsilon, plural, power, printable, score, signed
from silotune.rounds.run_directory import RunRecord
from silotune.terminal import octets

_COLUMNS = {"accuracy": "accuracy (micro-F1)"}
_MOST_ROWS = 60
_MOST_LABELS = 30

_Item = TypeVar("_Item")

State = Literal["", "worse", "own", "federated", "pooled", "probe"]


@dataclass(frozen=True)
class TextTable:
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


def tiles(found: Summary) -> list[Tile]:
    """The verdict's numbers."""
    shown = []
    kinds: tuple[tuple[str, str, State], ...] = (
        ("federated", "federated", "federated"),
        ("majority", "most frequent label", ""),
        ("base", "base model as it came", ""),
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
        worth = f"of {facts.budget:g}, \N{GREEK SMALL LETTER DELTA} = {power(facts.delta)}"
        label = f"\N{GREEK SMALL LETTER EPSILON} per {facts.unit}"
        note = "not private" if facts.guarantee == "seeded" else worth
        spent = epsilon(facts.budget if facts.guarantee == "coordinator" else facts.epsilon)
        shown.append(Tile(label, spent, note, "worse" if facts.guarantee == "seeded" else ""))
    return shown


def method_table(found: Summary) -> TextTable | None:
    """Every method that was run; gains are differences, positive is better."""
    if not found.methods:
        return None
    metrics = found.metrics
    spread = any(row.spread for row in found.methods)
    rows = [
        (
            row.title,
            *(score(row.test.get(metric.key)) for metric in metrics),
            *([_spread(row)] if spread else []),
            signed(row.gain_over_own),
            signed(row.gain_over_probe),
            DASH if row.key in TRIVIAL else _guarantee(found, row.epsilon),
            DASH if row.examples_seen is None else f"{row.examples_seen:,.0f}",
            DASH if row.seconds is None else f"{row.seconds:,.1f}",
        )
        for row in found.methods
    ]
    head = (
        "method",
        *(_COLUMNS.get(metric.key, metric.title) for metric in metrics),
        *([f"{found.metric.title} over runs"] if spread else []),
        "gain over own data",
        "gain over probe",
        "\N{GREEK SMALL LETTER EPSILON}",
        "examples seen",
        "seconds",
    )
    kinds: dict[str, State] = {"own": "own", "pooled": "pooled", "federated": "federated"}
    marks = [kinds.get(r.key, "probe" if r.key.startswith("probe") else "") for r in found.methods]
    brief = ("over own data", "over probe", head[-3], "examples", "seconds")
    short = (*head[: len(metrics) + 1 + spread], *brief)
    return TextTable(head, tuple(rows), tuple(marks), short)


def site_table(found: Summary) -> TextTable | None:
    """What each site gains on everybody's cases, beside what it gains or gives up on its own."""
    if not found.by_site:
        return None
    title, beside = found.metric.title, found.beside
    marks: list[State] = ["worse" if row.site in found.sites_worse else "" for row in found.by_site]
    columns = [
        (found.needs_no_training[0], "trivial"),
        ("own model", "own"),
        ("federated", "federated"),
        ("own head", "personal"),
        ("pooled", "pooled"),
    ]
    shown = [(n, part) for n, part in columns if any(getattr(r, part) for r in found.by_site)]
    rows = [
        (
            printable(row.site),
            DASH if row.n is None else f"{row.n:,}",
            *(score(row.score(part, found.metric)) for _, part in shown),
            signed(row.gain),
            *([signed(row.gain_accuracy)] if beside else []),
            *([signed(row.gain_everywhere)] if _own_everywhere(found) else []),
        )
        for row in found.by_site
    ]
    names = [name for name, _ in shown]
    head = ["site", "held out", *names, f"gain at home, {title}"]
    short = ["site", "held out", *names, "gain at home"]
    if beside:
        head.append(f"gain at home, {beside.title}")
        short.append(f"at home, {beside.title}")
    if _own_everywhere(found):
        head.append(f"gain on everybody's, {title}")
        short.append("gain, everybody's")
    return TextTable(tuple(head), tuple(rows), tuple(marks), tuple(short))


def _own_everywhere(found: Summary) -> bool:
    return any(row.gain_everywhere is not None for row in found.by_site)


def recall_table(found: Summary) -> TextTable | None:
    """Share of each label's records that each model finds (the rarest-found labels first)."""
    kinds = [row for row in found.methods if row.recall]
    federated = found.method("federated")
    if federated is None or not federated.recall:
        return None
    labels = sorted(federated.recall, key=lambda label: federated.recall[label])[:_MOST_LABELS]
    rows = [
        (printable(label), *(score(row.recall.get(label)) for row in kinds)) for label in labels
    ]
    return TextTable(("label", *(row.title for row in kinds)), tuple(rows))


def exposure_table(found: Summary) -> TextTable | None:
    """Against whom which epsilon holds, where that differs."""
    rows = [(to, epsilon(value)) for to, value in found.privacy.exposures]
    head = ("against", "\N{GREEK SMALL LETTER EPSILON}")
    return TextTable(head, tuple(rows)) if rows else None


def released_words(found: Summary) -> str:
    """What the figures that sites let out are, as the run's privacy has it."""
    return {
        "secret": "Released by the sites under differential privacy",
        "seeded": "Released by the sites with seeded noise, which hides nothing",
        "coordinator": "Sent by the sites as they are, for the coordinator only",
        "none": "Sent by the sites as they are, without privacy",
    }[found.privacy.guarantee]


def two_sites_words(found: Summary) -> str:
    """What a person with records at two sites is left with."""
    both = found.privacy.two_sites
    if both is None:
        return "If one person is at two sites, the two ε add up for that person."
    shown = f"ε = {epsilon(both['epsilon'])} at δ = {power(both['delta'])}"
    return f"A person with records at two sites is protected by {shown}."


def chance(found: Summary) -> str:
    """How large a difference may be luck: two binomial standard errors of an accuracy."""
    smallest_site = min((row.n for row in found.by_site if row.n), default=None)
    all_of_them, smallest = found.margin(), found.margin(smallest_site)
    several = max((row.spread.runs for row in found.methods if row.spread), default=1)
    runs = (
        "This is one run"
        if several == 1
        else f"Scores and gains are of this one of {several} runs, whose spread stands beside them"
    )
    if smallest_site is None or all_of_them is None:
        return f"{runs}; small differences may be chance."
    return (
        f"{runs}, and small differences may be chance: two standard errors of an accuracy "
        f"are {all_of_them:.3f} on all held-out data and {smallest:.3f} on the smallest site's "
        f"{smallest_site:,} texts, and more where held-out texts resemble each other."
    )


def privacy_table(record: RunRecord) -> TextTable | None:
    """The mechanism at each site."""
    sites = (record.privacy or {}).get("sites") or {}
    bands = stored_bands(record.plan)
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
        "steps" if bands == 1 else f"blocks of {bands} rounds",
    )
    return TextTable(head, tuple(rows)) if rows else None


def epsilon_table(found: Summary) -> TextTable | None:
    """Epsilon of each site after each round (evenly thinned to a readable number of rounds)."""
    curves = {site: dict(curve) for site, curve in found.epsilon_curves.items()}
    numbers = sorted({number for curve in curves.values() for number in curve})
    if not numbers:
        return None
    rows = [
        (f"{number}", *(epsilon(curve.get(number)) for curve in curves.values()))
        for number in thinned(numbers)
    ]
    return TextTable(("round", *map(printable, curves)), tuple(rows))


def round_table(rounds: Sequence[RoundView]) -> TextTable:
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
    return TextTable(head, tuple(rows))


def thinned(items: Sequence[_Item]) -> list[_Item]:
    """At most 60 of the items, evenly spaced, first and last among them."""
    if len(items) <= _MOST_ROWS:
        return list(items)
    last = len(items) - 1
    return [items[round(place * last / (_MOST_ROWS - 1))] for place in range(_MOST_ROWS)]


def fault_rows(faults: Sequence[Trouble]) -> list[TroubleLine]:
    """Faults of one site and code together, explained by the catalogue of errors."""
    return [
        TroubleLine(
            site=printable(fault.site),
            code=printable(fault.code) or "no code",
            when=_when(fault.rounds),
            title=fault.title,
            cause=fault.cause
            or "This version of silotune has no such code; the site may run another.",
            remedy=fault.remedy,
            detail=printable(next(iter(fault.details), ""), most=300),
        )
        for fault in by_error(faults)
    ]


def view(record: RunRecord, name: str) -> list[Evaluation]:
    """Evaluations of one view, of the split that was looked at most often."""
    seen = [found for found in record.history.evaluations if found.view == name]
    splits = [found.split for found in seen]
    return [found for found in seen if found.split == max(splits, key=splits.count)]


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


def _spread(row: MethodRow) -> str:
    """Mean and standard deviation over runs, and how many."""
    found = row.spread
    return DASH if found is None else f"{found.mean:.3f} ± {found.deviation:.3f} ({found.runs})"


def _guarantee(found: Summary, value: float | None) -> str:
    if value is None:
        return "none"
    caveat = {"seeded": " (not private)", "coordinator": " (not from the coordinator)"}
    return f"{epsilon(value)}{caveat.get(found.privacy.guarantee, '')}"


def _figure(value: float | None) -> str:
    return DASH if value is None else f"{value:.4g}"


def _when(numbers: Sequence[int]) -> str:
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
