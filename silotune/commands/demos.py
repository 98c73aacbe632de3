"""`silotune demo`: folders of demonstration data, with sites and a plan, each ready to be simulated."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.table import Table
from rich.text import Text

from silotune.errors import DataError
from silotune.terminal import terminal

demo = typer.Typer(no_args_is_help=True, help="Write demo data, site folders and a plan.")

Force = Annotated[bool, typer.Option("--force", help="Replace the folder if it is there.")]


@demo.callback()
def choose() -> None:
    """Write demo data, site folders and a plan."""


@demo.command("hospitals")
def hospitals(
    folder: Annotated[Path, typer.Argument(help="Folder to make.")] = Path("hospitals"),
    split: Annotated[
        str,
        typer.Option(
            help="Held-out data: 'code' at random, or 'category' for conditions never trained on."
        ),
    ] = "code",
    patients: Annotated[
        bool,
        typer.Option("--patients", help="Group records into made-up patients and protect those."),
    ] = False,
    force: Force = False,
) -> None:
    """Seven specialty hospitals, made of the descriptions of ICD-10-CM diagnosis codes.

    The task is to tell chronic conditions from acute ones. Chapters of the classification stand in
    for hospitals; there is no patient text in it.
    """
    from silotune.data.demo import write_hospitals

    if split not in {"code", "category"}:
        raise typer.BadParameter("use 'code' or 'category'", param_hint="--split")
    make_way(folder, force=force)
    write_hospitals(folder, split=split, patients=patients)  # type: ignore[arg-type]
    tell_next(
        f"Seven hospitals and two plans are in {folder}.",
        [
            f"silotune simulate {folder}/statistics.toml    # what they have, under privacy",
            f"silotune plan check {folder}/plan.toml",
            f"silotune simulate {folder}/plan.toml --baselines",
        ],
    )


@demo.command("notes")
def notes(
    folder: Annotated[Path, typer.Argument(help="Folder to make.")] = Path("notes"),
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer notes and rounds: done sooner, finds less.")
    ] = False,
    write_only: Annotated[
        bool, typer.Option("--write-only", help="Write notes and plan, and train nothing.")
    ] = False,
    force: Force = False,
) -> None:
    """Five hospitals learn to find what identifies people in notes, and take it out of one.

    Every note is made up, with the package Faker: there is no patient's text in it, and what a model
    reaches on it says nothing of real notes. Each hospital writes in its own style. The plan trains at
    epsilon 8 for each patient, under secure aggregation; beside it stand each hospital alone and pooled
    notes. It takes some minutes.
    """
    from silotune.data.notes import example_note, write_notes

    make_way(folder, force=force)
    written = write_notes(folder, quick=quick)
    told = (
        f"Wrote {sum(written.records):,} notes of {len(written.sites)} hospitals to {folder}. Faker "
        "made them up: no patient is in them."
    )
    commands = [
        f"silotune data check {written.sites[0]}/site.toml --plan {written.plan}",
        f"silotune plan check {written.plan}",
    ]
    if write_only:
        tell_next(told, [*commands, f"silotune simulate {written.plan} --baselines"])
        return
    terminal().print(told)
    from silotune.api.simulating import simulate

    run = simulate(written.plan, runs=folder / "runs", baselines=True).folder
    _tell_entities(run)
    _tell_redacted(run, example_note())
    tell_next(f"The report is {run / 'report.html'}.", [
        f"silotune predict {run} --redact < note.txt",
        f"silotune predict {run} --redact --data notes.csv --column note --threshold 0.2",
    ])  # fmt: skip


def _tell_entities(run: Path) -> None:
    """What was found of the held-out notes of all hospitals, by whom."""
    from silotune.rounds.run_directory import RunDirectory

    rows = {
        "own": "own notes only (mean of the hospitals)",
        "federated": "federated",
        "pooled": "pooled notes",
    }
    found = {
        row["key"]: row["test"] for row in RunDirectory(run).read_json("results.json")["methods"]
    }
    table = Table(
        "trained on, all at the same epsilon", "entity F1", "recall", "precision", box=None
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for key, title in rows.items():
        scores = (found[key][f"entity_{name}"] for name in ("f1", "recall", "precision"))
        table.add_row(title, *(f"{score:.3f}" for score in scores))
    terminal().print(table)


def _tell_redacted(run: Path, note: str) -> None:
    """A new note before and after."""
    from silotune.inference.redaction import in_words, moved, redacted
    from silotune.rounds.trained import load_trained

    model = load_trained(run)
    (answer,) = model.task.predict(model, [{"text": note}])
    spans = [moved(span, 0) for span in cast(Sequence[Mapping[str, Any]], answer.output)]
    counts = Counter(span.label for span in spans)
    console = terminal()
    for heading, text in (("A new note", note), ("Redacted", redacted(note, spans))):
        console.print(f"\n{heading}:", style="bold")
        console.print(Text(text.rstrip()))
    console.print(f"\nFound {in_words(counts, model.plan.model.labels)}.")


@demo.command("bank")
def bank(
    folder: Annotated[Path, typer.Argument(help="Folder to make.")] = Path("bank"),
    quick: Annotated[
        bool, typer.Option("--quick", help="Few loans and rounds: a run of less than a minute.")
    ] = False,
    force: Force = False,
) -> None:
    """Four banks and their loans, told in words, to tell which will go bad.

    A public table of credit scoring. What an applicant works as stands in for the bank.
    """
    from silotune.data.demo_bank import write_banks

    make_way(folder, force=force)
    plan = write_banks(folder, quick=quick)
    tell_next(
        f"Four banks and a plan are in {folder}.",
        [f"silotune plan check {plan}", f"silotune simulate {plan} --baselines"],
    )


@demo.command("images")
def images(
    folder: Annotated[Path, typer.Argument(help="Folder to make.")] = Path("images"),
    quick: Annotated[
        bool, typer.Option("--quick", help="Few images and rounds: a run of less than a minute.")
    ] = False,
    force: Force = False,
) -> None:
    """Three clinics and their images of handwritten digits, with a base model for images.

    Each sees some of the digits only. The images are scikit-learn's, the model has ImageNet weights.
    """
    from silotune.data.demo_images import write_images

    make_way(folder, force=force)
    plan = write_images(folder, quick=quick)
    tell_next(
        f"Three sites, a base model and a plan are in {folder}.",
        [
            f"silotune data check {folder}/north/site.toml --plan {plan}",
            f"silotune simulate {plan} --baselines",
        ],
    )


def make_way(folder: Path, *, force: bool) -> None:
    """See to it that a demo can be written into a folder.

    Raises
    ------
    DataError
        It has something in it, and is no demo's, or is not to be replaced.
    """
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not force:
        raise DataError(f"{folder} is not empty", remedy="Give --force to replace it.")
    if not (folder / "plan.toml").is_file():
        raise DataError(f"{folder} is not a demo folder; it is left alone")
    shutil.rmtree(folder)


def tell_next(written: str, commands: Iterable[str]) -> None:
    """What lies there now, and the commands that go on with it."""
    console = terminal()
    console.print(f"{written} Next:", soft_wrap=True)
    for command in commands:
        console.print(f"  {command}", soft_wrap=True)  # to be copied whole
