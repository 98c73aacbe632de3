"""A demonstration of images: scikit-learn's handwritten digits at three clinics that see some of them.

With it comes a base model: EfficientNet-Lite0, trained on ImageNet, as a folder for Transformers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from silotune.data.demo import Demo, lacking
from silotune.data.partition import (
    CommonTerms,
    read_template,
    refuse_other_sites,
    write_site,
)
from silotune.data.site import BudgetConfig
from silotune.plan.plan import Plan
from silotune.plan.written import toml_text

CLINICS: Mapping[str, str] = {"north": "01234", "east": "34567", "south": "67890"}
"""The digits that each clinic sees, by its name."""

MODEL = "efficientnet-lite0"
_EXTRA = "silotune[demo-images]"
_QUICK = 450  # images, in the short demonstration
_SIDES = {True: 32, False: 96}  # pixels that the base model is given

Scan = tuple[str, str, Any]
"""Of an image: its file's name, its digit, and its pixels [8, 8]."""


def load_scans(*, quick: bool) -> dict[str, list[Scan]]:
    """The images of each clinic, dealt out by a hash of their number.

    Raises
    ------
    EnvironmentFault
        scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise lacking("scikit-learn", install=_EXTRA) from None
    found = load_digits()
    order = sorted(range(len(found.target)), key=_shuffled)[: _QUICK if quick else None]
    dealt: dict[str, list[Scan]] = {name: [] for name in CLINICS}
    for number in sorted(order):
        digit = str(found.target[number])
        homes = [name for name, digits in CLINICS.items() if digit in digits]
        pixels = np.rint(found.images[number] * 255 / 16).astype(np.uint8)
        home = homes[_shuffled(number)[0] % len(homes)]
        dealt[home].append((f"{number:04}.png", digit, pixels))
    return dealt


def _shuffled(number: int) -> bytes:
    return hashlib.sha256(f"silotune digits {number}".encode()).digest()


def write_images(folder: Path, *, quick: bool = False) -> Demo:
    """Write three site folders with images, a base model, a plan and a README.

    Parameters
    ----------
    folder : Path
        Where to; made if needed. Files of an earlier demonstration are overwritten.
    quick : bool
        Fewer images, smaller for the model, and fewer rounds.

    Raises
    ------
    EnvironmentFault
        scikit-learn, Pillow or the package of the weights is not installed.
    FolderOccupied
        The folder holds other sites.
    """
    from silotune.models.efficientnet import write_efficientnet_lite0
    from silotune.models.pretrained import weights_sha256

    refuse_other_sites(folder, list(CLINICS))
    scans = load_scans(quick=quick)
    folder.mkdir(parents=True, exist_ok=True)
    write_efficientnet_lite0(folder / MODEL, size=_SIDES[quick])
    labels = [str(digit) for digit in range(10)]
    filled = read_template("images_plan.toml").substitute(
        base=toml_text(str((folder / MODEL).absolute())),
        sha256=toml_text(weights_sha256(folder / MODEL)),
        labels=toml_text(labels),
        rounds=30 if quick else 120,
    )
    (folder / "plan.toml").write_text(filled, encoding="utf-8")
    plan = Plan.load(folder / "plan.toml")
    for name, own in scans.items():
        _write_clinic(folder / name, own, plan=plan)
    lines = [
        f"{name:8}{len(own):>6} images of {', '.join(CLINICS[name])}" for name, own in scans.items()
    ]
    readme = read_template("images_readme.txt").substitute(sites="\n".join(lines))
    (folder / "README.txt").write_text(readme, encoding="utf-8")
    return Demo(
        plan=folder / "plan.toml",
        sites=tuple(folder / name for name in scans),
        records=tuple(map(len, scans.values())),
    )


def _write_clinic(folder: Path, scans: list[Scan], *, plan: Plan) -> None:
    try:
        from PIL import Image
    except ImportError:
        raise lacking("pillow", install=_EXTRA) from None
    (folder / "scans").mkdir(parents=True, exist_ok=True)
    for name, _, pixels in scans:
        Image.fromarray(pixels).save(folder / "scans" / name)
    write_site(
        folder,
        title=f"A clinic that sees the digits {', '.join(CLINICS[folder.name])} (a demonstration).",
        offer=CommonTerms(
            dataset="digits",
            columns={"image": "file", "label": "digit"},
            budget=BudgetConfig(epsilon=10.0, delta=1e-5),
            labels=plan.model.labels,
            plan=plan,
            images="scans",
        ),
        header=["file", "digit"],
        rows=[(name, digit) for name, digit, _ in scans],
        units=len(scans),
    )
