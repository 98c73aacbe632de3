"""`silotune plan new`: a commented plan from a few facts, asked for or given."""

from __future__ import annotations

import json
import math
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

import click
import typer

from silotune.commands.folder import AsJson, checked_name
from silotune.errors import ModelNotFound, PlanInTheWay, PlanInvalid
from silotune.plan.draft import PlanFacts, draft
from silotune.plan.left_out import Number
from silotune.plan.tasks import TASKS
from silotune.plan.tasks import facts_of as facts_of_task
from silotune.plan.written import toml_text
from silotune.terminal import terminal

T = TypeVar("T")
ENCODER = "sentence-transformers/all-MiniLM-L6-v2"


def new(  # noqa: PLR0917 - one a command-line option
    path: Annotated[Path, typer.Argument(help="The file to write.")] = Path("plan.toml"),
    base: Annotated[
        str, typer.Option(help=f"Base model: hub id or folder. Default: {ENCODER} to classify.")
    ] = "",
    task: Annotated[str, typer.Option(help=f"{' or '.join(TASKS)}.")] = "",
    labels: Annotated[str, typer.Option(help="The classes, e.g. acute,chronic.")] = "",
    multi_label: Annotated[
        bool, typer.Option("--multi-label", help="A record has any number of the labels.")
    ] = False,
    value_range: Annotated[
        str, typer.Option("--range", help="Of text_regression: least and greatest number, as 0,30.")
    ] = "",
    dataset: Annotated[str, typer.Option(help="Its name in the sites' site.toml.")] = "",
    units: Annotated[
        str, typer.Option(help="Units at each site: one number, or one a site: 1000,2500.")
    ] = "",
    sites: Annotated[
        int,
        typer.Option(
            min=0, help="How many, if --units is one number. Default: 3.", show_default=False
        ),
    ] = 0,
    unit: Annotated[
        str, typer.Option(help="Whose data is protected: record, patient, customer.")
    ] = "",
    epsilon: Annotated[
        float | None, typer.Option(min=0.0, help="Of the whole run; 0 for no privacy. Default: 8.")
    ] = None,
    delta: Annotated[
        float | None, typer.Option(help="Default: a tenth of 1/units of the largest site.")
    ] = None,
    link: Annotated[
        float,
        typer.Option(
            min=0.0, help="What a site can send, in Mbit/s. Default: 100.", show_default=False
        ),
    ] = 0.0,
    name: Annotated[str, typer.Option(help="Of the plan. Default: the dataset's.")] = "",
    purpose: Annotated[str, typer.Option(help="For whoever approves it at a site.")] = "",
    split_by: Annotated[
        str, typer.Option(help="'group' if texts differ by a word: see docs/plans.md.")
    ] = "unit",
    from_statistics: Annotated[
        Path | None,
        typer.Option(help="A statistics.json of the sites: labels, units and lengths from there."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Ask nothing: defaults for the rest.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the file.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a commented plan whose numbers follow from a few facts by measured rules.

    What is not given is asked for, on a terminal. With --yes, or where nobody could answer, defaults
    are taken, and what has none must be given. Every number in the file has its reason beside it.
    """
    if path.exists() and not force:
        raise PlanInTheWay(f"{path} is there already")
    given = {
        "base": base, "task": task, "labels": labels, "dataset": dataset, "units": units,
        "sites": sites, "unit": unit, "epsilon": epsilon, "delta": delta, "link": link,
        "name": name, "purpose": purpose, "split_by": split_by,
        "multi_label": multi_label or None, "range": value_range,
    }  # fmt: skip
    known = _counted(from_statistics) if from_statistics else {}
    answers = {
        **known,
        **{key: value for key, value in given.items() if value not in ("", None, 0)},
    }
    if epsilon == 0.0:
        answers["epsilon"] = 0.0
    asks = not yes and sys.stdin.isatty() and not as_json
    facts = facts_of(answers, ask=_ask if asks else None)
    plan, numbers = draft(facts)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(rendered(numbers), encoding="utf-8")
    if as_json:
        told = [{"key": n.key, "value": n.value, "why": n.why} for n in numbers]
        typer.echo(json.dumps({"path": str(path), "sha256": plan.sha256, "settings": told}))
        return
    sizes = ",".join(map(str, facts.units))
    console = terminal()
    console.print(f"{path}: {len(numbers)} settings, each with its reason. Next:", soft_wrap=True)
    console.print(f"  silotune plan check {path} --sizes {sizes}", soft_wrap=True)
    console.print(f"  silotune simulate {path}", soft_wrap=True)


Ask = Callable[[str, str], str]


def _ask(question: str, default: str) -> str:
    """One answer on the terminal."""
    return str(typer.prompt(question, default=default or None))


class Questions:
    """Answers by name: given, asked for, or by default; what has none is missing."""

    def __init__(self, answers: Mapping[str, Any], ask: Ask | None) -> None:
        self._answers, self._ask = answers, ask
        self.missing: list[str] = []

    def text(self, name: str, question: str, default: str = "") -> str:
        """An answer as text; empty if there is none."""
        if name in self._answers:
            return str(self._answers[name])
        if self._ask is not None:
            return self._ask(question, default).strip()
        if not default:
            self.missing.append(f"--{name.replace('_', '-')}")
        return default

    def name(self, name: str, question: str, default: str = "") -> str:
        """An answer that is a name in a plan; one that was given is left to the plan's own rules."""
        while True:
            answer = self.text(name, question, default)
            if self._ask is None or name in self._answers:
                return answer
            try:
                return checked_name(answer)
            except click.BadParameter as exc:
                terminal().print(f"{exc.message}.")

    def read(self, name: str, question: str, default: str, of: Callable[[str], T | None]) -> T:
        """An answer as `of` reads it; asked again while it can't, refused if it was given."""
        while True:
            answer = self.text(name, question, default)
            if (found := of(answer)) is not None:
                return found
            if self._ask is None or name in self._answers:
                raise click.BadParameter(f"{answer!r} won't do", param_hint=f"--{name}")
            terminal().print(f"{answer!r} won't do.")


def facts_of(answers: Mapping[str, Any], *, ask: Ask | None) -> PlanFacts:
    """What a plan is drafted from.

    Parameters
    ----------
    answers : mapping
        What is known already, by option; texts as a person would type them.
    ask : callable, optional
        Given a question and its default; without it nothing is asked.

    Raises
    ------
    PlanInvalid
        Something has no default and nobody could be asked.
    """
    asked = Questions(answers, ask)
    usual = next(iter(TASKS))
    task = asked.read("task", f"Task ({' or '.join(TASKS)})", usual, _one_of(*TASKS))
    kind = TASKS[task]
    base = asked.text(
        "base", "Base model (hub id or folder)", ENCODER if kind.base == "encoder" else ""
    )
    labels = asked.text("labels", "Labels, separated by commas") if kind.has_labels else ""
    several, target = bool(answers.get("multi_label")), None
    if kind.target == "value":
        target = asked.read("range", "Least and greatest number, as 0,30", "", _range)
    dataset = asked.name("dataset", "Dataset (its name in the sites' site.toml)")
    unit = asked.name("unit", "Whose data is protected as one (record, patient, ...)", "record")
    units = _units(asked, unit)
    epsilon = asked.read("epsilon", "Epsilon of the whole run (0: no privacy)", "8", _positive)
    link = asked.read("link", "What a site can send, in Mbit/s", "100", _positive)
    split_by = asked.read("split_by", "Held out by unit or group", "unit", _one_of("unit", "group"))
    if asked.missing:
        raise PlanInvalid(
            f"nobody was asked, and these have no default: {', '.join(asked.missing)}",
            remedy="Give them, or run it on a terminal without --yes.",
        )
    optional = {
        key: answers[key] for key in ("delta", "records_a_unit", "max_length") if key in answers
    }
    listed = tuple(part.strip() for part in labels.split(",") if part.strip())
    return PlanFacts(
        name=answers.get("name") or re.sub(r"[^a-z0-9_-]+", "-", dataset.lower()),
        purpose=answers.get("purpose") or _purpose(task, listed, several, target),
        base=base,
        sha256=_sha256(base),
        task=task,
        labels=listed,
        multi_label=several,
        target=target or None,
        dataset=dataset,
        units=units,
        unit=unit,
        epsilon=epsilon or None,
        link=link or 100.0,
        split_by=cast(Any, split_by),
        **optional,
    )


def _purpose(
    task: str, labels: Sequence[str], several: bool, target: tuple[float, float] | None
) -> str:
    facts = facts_of_task(task, several=several)
    assert facts is not None  # one of `TASKS`
    numbers = "from {:g} to {:g}".format(*target) if target else ""
    learned = facts.learns.format(labels=", ".join(labels), text="text", target=numbers)
    return f"{learned[:1].upper()}{learned[1:]}."


def _units(asked: Questions, unit: str) -> tuple[int, ...]:
    question = f"Units ({unit}s) a site: one number, or one a site: 1000,2500"
    found = asked.read("units", question, "", _whole_numbers)
    if len(found) == 1:
        found *= max(1, int(asked.read("sites", "Number of sites", "3", _positive)))
    return found


def _positive(text: str) -> float | None:
    with suppress(ValueError):
        found = float(text)
        return found if math.isfinite(found) and found >= 0 else None
    return None


def _whole_numbers(text: str) -> tuple[int, ...] | None:
    """Whole numbers above zero; none of no text."""
    with suppress(ValueError):
        found = tuple(int(part) for part in text.split(",") if text)
        return found if all(number > 0 for number in found) else None
    return None


def _range(text: str) -> tuple[float, float] | None:
    """Two numbers, the first below the second; the empty range of no text."""
    if not text:
        return (0.0, 0.0)
    with suppress(ValueError):
        lower, upper = (float(part) for part in text.split(","))
        return (lower, upper) if -math.inf < lower < upper < math.inf else None
    return None


def _one_of(*choices: str) -> Callable[[str], str | None]:
    return lambda text: text if text in choices else None


def _sha256(base: str) -> str | None:
    """Of the weights, where they are on this machine."""
    with terminal(stderr=True).status("Reading the base model's files"):
        from silotune.models.pretrained import locate, weights_sha256

        try:
            return weights_sha256(locate(base)) if base else None
        except ModelNotFound:
            return None


def _counted(path: Path) -> dict[str, Any]:
    """What statistics of the sites say, as answers."""
    from silotune.report.statistics import read

    found = read(path)
    sites = found["sites"].values()
    answers: dict[str, Any] = {
        "dataset": found["dataset"],
        "unit": found["unit"],
        "units": ",".join(str(site["declared_units"]) for site in sites),
    }
    if found.get("labels"):
        answers["labels"] = ",".join(row["label"] for row in found["labels"])
    if (most := _bounded(found.get("records_a_unit"))) is not None:
        answers["records_a_unit"] = most
    if (length := _length(found.get("lengths"))) is not None:
        answers["max_length"] = length
    return answers


def _bounded(counted: Mapping[str, Any] | None) -> int | None:
    """So many records that nine units in ten have no more."""
    if not counted:
        return None
    shares, bins = 0.0, counted["bins"]
    for each in bins:
        shares += _value(each["share"])
        if shares >= 0.9 and each["to"] is not None:
            return int(each["to"])
    return int(bins[-1]["from"])


_TOKENS_A_WORD = 1.6


def _value(estimate: Mapping[str, float] | float | None) -> float:
    """Of an estimate, with its interval or without; 0 for one below the floor."""
    if isinstance(estimate, Mapping):
        return float(estimate["value"])
    return float(estimate or 0.0)


def _length(counted: Mapping[str, Any] | None) -> int | None:
    """Tokens that nineteen texts in twenty fit in, in eights."""
    if not counted:
        return None
    longest = [row for row in counted["quantiles"] if row.get("value") is not None]
    if not longest:
        return None
    value = float(max(longest, key=lambda row: row["q"])["value"])
    value *= _TOKENS_A_WORD if counted["counted"] == "words" else 1.0
    return max(16, 8 * math.ceil((value + 2) / 8))


# --- the file ---

TITLES = {
    "plan": "What is to be learned",
    "model": "The model",
    "lora": "The adapter",
    "data": "The records",
    "rounds": "How long and with whom",
    "optimizer.site": "How fast",
    "optimizer.server": "What the coordinator does with the sum",
    "privacy": "What is protected",
    "aggregation": "Who sees what",
}
_SETTING, _LINE = 34, 100  # columns of a setting with its reason beside it, and of a line


def rendered(numbers: Sequence[Number], *, written_by: str = "plan new") -> str:
    """A plan's file, every setting with its reason if there is one."""
    order = list(TITLES)
    sections = sorted(numbers, key=lambda number: order.index(_section(number)))
    lines = [
        f"# Written by `silotune {written_by}`. docs/plans.md says how to go on from here, and",
        "# examples/plan.toml has every key.",
    ]
    for section, own in groupby(sections, key=_section):
        lines += ["", f"# {TITLES[section]}", f"[{section}]"]
        for number in own:
            lines += _lines(number)
    return "\n".join(lines) + "\n"


def _section(number: Number) -> str:
    return number.key.rpartition(".")[0]


def _lines(number: Number) -> Iterator[str]:
    """A setting with its reason, beside it or above."""
    setting = f"{number.key.rpartition('.')[2]} = {toml_text(number.value)}"
    beside = f"{setting:<{_SETTING}} # {number.why}"
    if number.why and len(setting) <= _SETTING and len(beside) <= _LINE:
        yield beside
        return
    if number.why:
        reason = f"{number.why[:1].upper()}{number.why[1:]}."
        yield from textwrap.wrap(reason, _LINE, initial_indent="# ", subsequent_indent="# ")
    if len(setting) <= _LINE or not isinstance(number.value, list):
        yield setting
        return
    yield setting.partition("[")[0] + "["
    row = "   "
    for item in map(toml_text, number.value):
        if len(row) + len(item) + 2 > _LINE:
            yield row
            row = "   "
        row += f" {item},"
    yield row
    yield "]"
