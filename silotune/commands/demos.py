"""`silotune demo`: folders of demonstration data, with sites and a plan, each ready to be simulated."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.table import Table
from rich.text import Text

from silotune.errors import DataError
from silotune.percents import said_percent
from silotune.terminal import inert, terminal

if TYPE_CHECKING:
    from silotune.api.run import Run
    from silotune.data.demo import Demo

demo = typer.Typer(no_args_is_help=True, help="Write demo data, site folders and a plan.")

WriteOnly = Annotated[
    bool, typer.Option("--write-only", help="Write the records and the plan, and train nothing.")
]
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
    _make_way(folder, force=force)
    write_hospitals(folder, split=split, patients=patients)  # type: ignore[arg-type]
    _tell_next(
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
    write_only: WriteOnly = False,
    force: Force = False,
) -> None:
    """Five hospitals learn to find what identifies people in notes, and take it out of one.

    Every note is made up, with the package Faker: there is no patient's text in it, and what a model
    reaches on it says nothing of real notes. Each hospital writes in its own style. The plan trains at
    epsilon 8 for each patient, under secure aggregation; beside it stand each hospital alone and pooled
    notes. It takes some minutes.
    """
    from silotune.data.demo_notes import example_note, write_notes

    _make_way(folder, force=force)
    written = write_notes(folder, quick=quick)
    run = _run(
        written, write_only, "notes of five hospitals", "Faker made them up: no patient is in them."
    )
    if run is None:
        return
    _tell_redacted(run, example_note())
    _tell_end(run, [
        f"silotune predict {run.folder} --redact < note.txt",
        f"silotune predict {run.folder} --redact --data notes.csv --column note --threshold 0.2",
    ])  # fmt: skip


def _run(
    written: Demo,
    write_only: bool,
    what: str,
    about: str,
    *,
    tell: Callable[[Run], None] | None = None,
) -> Run | None:
    """Say what was written, train on it and say what that gave; the run, unless it is only written."""
    folder = written.plan.parent
    told = f"Wrote {sum(written.records):,} {what} to {folder}. {about}"
    if write_only:
        _tell_next(told, [
            f"silotune data check {written.sites[0]}/site.toml --plan {written.plan}",
            f"silotune plan check {written.plan}",
            f"silotune simulate {written.plan} --baselines",
        ])  # fmt: skip
        return None
    terminal().print(told, soft_wrap=True)
    from silotune.api.simulating import simulate

    run = simulate(written.plan, runs=folder / "runs", baselines=True)
    (tell or _tell_methods)(run)
    return run


def _tell_end(run: Run, commands: Iterable[str]) -> None:
    """Write the report; what lies there now, and the commands that go on with it."""
    _tell_next(f"The report is {run.report()}.", commands)


def _tell_methods(run: Run) -> None:
    """What those who trained on less or more reach on the held-out records of all sites."""
    metrics = run.plan.task.metrics
    rows = {
        "own": "own records only (mean of the sites)",
        "federated": "federated",
        "pooled": "pooled records",
    }
    scores = {row.key: row.test for row in run.record.methods}
    table = Table(
        "trained on, all at the same epsilon", *(metric.title for metric in metrics), box=None
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for key, title in rows.items():
        table.add_row(title, *(f"{scores[key][metric.key]:.3f}" for metric in metrics))
    terminal().print(table)


def _tell_redacted(run: Run, note: str) -> None:
    """A new note before and after."""
    from silotune.inference.redaction import in_words, moved, redacted

    model = run.model()
    (answer,) = model.predict([note])
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
        bool, typer.Option("--quick", help="Few loans and rounds: done sooner, tells less.")
    ] = False,
    write_only: WriteOnly = False,
    force: Force = False,
) -> None:
    """Four banks learn which loans go bad, and the model is tried on loans that nobody had.

    A public table of credit scoring, told in words; what an applicant works as stands in for the bank.
    The plan trains at epsilon 8 for each loan, under secure aggregation; beside it stand each bank alone
    and pooled loans. It takes some minutes.
    """
    from silotune.data.demo_bank import NEW_LOANS, write_banks

    _make_way(folder, force=force)
    written = write_banks(folder, quick=quick)
    run = _run(written, write_only, "loans of four banks", "Others of theirs take no part.")
    if run is None:
        return
    _tell_new(run, folder / NEW_LOANS, {"text": "loan", "label": "status"})
    columns = "--column text=loan --column label=status"
    _tell_end(run, [
        f"silotune evaluate {run.folder} --data {folder / NEW_LOANS} {columns} --group bank",
        f"silotune predict {run.folder} 'home rent, earlier defaults yes, low income, very high loan'",
    ])  # fmt: skip


def _tell_new(run: Run, data: Path, roles: Mapping[str, str]) -> None:
    """How the federated model does on records that took no part, as `silotune evaluate` has it."""
    from silotune.api.evaluating import evaluate
    from silotune.inference.evaluated import in_words, title_of

    found = evaluate(run, data, columns=roles, progress=False).figures
    (positive,) = (row for row in found.labels if row.label == found.positive)
    figures = {**found.metrics, "auroc": positive.auroc}
    told = ", ".join(
        f"{title_of(name)} {in_words(figures[name])}" for name in ("auroc", "macro_f1", "accuracy")
    )
    terminal().print(
        f"The federated model on {found.records:,} records that took no part, {positive.records:,} of "
        f"them {positive.label}: {told}; in brackets {said_percent(found.confidence)} intervals."
    )


@demo.command("images")
def images(
    folder: Annotated[Path, typer.Argument(help="Folder to make.")] = Path("images"),
    quick: Annotated[
        bool, typer.Option("--quick", help="Few, small images and few rounds: done sooner.")
    ] = False,
    write_only: WriteOnly = False,
    force: Force = False,
) -> None:
    """Three clinics learn to read handwritten digits, of which each sees some only.

    The images are scikit-learn's; the base model, which is written beside them, has ImageNet weights.
    The plan trains at epsilon 8 for each image; beside it stand each clinic alone and pooled images.
    """
    from silotune.data.demo_images import write_images

    _make_way(folder, force=force)
    written = write_images(folder, quick=quick)
    run = _run(written, write_only, "images of three clinics", "The base model is there, too.")
    if run is None:
        return
    image = min((written.sites[0] / "scans").iterdir())
    _tell_end(run, [f"silotune predict {run.folder} {image}"])


@demo.command("letters")
def letters(
    folder: Annotated[Path, typer.Argument(help="Folder to make.")] = Path("letters"),
    quick: Annotated[
        bool, typer.Option("--quick", help="A tiny random model: done in a minute, learns little.")
    ] = False,
    write_only: WriteOnly = False,
    force: Force = False,
) -> None:
    """Three hospitals teach SmolLM2-135M to write their letters from a few facts, as chats.

    Every letter is made up: there is no patient in it, and what a model reaches on it says nothing of
    real letters. The plan trains at epsilon 8 for each chat, under secure aggregation; beside it stand
    each hospital alone, pooled letters and the model as it came. On a laptop's processor it takes about
    half an hour; --quick shows the way on a model that can't write.
    """
    from silotune.data.demo_letters import example_question, write_letters

    _make_way(folder, force=force)
    written = write_letters(folder, quick=quick)
    about = "Every letter is made up: no patient is in them."
    run = _run(written, write_only, "chats of three hospitals", about, tell=_tell_losses)
    if run is None:
        return
    _tell_written(run, example_question())
    _tell_end(run, [
        f"silotune predict {run.folder} '{example_question()}'",
        f"silotune serve {run.folder}",
    ])  # fmt: skip


def _tell_losses(run: Run) -> None:
    """The loss of every model on all hospitals' held-out letters, and on those of each."""
    found = {row.key: row for row in run.record.methods}
    rows = {
        "the model as it came": found["base"].test,
        **{f"trained at {site} alone": scores for site, scores in found["own"].everywhere.items()},
        "federated": found["federated"].test,
        "trained on pooled letters": found["pooled"].test,
    }
    table = Table("", "loss a token, all hospitals' new letters", box=None)
    table.columns[1].justify = "right"
    for title, scores in rows.items():
        table.add_row(title, f"{scores['loss']:.3f}")
    terminal().print(table)


def _tell_written(run: Run, question: str) -> None:
    """What the model makes of new facts, before training and after."""
    model = run.model()
    with model.loaded.module.peft.disable_adapter():
        (before,) = model.predict([question])
    (after,) = model.predict([question])
    console = terminal()
    for heading, text in (
        ("A new letter is asked for", question),
        ("The model as it came writes", before.output),
        ("The federated model writes", after.output),
    ):
        console.print(f"\n{heading}:", style="bold")
        console.print(Text(inert(str(text).strip())))
    console.print()


def _make_way(folder: Path, *, force: bool) -> None:
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


def _tell_next(written: str, commands: Iterable[str]) -> None:
    """What lies there now, and the commands that go on with it."""
    console = terminal()
    console.print(f"{written} Next:", soft_wrap=True)
    for command in commands:
        console.print(f"  {command}", soft_wrap=True)  # to be copied whole
