"""A trained model, from the directory of its run or from the adapter's own folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from silotune.errors import AdapterMismatch, RunDirectoryInvalid
from silotune.models.adapter import SETTINGS, load_adapter, read_plan, write_adapter
from silotune.models.base import load_model
from silotune.models.task import LoadedModel
from silotune.plan.plan import Plan
from silotune.rounds.run_directory import FOUND_FILES, RunDirectory


@dataclass(frozen=True, kw_only=True)
class TrainedAdapter:
    """Where a trained adapter lies, and what it was trained by.

    Attributes
    ----------
    adapter : Path
        The adapter's folder, as `silotune.models.adapter.save_adapter` wrote it.
    plan : Plan
        The plan of its run.
    run : RunDirectory or None
        Its run, if that is here.
    """

    adapter: Path
    plan: Plan
    run: RunDirectory | None = None

    @property
    def run_folder(self) -> Path | None:
        """The directory of its run: also where the adapter's folder in it was named."""
        if self.run is not None:
            return self.run.root
        above = self.adapter.resolve().parent.parent
        return above if (above / "resolved.json").is_file() else None

    def load(
        self,
        *,
        base: str | None = None,
        device: str = "auto",
        attention: str | None = None,
        rounded: bool = False,
    ) -> LoadedModel:
        """The model, ready to predict, computing as the run did.

        Parameters
        ----------
        base : str, optional
            Where the base model is on this machine, if not where the plan says.
        device : str
            ``auto``, ``cpu`` or ``cuda:N``.
        attention : str, optional
            Transformers' name of another implementation than the run's.
        rounded : bool
            As for `silotune.models.base.load_model`.

        Raises
        ------
        ModelError
            The base model is not here or another one, or the adapter does not fit it.
        """
        choices = {} if self.run is None else self.run.read_json("resolved.json")["choices"]
        as_before = {key: choices[key] for key in ("attention", "dtype") if key in choices}
        if attention is not None:
            as_before = {"dtype": "float32", **as_before, "attention": attention}
        # What was trained already need not be tried to be used.
        model = load_model(
            self.plan, base=base, device=device, trial=False, rounded=rounded, **as_before
        )
        write_adapter(model, load_adapter(model, self.adapter))
        return model


def find_trained(path: Path, *, plan: Plan | None = None) -> TrainedAdapter:
    """The trained adapter at a path: of a finished run, or an adapter's folder.

    Parameters
    ----------
    path : Path
        A run directory, or a folder such as its ``adapters/final``.
    plan : Plan, optional
        Of an adapter's folder that has no plan beside it, as earlier versions wrote it.

    Raises
    ------
    RunDirectoryInvalid
        It is neither, or the run has no final adapter.
    AdapterMismatch
        The folder has no readable plan, or was made with another one.
    """
    if (path / SETTINGS).is_file():
        if plan is None:
            return TrainedAdapter(adapter=path, plan=read_plan(path))
        named = json.loads((path / SETTINGS).read_text(encoding="utf-8")).get("plan_sha256")
        if named != plan.sha256:
            raise AdapterMismatch(f"{path} was trained by another plan")
        return TrainedAdapter(adapter=path, plan=plan)
    directory = RunDirectory.open(path)
    if any(directory.find_json(name) is not None for name in FOUND_FILES.values()):
        raise RunDirectoryInvalid(
            f"{path} counted and trained nothing",
            remedy=f"See what it found: silotune report {path}",
        )
    if not directory.final_adapter.is_dir():
        raise RunDirectoryInvalid(
            f"{path} has no final adapter yet",
            remedy=f"Finish the run first: silotune simulate --resume {path}",
        )
    resolved = directory.read_json("resolved.json")["plan"]
    trained_by = Plan.from_canonical(json.dumps(resolved))
    return TrainedAdapter(adapter=directory.final_adapter, plan=trained_by, run=directory)


def load_trained(
    path: Path, *, base: str | None = None, device: str = "auto", plan: Plan | None = None
) -> LoadedModel:
    """`find_trained` and `TrainedAdapter.load` in one. Raises what they do."""
    return find_trained(path, plan=plan).load(base=base, device=device)
