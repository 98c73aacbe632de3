"""Adapters in the forms of other programs: how they are written, and what goes with them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Literal, get_args

from silotune.errors import ExportInTheWay, ExportRefused, ReleaseInvalid
from silotune.models import cards
from silotune.models.adapter import HEAD, PLAN, SETTINGS, auto_of
from silotune.release import RELEASE_FILE, hashes_of, read
from silotune.rounds.trained import TrainedAdapter, find_trained
from silotune.version import __version__

if TYPE_CHECKING:
    from silotune.models.task import LoadedModel

Form = Literal["peft", "merged", "onnx", "int8"]
CERTIFICATES, EXPORT_FILE = "certificates", "export.json"

TOLERANCES: Mapping[Form, float] = {"peft": 1e-4, "merged": 1e-3, "onnx": 1e-3, "int8": 0.1}
"""The largest difference of an answer, in parts of the largest, that a form may have."""


@dataclass(frozen=True, kw_only=True)
class ExportedAdapter:
    """What `export_adapter` wrote.

    Attributes
    ----------
    folder : Path
        Where it lies.
    form : str
        As asked for.
    difference, tolerance : float
        The largest difference of any answer about the public texts, in parts of the largest answer, and
        what would have been refused.
    texts : int
        How many public texts were asked about.
    released : bool
        Whether a signed release travels with it.
    certificates : int
        Sites' privacy certificates that travel with it.
    """

    folder: Path
    form: Form
    difference: float
    tolerance: float
    texts: int
    released: bool
    certificates: int


def export_adapter(
    path: str | PathLike[str],
    to: str | PathLike[str],
    *,
    form: Form = "peft",
    base: str | PathLike[str] | None = None,
    device: str = "cpu",
    tolerance: float | None = None,
) -> ExportedAdapter:
    """Write a trained adapter in a form that other programs load, and show that it answers alike.

    Parameters
    ----------
    path : Run or path
        A finished run, or an adapter's folder.
    to : path
        A folder that is not there yet, or empty.
    form : str
        ``peft``: the adapter as PEFT loads it. ``merged``: the whole model as Transformers loads it,
        with the head in a small file beside it. ``onnx``: one graph from token ids to logits, head
        included. ``int8``: that graph with 8-bit weights.
    base : path, optional
        Where the base model is on this machine, if not where the plan says.
    device : str
        Where the answers are compared.
    tolerance : float, optional
        The largest difference of an answer, in parts of the largest; see `TOLERANCES`.

    Raises
    ------
    ExportRefused
        The form can't hold the model, or answers otherwise; nothing is written.
    ExportInTheWay
        The folder holds something.
    ReleaseInvalid
        There is a signed release, and the adapter is not the one that was signed.

    Examples
    --------
    >>> import silotune
    >>> made = silotune.export_adapter("runs/small", "adapter", form="peft")
    >>> made.difference < made.tolerance
    True
    >>> silotune.load("adapter", device="cpu").predict(["cough"])[0].output in {"no", "yes"}
    True
    """
    if form not in get_args(Form):
        raise ValueError(f"form is one of {', '.join(get_args(Form))}")
    found, folder = find_trained(Path(path)), Path(to)
    if form in {"onnx", "int8"} and found.plan.task.sees:
        raise ExportRefused(
            f"{found.plan.model.task} is not written as a graph",
            remedy="Export it as peft or merged, which PyTorch loads.",
        )
    companions = _companions(found)
    with _new_folder(folder) as made:
        most = TOLERANCES[form] if tolerance is None else tolerance
        difference, texts = _write(found, made, form, base=base, device=device)
        if not difference <= most:
            raise ExportRefused(
                f"as {form} its answers differ by {difference:.1%} of the largest, over {most:.1%}"
            )
        for name, source in companions.items():
            (made / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source, made / name)
        exported = ExportedAdapter(
            folder=folder,
            form=form,
            difference=difference,
            tolerance=most,
            texts=texts,
            released=RELEASE_FILE in companions,
            certificates=sum(name.startswith(CERTIFICATES) for name in companions),
        )
        _tell(found, exported, made)
    return exported


def _companions(found: TrainedAdapter) -> dict[str, Path]:
    """Certificates and the signed release, by their names in the new folder."""
    root = found.adapter if found.run is None else found.run.root
    if found.run is None:
        paths = {path.stem: path for path in sorted((root / CERTIFICATES).glob("*.json"))}
    else:
        paths = {path.parent.name: path for path in sorted(root.glob("sites/*/certificate.json"))}
    companions = {f"{CERTIFICATES}/{site}.json": path for site, path in paths.items()}
    release = root / RELEASE_FILE
    if release.is_file():
        statement, _ = read(release)
        now = hashes_of(found.adapter)
        changed = [name for name, sha in statement.files.items() if now.get(name) != sha]
        if changed or statement.plan_sha256 != found.plan.sha256:
            raise ReleaseInvalid(f"changed since it was signed: {', '.join(changed) or 'the plan'}")
        companions[RELEASE_FILE] = release
    return companions


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A folder that takes its name when all is well; a failed export leaves nothing."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ExportInTheWay(
            f"{folder} is not empty", remedy="Give a folder that is not there yet."
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        made = Path(scratch) / "made"
        made.mkdir()
        yield made
        made.rename(folder)


def _write(
    found: TrainedAdapter,
    made: Path,
    form: Form,
    *,
    base: str | PathLike[str] | None,
    device: str,
) -> tuple[float, int]:
    """Write the form; the largest difference of its answers, and to how many texts."""
    from silotune.models import exported
    from silotune.models.pretrained import locate
    from silotune.privacy.quantized import round_weights

    place, kind = str(base or found.plan.model.base), found.plan.model.quantization
    # The exporter's view of attention: one that every runtime has.
    load = partial(found.load, base=place, device=device, attention="eager")
    model = load()
    asked = exported.Asked.of(model)
    texts = sum(map(len, asked.answers))
    if form == "peft":
        for path in sorted(found.adapter.iterdir()):
            if path.is_file() and path.name != RELEASE_FILE:
                shutil.copyfile(path, made / path.name)
        plain = exported.loaded_by_peft(model, made, base=locate(place))
        if kind != "none":  # of the same base model, to see the adapter's own share of a difference
            round_weights(plain, kind)
        return asked.difference(exported.with_backbone(model, plain)), texts
    if kind != "none":
        model = load(rounded=True)
    exported.write_merged(model, made, base=locate(place))
    if form == "merged":
        plain = exported.loaded_by_transformers(model, made)
        difference = asked.difference(exported.with_backbone(model, plain))
    else:
        for weights in made.glob("model*.safetensors*"):
            weights.unlink()  # the graph has its own
        answers = exported.write_graph(model, made, like=asked.batches[0])
        answers = exported.quantise_graph(made) if form == "int8" else answers
        difference = asked.difference(answers)
    _describe(found, model, made, form)
    return difference, texts


def _describe(found: TrainedAdapter, model: LoadedModel, made: Path, form: Form) -> None:
    """The head where the form has none in it, the settings, the plan, and a card."""
    names = [SETTINGS, PLAN, *([HEAD] if form == "merged" else [])]
    for name in names:
        if (found.adapter / name).is_file():
            shutil.copyfile(found.adapter / name, made / name)
    card = cards.graph_card if form in {"onnx", "int8"} else cards.merged_card
    auto = auto_of(model).__name__
    (made / "README.md").write_text(card(found.plan, model.description, auto=auto), "utf-8")


def _tell(found: TrainedAdapter, exported: ExportedAdapter, made: Path) -> None:
    """``export.json``: what this is made of, and how well it answers."""
    facts = asdict(exported) | {
        "silotune": __version__,
        "plan_sha256": found.plan.sha256,
        "made_of": hashes_of(found.adapter),
    }
    del facts["folder"]
    (made / EXPORT_FILE).write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n", "utf-8")
