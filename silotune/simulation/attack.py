"""Attacks on a finished simulation: an audited step, and the same run again with planted canaries.

The released adapter can't be asked about canaries that it never saw. So the run is played again, by the
same code and on the same records, with a few canaries among them; the two adapters differ in those alone
(and in noise), which makes the first one the reference of a likelihood ratio. Nothing of the second run
is kept but its scores.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from silotune.errors import AttackRefused, RunDirectoryInvalid
from silotune.privacy.attacks.bounds import CONFIDENCE, AuditResult, audit_run, audit_step
from silotune.privacy.attacks.canaries import (
    Memorisation,
    Planted,
    Separation,
    code,
    exposures,
    memorisation,
    plant,
    separation,
)
from silotune.privacy.certificate import Bound, Measured, add_measured
from silotune.release import hashes_of
from silotune.rounds.rounds import RoundLoop
from silotune.rounds.run_directory import RunDirectory
from silotune.simulation.grid import WorkerGrid
from silotune.simulation.outcome import LoggedStore
from silotune.simulation.pool import SiteSlot
from silotune.simulation.program import payload_for
from silotune.simulation.run import Recorded, Settings, recorded
from silotune.simulation.step_audit import step_scores
from silotune.trust.identity import load_or_create

RESULT = "attacks.json"

CAVEAT = (
    "A low bound proves nothing: it says what these attacks reached, not what another one could. Only "
    "the proven epsilon limits every attack; a bound above it shows that the proof does not hold here."
)

_DELTA = 1e-5  # of bounds where nothing is claimed
_SHARE, _FEWEST, _MOST = 0.1, 100, 1000  # canaries, in and out, by declared units
_RANKED = 60  # secrets that are ranked among candidates, and completed
_CANDIDATES = 255

Say = Callable[[str], None]
Vector = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Attacks:
    """What was tried and what it found.

    Attributes
    ----------
    delta : float
        Of every epsilon here.
    audit : Finding or None
        One step, in gradient space; None where single units are not what is hidden.
    membership : Finding
        The whole run, by its canaries.
    separation : Separation
        How well the likelihood ratio tells canaries that were in.
    memorisation : Memorisation or None
        Of a language model.
    """

    delta: float
    audit: AuditResult | None
    membership: AuditResult
    separation: Separation
    memorisation: Memorisation | None

    @property
    def violated(self) -> bool:
        """Whether a bound is above its claim."""
        return self.membership.violated or (self.audit is not None and self.audit.violated)

    def as_json(self) -> dict[str, Any]:
        """What ``attacks.json`` has, but for the adapter that was attacked."""
        memory = self.memorisation
        return {
            "delta": self.delta,
            "confidence": CONFIDENCE,
            "violated": self.violated,
            "audit": _shown(self.audit),
            "membership": _shown(self.membership) | asdict(self.separation),
            "memorisation": memory and asdict(memory) | {"most_exposure_bits": memory.largest},
            "tried": _tried(self),
            "caveat": CAVEAT,
        }


def _shown(finding: AuditResult | None) -> Any:
    return finding and asdict(finding) | {"lower_bound": finding.lower_bound}


def attack(directory: RunDirectory, *, settings: Settings, say: Say) -> Attacks:
    """Attack a finished run; writes ``attacks.json`` and adds to ``privacy.json``.

    Parameters
    ----------
    directory : RunDirectory
        Of a finished simulation.
    settings : Settings
        How to play it again.
    say : callable
        Told what is being done.

    Raises
    ------
    RunDirectoryInvalid
        The run is not finished.
    AttackRefused
        A site doesn't allow it.
    """
    if directory.find_json("results.json") is None:
        raise RunDirectoryInvalid(f"{directory.root} is not finished; attack it when it is")
    run = recorded(directory)
    if run.plan.only_sums:
        raise RunDirectoryInvalid(
            f"{directory.root} counted and trained nothing: there is no adapter to attack"
        )
    if refusing := [site.name for site in run.sites if not site.allow_attacks]:
        raise AttackRefused(f"not allowed by {', '.join(refusing)}")
    found = _attacked(directory, run, settings=settings, say=say)
    _certify(directory, found, [site.name for site in run.sites])
    adapter = hashes_of(directory.final_adapter)
    directory.write_json(RESULT, {"adapter": adapter, **found.as_json()})
    privacy = directory.find_json("privacy.json")
    if privacy is not None:
        directory.write_json("privacy.json", {**privacy, "attacks": _measured(found)})
    return found


def _certify(directory: RunDirectory, found: Attacks, sites: Sequence[str]) -> None:
    """Every site signs its certificate again, with what was measured beside what it claims."""
    measured = Measured(
        audit=_bound(found.audit), membership=_bound(found.membership), confidence=CONFIDENCE
    )
    for site in sites:
        state = directory.site(site)
        if (state / "certificate.json").exists():
            key = load_or_create(state / "signing.key")
            add_measured(state / "certificate.json", measured, key=key)


def _bound(finding: AuditResult | None) -> Bound | None:
    if finding is None or finding.claimed is None:
        return None
    return Bound(
        claimed=finding.claimed, lower_bound=finding.lower_bound, canaries=finding.canaries
    )


def _attacked(directory: RunDirectory, run: Recorded, *, settings: Settings, say: Say) -> Attacks:
    plan, delta = run.plan, run.plan.privacy.delta or _DELTA
    audit = None
    if plan.per_unit or plan.privacy.site is None:
        say("Auditing one step in gradient space")
        seen = step_scores(plan, run.sites, seed=plan.plan.seed)
        audit = audit_step(seen.scores, seen.coins, claimed=seen.claimed, mu=seen.mu, delta=delta)
    saved = directory.load_checkpoint()
    assert saved is not None  # a finished run has one
    planted = plant(
        _count(run), labels=plan.model.labels, seed=plan.plan.seed, target=plan.task.target
    )
    with TemporaryDirectory(prefix="silotune-attack-") as folder:
        trained = _Trained(run, planted, settings=settings, folder=Path(folder), say=say)
        with trained:
            scores = trained.losses(saved[0]["adapter"]) - trained.losses(trained.adapter)
            remembered = None if plan.model.labels else trained.memorisation()
    return Attacks(
        delta=delta,
        audit=audit,
        membership=audit_run(scores, planted.coins, claimed=trained.claimed, delta=delta),
        separation=separation(scores, planted.coins),
        memorisation=remembered,
    )


def _count(run: Recorded) -> int:
    units = sum(site.units_for(run.plan) for site in run.sites)
    return int(min(max(_SHARE * units, _FEWEST), _MOST))


class _Trained:
    """The run with canaries: trains when it is entered, then answers for its adapter."""

    def __init__(
        self, run: Recorded, planted: Planted, *, settings: Settings, folder: Path, say: Say
    ) -> None:
        self._run, self._planted, self._say = run, planted, say
        self._first = run.sites[0].name
        inside = [planted.examples[i] for i in np.flatnonzero(planted.coins)]
        states = [folder / site.name for site in run.sites]
        for state in states:
            state.mkdir(mode=0o700)
        payload = payload_for(
            run.plan,
            run="attacked",
            sites=list(run.sites),
            states=states,
            choices=run.choices,
            shared=folder,
        )
        self._store = LoggedStore(
            RunDirectory.create(folder, "attacked", plan_toml=""),
            plan=run.plan,
            names=[site.name for site in run.sites],
            listener=self._told,
        )
        self._grid = WorkerGrid(
            "silotune.simulation.program:build_with_canaries",
            {**payload, "planted": [inside[i :: len(run.sites)] for i in range(len(run.sites))]},
            [SiteSlot(site.name, site.units_for(run.plan)) for site in run.sites],
            workers=settings.worker_count(len(run.sites)),
        )
        self.adapter: Vector
        self.claimed: float | None = None

    def __enter__(self) -> _Trained:
        self._grid.__enter__()
        self._grid.wait_until_ready()
        count = int(self._planted.coins.sum())
        self._say(f"Training again with {count} canaries")
        loop = RoundLoop(plan=self._run.plan, run="attacked", grid=self._grid, store=self._store)
        self.adapter = loop.execute()
        finished = self._grid.inspect_all({"op": "finish"}, {}).values()
        bodies = [answer["certificate"] for answer, _ in finished if answer["certificate"]]
        self.claimed = max((body["exposures"][0]["epsilon"] for body in bodies), default=None)
        return self

    def __exit__(self, *exc: Any) -> None:
        self._grid.__exit__(*exc)

    def losses(self, adapter: Vector) -> NDArray[np.float64]:
        """Loss of every canary under an adapter."""
        return self._losses(self._planted.examples, adapter)

    def memorisation(self) -> Memorisation:
        """Exposure and completion of some of the secrets."""
        self._say("Looking for the canaries' secrets")
        chosen = self._planted.examples[:_RANKED]
        coins = self._planted.coins[:_RANKED]
        rng = np.random.default_rng(self._run.plan.plan.seed)
        guesses = [code(rng) for _ in range(_CANDIDATES)]
        true = self._losses(chosen, self.adapter)
        asked = [{**example, "response": each} for example in chosen for each in guesses]
        others = self._losses(asked, self.adapter).reshape(len(chosen), len(guesses))
        request = {"op": "complete", "prompts": [example["prompt"] for example in chosen]}
        answer, _ = self._asked(request, self.adapter)
        completed = [
            _bare(text) == _bare(example["response"])
            for text, example in zip(answer["texts"], chosen, strict=True)
        ]
        return memorisation(
            exposures(true, others), np.array(completed), coins, among=_CANDIDATES + 1
        )

    def _losses(self, examples: list[dict[str, str]], adapter: Vector) -> NDArray[np.float64]:
        _, arrays = self._asked({"op": "losses", "examples": examples}, adapter)
        return arrays["losses"]

    def _asked(
        self, request: Mapping[str, Any], adapter: Vector
    ) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        found = self._grid.inspect_all(request, {"flat": adapter}, sites=[self._first])
        return found[self._first]

    def _told(self, event: Mapping[str, Any]) -> None:
        if event["event"] == "round_finished":
            total = self._run.plan.rounds.number
            self._say(f"Training again with canaries: round {event['round']} of {total}")


def _bare(text: str) -> str:
    return "".join(text.split())


def _tried(found: Attacks) -> list[str]:
    """The attacks in words."""
    tried = []
    if found.audit is not None:
        tried.append(
            f"one step with {found.audit.canaries:,} canaries in gradient space, everybody taking part"
        )
    tried.append(
        f"membership of {found.membership.canaries:,} planted records, by likelihood ratio on the "
        "final adapter"
    )
    if found.memorisation is not None:
        tried.append(
            f"exposure among {found.memorisation.candidates} candidates and completion of "
            f"{found.memorisation.secrets} planted secrets"
        )
    return tried


def _measured(found: Attacks) -> dict[str, Any]:
    """What ``privacy.json`` says beside its claims."""

    def bound(finding: AuditResult | None) -> dict[str, Any] | None:
        if finding is None:
            return None
        return {"claimed_epsilon": finding.claimed, "measured_lower_bound": finding.lower_bound}

    return {
        "audit": bound(found.audit),
        "membership": bound(found.membership),
        "confidence": CONFIDENCE,
        "violated": found.violated,
        "tried": _tried(found),
        "caveat": CAVEAT,
    }
