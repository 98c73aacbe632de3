"""`silotune demo`: data and plans to try silotune with."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from silotune.errors import DataError
from silotune.terminal import terminal

app = typer.Typer(no_args_is_help=True, help="Write demo data, site folders and a plan.")


@app.callback()
def choose() -> None:
    """Write demo data, site folders and a plan."""


@app.command("hospitals")
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
    force: Annotated[
        bool, typer.Option("--force", help="Replace the folder if it is there.")
    ] = False,
) -> None:
    """Seven specialty hospitals, made of the descriptions of ICD-10-CM diagnosis codes.

    The task is to tell chronic conditions from acute ones. Chapters of the classification stand in
    for hospitals; there is no patient text in it.
    """
    from silotune.data.demo import write_hospitals

    if split not in {"code", "category"}:
        raise typer.BadParameter("use 'code' or 'category'", param_hint="--split")
    if folder.exists() and any(folder.iterdir()):
        if not force:
            raise DataError(f"{folder} is not empty", remedy="Give --force to replace it.")
        if not (folder / "plan.toml").is_file():
            raise DataError(f"{folder} is not a demo folder; it is left alone")
        shutil.rmtree(folder)
    write_hospitals(folder, split=split, patients=patients)  # type: ignore[arg-type]
    console = terminal()
    console.print(f"Seven hospitals and a plan are in {folder}. Next:")
    console.print(f"  silotune plan check {folder}/plan.toml")
    console.print(f"  silotune simulate {folder}/plan.toml --baselines")
