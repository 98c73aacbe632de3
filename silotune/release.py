"""The gate that a finished adapter passes before it leaves the consortium.

Every control is applied to the run's own files, and none can be waived. What can't be checked (a missing
certificate, attacks that were not run, an adapter that was changed since) has not passed.

Then a named person signs: terms and numbers, no sentences, and the hashes of every file. It is a
machine-readable record of the criteria that were applied, tied to the output they were applied to, as
output-checking standards ask (SATRE 2.0, 3.3.07 and 3.3.09).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import Field

from silotune.errors import CertificateInvalid, PlanInvalid, ReleaseInvalid, RunDirectoryInvalid
from silotune.plan.document import Document, Sha256
from silotune.plan.plan import Plan
from silotune.privacy import certificate
from silotune.rounds.run_directory import RunDirectory
from silotune.trust.files import file_sha256
from silotune.trust.identity import fingerprint
from silotune.trust.signed import Signing

RELEASE_FILE = "release.json"
_RELEASE = Signing("silotune release v1", "release", ReleaseInvalid)

Holder = Literal["engineer", "sites", "consortium", "person"]
ControlName = Literal[
    "adapter", "plan", "certificates", "audit", "membership", "memorisation", "signature"
]


class ReleaseControl(Document):
    """One control, who holds it, and what it came to.

    Attributes
    ----------
    name : str
        Which one.
    held_by : str
        Who can make it pass or fail.
    passed : bool or None
        None where it does not apply.
    figures : mapping of str to number
        What was compared with what.
    """

    name: ControlName
    held_by: Holder
    passed: bool | None
    figures: dict[str, float] = Field(default_factory=dict)


class Statement(Document):
    """Everything that is signed.

    Attributes
    ----------
    files : mapping of str to SHA-256
        Every file of the adapter's folder.
    certificates : mapping of str to SHA-256
        Every site's certificate, by the name of the site.
    """

    format: Literal["silotune release 1"] = "silotune release 1"
    run: str
    plan_sha256: Sha256
    files: dict[str, Sha256]
    certificates: dict[str, Sha256]
    controls: tuple[ReleaseControl, ...]
    person: Annotated[str, Field(min_length=1, max_length=200)]
    role: Annotated[str, Field(min_length=1, max_length=200)]
    code_version: str
    time: str


def hashes_of(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, by its path in it."""
    return {
        path.relative_to(folder).as_posix(): file_sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def sign(statement: Statement, path: Path, *, key: Ed25519PrivateKey) -> None:
    """Write the signed statement, readable by all: it goes where the adapter goes."""
    _RELEASE.write_file(path, statement, key)


def read(path: Path) -> tuple[Statement, str]:
    """The statement in a file, once its signature fits, and the fingerprint of who signed.

    Raises
    ------
    ReleaseInvalid
        It is no signed release, or was changed.
    """
    statement, key = _RELEASE.read_file(path, Statement)
    return statement, fingerprint(key)


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
    controls: tuple[ReleaseControl, ...]

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


def _adapter(files: Mapping[str, str]) -> ReleaseControl:
    """Complete, in PEFT's format, and nothing in it that could run when it is read."""
    complete = all(name in files for name in _NEEDED)
    active = [name for name in files if Path(name).suffix in _READ_AS_CODE]
    figures = {"files": float(len(files)), "files_that_could_run": float(len(active))}
    passed = complete and not active
    return ReleaseControl(name="adapter", held_by="consortium", passed=passed, figures=figures)


def _plan(plan: Plan, recorded: str) -> ReleaseControl:
    """The plan that was run is private, and nobody can repeat its noise."""
    passed = plan.private and plan.plan.seed is None and recorded == plan.sha256
    stated = {"epsilon": plan.privacy.epsilon, "delta": plan.privacy.delta}
    figures = {name: value for name, value in stated.items() if value is not None}
    return ReleaseControl(name="plan", held_by="engineer", passed=passed, figures=figures)


def _certificates(directory: RunDirectory) -> dict[str, Path]:
    folder = directory.root / "sites"
    found = {path.parent.name: path for path in sorted(folder.glob("*/certificate.json"))}
    return {site: path for site, path in found.items() if path.is_file()}


def _certified(directory: RunDirectory, plan: Plan, paths: Mapping[str, Path]) -> ReleaseControl:
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
    return ReleaseControl(
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
) -> list[ReleaseControl]:
    """What the attacks found; attacks on another adapter, or none, don't count as passed."""
    same = attacks.get("adapter") == files
    claimed = float(plan.privacy.epsilon or 0.0)
    audit = _bounded("audit", attacks.get("audit"), same=same, claimed=None)
    if not plan.per_unit:  # a whole site is what is hidden, and a step has no canaries
        audit = ReleaseControl(name="audit", held_by="engineer", passed=None)
    controls = [
        audit,
        _bounded("membership", attacks.get("membership"), same=same, claimed=claimed),
    ]
    if not plan.task.generates:
        return [*controls, ReleaseControl(name="memorisation", held_by="consortium", passed=None)]
    found = attacks.get("memorisation") or {}
    exposure, extracted = found.get("most_exposure_bits"), found.get("extracted")
    figures = {"most_exposure_allowed": most_exposure}
    if exposure is None or extracted is None:
        return [*controls, _not_done("memorisation", "consortium", figures)]
    figures |= {"most_exposure_bits": float(exposure), "extracted": float(extracted)}
    passed = same and exposure <= most_exposure and extracted == 0
    return [
        *controls,
        ReleaseControl(name="memorisation", held_by="consortium", passed=passed, figures=figures),
    ]


def _bounded(
    name: Literal["audit", "membership"],
    found: Mapping[str, Any] | None,
    *,
    same: bool,
    claimed: float | None,
) -> ReleaseControl:
    """A measured lower bound of epsilon is not above the claim."""
    bound = (found or {}).get("lower_bound")
    claimed = claimed if claimed is not None else (found or {}).get("claimed")
    if bound is None or claimed is None:
        return _not_done(name, "engineer", {})
    violated = bool((found or {}).get("violated", False))
    figures = {"lower_bound": float(bound), "claimed": float(claimed)}
    passed = same and not violated and bound <= claimed
    return ReleaseControl(name=name, held_by="engineer", passed=passed, figures=figures)


def _not_done(name: ControlName, held_by: Holder, figures: dict[str, float]) -> ReleaseControl:
    return ReleaseControl(name=name, held_by=held_by, passed=False, figures=figures)


_ASKS: Mapping[ControlName, str] = {
    "adapter": "complete, in PEFT's own format, and nothing in it runs when it is read",
    "plan": "private, not seeded, and the plan that was run",
    "certificates": "each site that contributed certified its cost, within the plan",
    "audit": "the one-run audit's lower bound is not above its claim",
    "membership": "an attack on the adapter shows no more than the plan's epsilon",
    "memorisation": "planted canaries are not exposed beyond the bound, none is completed",
    "signature": "a named person with a role and a key says so",
}
_HOLDERS: Mapping[Holder, str] = {
    "engineer": "ML engineer",
    "sites": "each site",
    "consortium": "consortium",
    "person": "a named person",
}


def asks(control: ReleaseControl) -> str:
    """What a control asks for."""
    return _ASKS[control.name]


def holder(control: ReleaseControl) -> str:
    """Who holds it."""
    return _HOLDERS[control.held_by]


def verdict(control: ReleaseControl) -> str:
    """Passed, not passed, or why it does not apply."""
    if control.passed is None:
        return "does not apply"
    if control.passed:
        return "passed"
    if control.name in {"audit", "membership", "memorisation"} and not measured(control):
        return "NOT DONE: run the attacks (simulate --attack)"
    return "NOT PASSED"


def measured(control: ReleaseControl) -> bool:
    """Whether an attack left a figure to compare."""
    return any(name in control.figures for name in ("lower_bound", "most_exposure_bits"))


def figures(control: ReleaseControl) -> str:
    """The numbers that were compared."""
    return ", ".join(
        f"{name.replace('_', ' ')} {value:.6g}" for name, value in control.figures.items()
    )
