"""The controls that a finished run's adapter has to pass, each from the run's own files.

None can be waived. What can't be checked (a certificate that is missing, attacks that were not run, an
adapter that was changed since) has not passed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from silotune.errors import CertificateInvalid, PlanInvalid, RunDirectoryInvalid
from silotune.plan import Plan
from silotune.privacy import certificate
from silotune.privacy.durable import file_sha256
from silotune.release.statement import Control, ControlName, Holder, hashes_of
from silotune.simulation.run_directory import RunDirectory

MOST_EXPOSURE = 10.0
"""Bits of exposure that a planted canary may have, unless somebody says otherwise."""

_READ_AS_CODE = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".py", ".so", ".joblib", ".npy"}
_NEEDED = ("adapter_config.json", "adapter_model.safetensors", "silotune.json", "README.md")
_SLACK = 1e-6  # of epsilon: the accountant's last digits


@dataclass(frozen=True)
class Examined:
    """What the controls looked at, and what they found.

    Attributes
    ----------
    run : str
        The run's name.
    plan_sha256 : str
        Hash of its plan.
    files, certificates : mapping of str to SHA-256
        The adapter's files; each site's certificate.
    controls : tuple of Control
        In the order of the page that explains them.
    """

    run: str
    plan_sha256: str
    files: Mapping[str, str]
    certificates: Mapping[str, str]
    controls: tuple[Control, ...]

    @property
    def failed(self) -> list[str]:
        """Names of the controls that were not passed."""
        return [control.name for control in self.controls if control.passed is False]


def examine(directory: RunDirectory, *, most_exposure: float = MOST_EXPOSURE) -> Examined:
    """Apply every control to a finished run.

    Parameters
    ----------
    directory : RunDirectory
        Of a run that came to its end.
    most_exposure : float
        Bits of exposure that a planted canary may have.

    Raises
    ------
    RunDirectoryInvalid
        It is no run's directory, or has no final adapter.
    """
    resolved = directory.read_json("resolved.json")
    try:
        plan = Plan.from_canonical(json.dumps(resolved["plan"]))
    except (KeyError, PlanInvalid) as exc:
        raise RunDirectoryInvalid(f"{directory.root}: resolved.json has no valid plan") from exc
    if not directory.final_adapter.is_dir():
        raise RunDirectoryInvalid(
            f"{directory.root} has no adapters/final: only a finished run has an adapter to release"
        )
    files = hashes_of(directory.final_adapter)
    paths = _certificates(directory)
    attacks = directory.find_json("attacks.json") or {}
    controls = (
        _adapter(files),
        _plan(plan, str(resolved.get("plan_sha256"))),
        _certified(directory, plan, paths),
        *_attacked(plan, attacks, files, most_exposure=most_exposure),
    )
    return Examined(
        run=directory.name,
        plan_sha256=plan.sha256,
        files=files,
        certificates={site: file_sha256(path) for site, path in paths.items()},
        controls=controls,
    )


def _adapter(files: Mapping[str, str]) -> Control:
    """Complete, in PEFT's format, and nothing in it that could run when it is read."""
    complete = all(name in files for name in _NEEDED)
    active = [name for name in files if Path(name).suffix in _READ_AS_CODE]
    figures = {"files": float(len(files)), "files_that_could_run": float(len(active))}
    passed = complete and not active
    return Control(name="adapter", held_by="consortium", passed=passed, figures=figures)


def _plan(plan: Plan, recorded: str) -> Control:
    """The plan that was run is private, and nobody can repeat its noise."""
    passed = plan.private and plan.plan.seed is None and recorded == plan.sha256
    stated = {"epsilon": plan.privacy.epsilon, "delta": plan.privacy.delta}
    figures = {name: value for name, value in stated.items() if value is not None}
    return Control(name="plan", held_by="engineer", passed=passed, figures=figures)


def _certificates(directory: RunDirectory) -> dict[str, Path]:
    folder = directory.root / "sites"
    found = {path.parent.name: path for path in sorted(folder.glob("*/certificate.json"))}
    return {site: path for site, path in found.items() if path.is_file()}


def _certified(directory: RunDirectory, plan: Plan, paths: Mapping[str, Path]) -> Control:
    """Every site whose updates are in the adapter certified what they cost, within the plan."""
    contributed = {
        str(event["site"]) for event in directory.events if event.get("event") == "site_replied"
    }
    held, largest = 0, 0.0
    for site in contributed & set(paths):
        try:
            verified = certificate.verify(paths[site])
        except CertificateInvalid:
            continue
        largest, body = max(largest, verified.epsilon), verified.body
        most = (plan.privacy.epsilon or 0.0) * (1.0 + _SLACK)
        mine = (body.site, body.plan_sha256) == (site, plan.sha256)
        held += body.private and mine and verified.epsilon <= most
    return Control(
        name="certificates",
        held_by="sites",
        passed=bool(contributed) and held == len(contributed),
        figures={"contributed": len(contributed), "certified": held, "largest_epsilon": largest},
    )


def _attacked(
    plan: Plan,
    attacks: Mapping[str, Any],
    files: Mapping[str, str],
    *,
    most_exposure: float,
) -> list[Control]:
    """What the attacks found; attacks on another adapter, or none, don't count as passed."""
    same = attacks.get("adapter") == files
    claimed = float(plan.privacy.epsilon or 0.0)
    audit = _bounded("audit", attacks.get("audit"), same=same, claimed=None)
    if not plan.per_unit:  # a whole site is what is hidden, and a step has no canaries
        audit = Control(name="audit", held_by="engineer", passed=None)
    controls = [
        audit,
        _bounded("membership", attacks.get("membership"), same=same, claimed=claimed),
    ]
    if plan.model.task != "causal_lm":
        return [*controls, Control(name="memorisation", held_by="consortium", passed=None)]
    found = attacks.get("memorisation") or {}
    exposure, extracted = found.get("most_exposure_bits"), found.get("extracted")
    figures = {"most_exposure_allowed": most_exposure}
    if exposure is None or extracted is None:
        return [*controls, _not_done("memorisation", "consortium", figures)]
    figures |= {"most_exposure_bits": float(exposure), "extracted": float(extracted)}
    passed = same and exposure <= most_exposure and extracted == 0
    return [
        *controls,
        Control(name="memorisation", held_by="consortium", passed=passed, figures=figures),
    ]


def _bounded(
    name: Literal["audit", "membership"],
    found: Mapping[str, Any] | None,
    *,
    same: bool,
    claimed: float | None,
) -> Control:
    """A measured lower bound of epsilon is not above the claim."""
    bound = (found or {}).get("lower_bound")
    claimed = claimed if claimed is not None else (found or {}).get("claimed")
    if bound is None or claimed is None:
        return _not_done(name, "engineer", {})
    violated = bool((found or {}).get("violated", False))
    figures = {"lower_bound": float(bound), "claimed": float(claimed)}
    passed = same and not violated and bound <= claimed
    return Control(name=name, held_by="engineer", passed=passed, figures=figures)


def _not_done(name: ControlName, held_by: Holder, figures: dict[str, float]) -> Control:
    return Control(name=name, held_by=held_by, passed=False, figures=figures)
