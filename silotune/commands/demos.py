"""`silotune demo`: folders of demonstration data, with sites and a plan, each ready to be simulated."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

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
