"""The privacy certificate: what one run at one site cost, to whom its releases are worth what, signed.

It carries the privacy events themselves, so anybody can recompute its epsilon offline, without the
site, the coordinator or the ledger.

Under secure aggregation only sums over sites are seen, so other sites' noise protects a unit too, as far
as those sites keep it to themselves. A site can vouch for its own noise alone: hence one epsilon for
each number of sites that might collude with the coordinator.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import Field

from silotune.errors import CertificateInvalid
from silotune.plan.document import ADDED_LATER, Document, Sha256
from silotune.plan.plan import Plan
from silotune.plan.rules import sends_all_it_trains
from silotune.plan.sections import Positive
from silotune.privacy.events import (
    DpEvent,
    GaussianDpEvent,
    PoissonSampledDpEvent,
    SharedGaussianDpEvent,
    from_json,
    to_json,
)
from silotune.privacy.ledger import Ledger, RunAccount
from silotune.privacy.secagg.graph import tolerated_collusion
from silotune.privacy.tally import Tally, epsilon_of, total
from silotune.trust.identity import fingerprint
from silotune.trust.signed import Signing
from silotune.version import __version__

ALL_OTHERS = -1
"""In place of a number: all other sites collude."""


class Aggregation(Document):
    """Sums that the coordinator sees, of which every site's noise has the same scale.

    Attributes
    ----------
    threshold : int
        Sites in a sum, at least.
    tolerated : int
        Sites that may collude with the coordinator without opening single updates.
    shared_noise : bool
        Whether the sites share the noise; if not, each adds all of its own.
    """

    threshold: Annotated[int, Field(ge=2)]
    tolerated: Annotated[int, Field(ge=0)]
    shared_noise: bool


class Exposure(Document):
    """What the run is worth to somebody.

    Attributes
    ----------
    colluding : int
        Sites that collude with the coordinator; -1 for all other sites.
    epsilon : float
        At the certificate's delta.
    """

    colluding: Annotated[int, Field(ge=ALL_OTHERS)]
    epsilon: Annotated[float, Field(ge=0.0)]


def sums_of(plan: Plan) -> Aggregation | None:
    """How the plan's training updates are summed; None if what a site sends counts on its own.

    That other sites' noise counts takes one step a round, one rate, declared weights (so that all
    noise multipliers are one), updates that are sent whole and unchanged, noise of each round by
    itself (sites that miss different rounds correlate theirs otherwise), and a threshold that the plan
    fixes.
    """
    aggregation = plan.aggregation
    common = (
        plan.rounds.local_steps == 1
        and plan.privacy.rate
        and (plan.privacy.bands == 1 or plan.privacy.noise == "shared")
        and aggregation.weights == "declared"
        and sends_all_it_trains(plan)
    )
    if not (aggregation.secure and common and aggregation.threshold and aggregation.cohort):
        return None
    return Aggregation(
        threshold=aggregation.threshold,
        tolerated=tolerated_collusion(aggregation.threshold, aggregation.cohort),
        shared_noise=plan.privacy.noise == "shared",
    )


def exposures(
    tally: Mapping[str, int], *, delta: float, sums: Aggregation | None
) -> tuple[Exposure, ...]:
    """Epsilon by number of sites that collude with the coordinator.

    Parameters
    ----------
    tally : mapping of str to int
        What was released, as the ledger counts it.
    delta : float
        Of every epsilon.
    sums : Aggregation or None
        See `sums_of`.

    Returns
    -------
    tuple of Exposure
        From 0 up to what the aggregation tolerates, then `ALL_OTHERS`; only that if nothing is summed.
    """
    if sums is None:
        return (Exposure(colluding=ALL_OTHERS, epsilon=epsilon_of(tally, delta=delta)),)
    seen = dict(tally) if sums.shared_noise else _in_sums(tally, sums)
    counts = {**{c: c for c in range(sums.tolerated + 1)}, ALL_OTHERS: sums.threshold}
    return tuple(
        Exposure(colluding=told, epsilon=epsilon_of(seen, delta=delta, colluding=count))
        for told, count in counts.items()
    )


def _in_sums(tally: Mapping[str, int], sums: Aggregation) -> Tally:
    """Training steps with the noise of all sites in a sum, of which each has a share."""
    found: Tally = Tally()
    for leaf, times in tally.items():
        found[to_json(_in_sum(from_json(leaf), sums))] += times
    return found


def _in_sum(event: DpEvent, sums: Aggregation) -> DpEvent:
    if not isinstance(event, PoissonSampledDpEvent) or type(event.event) is not GaussianDpEvent:
        return event
    together = event.event.noise_multiplier * math.sqrt(sums.threshold)
    shared = SharedGaussianDpEvent(together, sums.threshold, sums.tolerated)
    return PoissonSampledDpEvent(event.sampling_probability, shared)


def in_words(colluding: int, *, sums: Aggregation | None) -> str:
    """Against whom an epsilon of `exposures` holds."""
    if colluding == ALL_OTHERS:
        return "the coordinator, whoever colludes with it"
    if colluding == 0:
        return "readers of the adapter, and the coordinator alone"
    assert sums is not None  # otherwise there is no such row
    sites = "1 site" if colluding == 1 else f"{colluding} sites"
    return f"the coordinator with {sites} of {sums.threshold} or more"


_CERTIFICATE = Signing("silotune certificate v2", "certificate", CertificateInvalid)

Noise = Literal["os_csprng", "seeded"]
Adjacency = Literal["add_remove_unit", "replace_site"]
_NOISE: Mapping[Noise, str] = {
    "os_csprng": "cryptographically secure, keyed by the operating system",
    "seeded": "seeded: repeatable by anyone who knows the seed",
}
_ACCOUNTANTS = {"pld": "silotune, privacy loss distributions (connect the dots)"}
# The accountant discretises and transforms: other machines may differ in the last digits only.
_TOLERANCE = 1e-6

_WHOLE_SITE = "whole site"  # with a space: no dataset's unit can be called that


class Mechanism(Document):
    """One kind of mechanism of the run, readable: how often, at which rate, with which noise.

    Attributes
    ----------
    event : str
        dp-accounting's event, as the ledger's canonical JSON; epsilon is computed from this.
    times : int
        How often it ran.
    rate : float
        Poisson sampling rate q; 1 when every unit took part.
    sigma : float
        Noise standard deviation over the sensitivity of the whole release.
    """

    event: str
    times: Annotated[int, Field(ge=1)]
    rate: Annotated[float, Field(gt=0.0, le=1.0)]
    sigma: Positive


class Bound(Document):
    """What one attack measured of the epsilon that is claimed against it.

    Attributes
    ----------
    claimed : float
        Epsilon of what was attacked: one step, or the run.
    lower_bound : float
        Epsilon is at least this, at the confidence beside it.
    canaries : int
        Planted, each in or out by a coin.
    """

    claimed: Annotated[float, Field(ge=0.0)]
    lower_bound: Annotated[float, Field(ge=0.0)]
    canaries: Annotated[int, Field(ge=1)]


class Measured(Document):
    """What was tried against the run, beside what is proven. A low bound proves nothing.

    Attributes
    ----------
    audit : Bound or None
        One step in gradient space.
    membership : Bound or None
        The finished adapter.
    confidence : float
        Of each bound on its own.
    """

    audit: Bound | None
    membership: Bound | None
    confidence: Annotated[float, Field(gt=0.0, lt=1.0)]


class CertificateBody(Document):
    """Everything that is signed: names, numbers and fixed terms. Sentences are made of them.

    Attributes
    ----------
    earlier : tuple of Mechanism
        Of a run that went on with an earlier adapter: what the dataset was charged before, all runs
        together.
    together : float or None
        Epsilon of that and the run's own mechanisms.
    """

    format: Literal["silotune certificate 2"] = "silotune certificate 2"
    site: str
    run: str
    dataset: str
    unit: str
    adjacency: Adjacency
    epsilon: Annotated[float, Field(ge=0.0)]
    delta: Positive
    mechanisms: tuple[Mechanism, ...]
    aggregation: Aggregation | None
    exposures: tuple[Exposure, ...]
    clips: dict[str, Positive]
    noise: Noise
    accountant: Literal["pld"] = "pld"
    accountant_version: str
    code_version: str
    plan_sha256: Sha256
    model_sha256: Annotated[Sha256 | None, ADDED_LATER] = None
    ledger_seq: Annotated[int, Field(ge=0)]
    ledger_head: Sha256
    measured: Measured | None = None
    earlier: Annotated[tuple[Mechanism, ...], ADDED_LATER] = ()
    together: Annotated[float | None, ADDED_LATER] = None
    time: str

    @property
    def private(self) -> bool:
        """Whether nobody could repeat the noise."""
        return self.noise != "seeded"

    @property
    def statement(self) -> str:
        """What is guaranteed, in a sentence; its epsilon is never below the true one."""
        if not self.private:
            return "seeded: not private"
        whom = (
            "all records of this site together"
            if self.adjacency == "replace_site"
            else f"every {self.unit} of this dataset"
        )
        shown = f"({_up(self.epsilon)}, {self.delta:g})-differential privacy for {whom}"
        if self.together is None:
            return shown
        return f"{shown}; with the runs before it, ({_up(self.together)}, {self.delta:g})"

    @property
    def adjacency_in_words(self) -> str:
        """Which datasets the guarantee makes hard to tell apart."""
        if self.adjacency == "replace_site":
            return "replace the records of this site by any others, all of them at once"
        if self.unit == "record":
            return "add or remove one record at this site"
        return f"add or remove one {self.unit}, with all its records, at this site"

    @property
    def noise_in_words(self) -> str:
        """Where the noise came from."""
        return _NOISE[self.noise]

    @property
    def accountant_in_words(self) -> str:
        """What computed epsilon."""
        return f"{_ACCOUNTANTS[self.accountant]} {self.accountant_version}"

    @property
    def exposed_to(self) -> list[tuple[str, float]]:
        """Against whom each epsilon of `exposures` holds, in words."""
        return [(in_words(e.colluding, sums=self.aggregation), e.epsilon) for e in self.exposures]


def _up(epsilon: float) -> str:
    """Never below the true one."""
    return f"{math.ceil(epsilon * 1e4) / 1e4:.4f}"


@dataclass(frozen=True)
class Verified:
    """A certificate that holds.

    Attributes
    ----------
    body : CertificateBody
        What it says.
    epsilon : float
        Recomputed from its events.
    key_sha256 : str
        `fingerprint` of the key that signed it, to be compared with the site's own word.
    """

    body: CertificateBody
    epsilon: float
    key_sha256: str


def issue(
    path: Path,
    *,
    ledger: Ledger,
    dataset: str,
    run: str,
    plan: Plan,
    site: str,
    model_sha256: str | None,
    secure_noise: bool,
    key: Ed25519PrivateKey,
) -> CertificateBody:
    """Write the signed certificate of a run, from what the ledger charged to it.

    Parameters
    ----------
    path : Path
        Where to; a certificate that is there is replaced.
    plan : Plan
        The run's plan, with ``privacy.mode`` other than ``'none'``.
    model_sha256 : str
        Identity of the base model's weights, in hex; None if no model took part.
    secure_noise : bool
        `NoiseSource.secure` of every source that was used; False makes it "seeded: not private".

    Raises
    ------
    CertificateInvalid
        Nothing was charged to the run under this plan, or by mechanisms that can't be described.
    """
    if plan.privacy.delta is None:
        raise CertificateInvalid("a plan without privacy has no certificate")
    tally, head = _charged(ledger, dataset, run=run, plan=plan), ledger.head
    body = CertificateBody(
        **_guarantee(tally, plan, plan.privacy.delta),
        **_ancestry(ledger, dataset, tally, run=run, plan=plan),
        noise="os_csprng" if secure_noise else "seeded",
        site=site,
        run=run,
        dataset=dataset,
        accountant_version=__version__,
        code_version=__version__,
        plan_sha256=plan.sha256,
        model_sha256=model_sha256,
        ledger_seq=head.seq,
        ledger_head=head.hash,
        time=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    _CERTIFICATE.write_file(path, body, key)
    return body


def add_measured(path: Path, measured: Measured, *, key: Ed25519PrivateKey) -> None:
    """Sign a site's certificate again, with what attacks measured beside what it claims.

    Raises
    ------
    CertificateInvalid
        The certificate there does not hold, or is another key's.
    """
    held = verify(path, key_sha256=fingerprint(key.public_key()))
    _CERTIFICATE.write_file(path, held.body.model_copy(update={"measured": measured}), key)


def _charged(ledger: Ledger, dataset: str, *, run: str, plan: Plan) -> Mapping[str, int]:
    tally = total(
        account.charged for account in ledger.runs(dataset) if _is_of(account, run=run, plan=plan)
    )
    if not tally:
        raise CertificateInvalid(f"the ledger has no charge of run {run!r} under this plan")
    return tally


def _is_of(account: RunAccount, *, run: str, plan: Plan) -> bool:
    return (account.run, account.plan_sha256) == (run, plan.sha256)


def _guarantee(tally: Mapping[str, int], plan: Plan, delta: float) -> dict[str, Any]:
    """The fields that state what is guaranteed, to whom and against whom, and by what."""
    sums = sums_of(plan)
    return {
        "unit": plan.privacy.unit if plan.per_unit else _WHOLE_SITE,
        "adjacency": "add_remove_unit" if plan.per_unit else "replace_site",
        "epsilon": epsilon_of(tally, delta=delta),
        "delta": delta,
        "mechanisms": _mechanisms(tally),
        "aggregation": sums,
        "exposures": exposures(tally, delta=delta, sums=sums),
        "clips": {name: b.norm for name, b in plan.privacy.clipping.bounds.items()},
    }


def _ancestry(
    ledger: Ledger, dataset: str, tally: Mapping[str, int], *, run: str, plan: Plan
) -> dict[str, Any]:
    """Of a run that went on with an adapter: what it cost with all that came before it here."""
    if plan.lora.start is None or plan.privacy.delta is None:
        return {}
    others = (a for a in ledger.runs(dataset) if not _is_of(a, run=run, plan=plan))
    before = total(account.charged for account in others)
    return {
        "earlier": _mechanisms(before),
        "together": epsilon_of(total([tally, before]), delta=plan.privacy.delta),
    }


def _mechanisms(tally: Mapping[str, int]) -> tuple[Mechanism, ...]:
    return tuple(_mechanism(leaf, times) for leaf, times in sorted(tally.items()))


def verify(path: Path, *, key_sha256: str | None = None) -> Verified:
    """Check a certificate offline: its signature, and its epsilon against its own events.

    Parameters
    ----------
    path : Path
        The certificate file.
    key_sha256 : str, optional
        `fingerprint` of the site's key, known from elsewhere. Without it the signature only shows
        that nothing was changed since; who signed is for the reader to compare.

    Raises
    ------
    CertificateInvalid
        With everything that disagrees.
    """
    return _held(*_CERTIFICATE.read_file(path, CertificateBody), str(path), key_sha256)


def verify_content(content: bytes, *, called: str, key_sha256: str | None = None) -> Verified:
    """`verify` for a certificate that is no file; errors call it what you say."""
    read = _CERTIFICATE.read_content(content, CertificateBody, called=called)
    return _held(*read, called, key_sha256)


def _held(
    body: CertificateBody, key: Ed25519PublicKey, called: str, key_sha256: str | None
) -> Verified:
    problems = []
    if key_sha256 is not None and key_sha256.lower() != fingerprint(key):
        problems.append(f"it was signed by another key, {fingerprint(key)}")
    try:
        stated = (*body.mechanisms, *body.earlier)
        described = tuple(_mechanism(part.event, part.times) for part in stated)
        events = _events(body.mechanisms)
        epsilon = epsilon_of(events, delta=body.delta)
        exposed = exposures(events, delta=body.delta, sums=body.aggregation)
        together = None
        if body.together is not None:
            together = epsilon_of(_events(stated), delta=body.delta)
    except CertificateInvalid:
        raise
    except Exception as exc:
        raise CertificateInvalid(f"{called}: an event in it can't be accounted for") from exc
    if not math.isclose(epsilon, body.epsilon, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE):
        problems.append(f"it says epsilon = {body.epsilon:.6g}, its events give {epsilon:.6g}")
    if together is not None and not math.isclose(
        together, body.together or 0.0, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE
    ):
        problems.append(f"it says {body.together:.6g} with earlier runs; it is {together:.6g}")
    if not _alike(exposed, body.exposures):
        problems.append("what it says of collusion is not what its events give")
    if described != stated:
        problems.append("a rate or sigma is not the one of its event")
    if (body.adjacency == "replace_site") != (body.unit == _WHOLE_SITE):
        problems.append("its adjacency is not the one of its unit")
    if problems:
        raise CertificateInvalid(f"{called}: {'; '.join(problems)}")
    return Verified(body=body, epsilon=epsilon, key_sha256=fingerprint(key))


def _events(stated: Iterable[Mechanism]) -> Mapping[str, int]:
    return total({part.event: part.times} for part in stated)


def _mechanism(leaf: str, times: int) -> Mechanism:
    """Describe one event of the ledger."""
    event, rate = from_json(leaf), 1.0
    if isinstance(event, PoissonSampledDpEvent):
        event, rate = event.event, event.sampling_probability
    if not isinstance(event, GaussianDpEvent | SharedGaussianDpEvent):
        raise CertificateInvalid("an event is not a Gaussian mechanism, sampled or not")
    return Mechanism(event=leaf, times=times, rate=rate, sigma=event.noise_multiplier)


def _alike(one: Sequence[Exposure], other: Sequence[Exposure]) -> bool:
    """Equal but for the accountant's last digits."""
    return [e.colluding for e in one] == [e.colluding for e in other] and all(
        math.isclose(a.epsilon, b.epsilon, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE)
        for a, b in zip(one, other, strict=True)
    )
