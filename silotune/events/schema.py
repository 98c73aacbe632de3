"""The event schema: what happens in a run or a federation, as small frozen records.

One schema stands behind everything that tells what happened: ``events.jsonl`` of a simulation, the
coordinator's store, the gRPC stream, the dashboard, webhooks and alerts. An event is one flat JSON
object with ``time``, ``event`` (its kind) and the fields of its kind; the store adds ``id``, which
grows with every event, so that a watcher can go on where it stopped.

Rules that keep readers and writers of different versions together:

- a kind never changes its meaning, and no field is ever removed or retyped;
- new kinds and new optional fields may come; readers keep what they don't know;
- `SCHEMA_VERSION` grows when a kind or field is added. A line without ``v`` is of version 1.

``docs/events.md`` is generated from these classes (`silotune events --markdown`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from silotune.errors import EventMalformed

SCHEMA_VERSION = 1
"""Version of the schema that this package writes."""

STATISTICS_FORMAT = "silotune statistics 1"
"""Of the figures that a statistics run finds, in their event and in statistics.json."""

VOTES_FORMAT = "silotune votes 1"
"""Of what a vote comes to, in its event and in votes.json."""

Number = float | None
"""A figure; null where it was not finite or is not known."""

Phase = Literal["masked", "unmasked"]
"""Where a site is in a secure round: its masked update is there; it helped to remove the masks."""


class Event(BaseModel):
    """What every event has; also the class of a kind that this version does not know."""

    model_config = ConfigDict(frozen=True, extra="allow")

    time: float = Field(description="Unix time at which it was recorded.")
    event: str = Field(description="The kind.")
    id: int | None = Field(None, description="Grows with every event of a store.")
    run: str | None = Field(None, description="The run's name; absent where the file says it.")

    def as_dict(self) -> dict[str, Any]:
        """Flat JSON data, with what was given and nothing else."""
        return self.model_dump(mode="json", exclude_unset=True)


class SiteEvent(Event):
    """Of one site."""

    site: str


class RoundEvent(Event):
    """Of one round."""

    round: int


class SiteRoundEvent(SiteEvent):
    """Of one site in one round."""

    round: int


# --- a run's life ---


class RunProposed(Event):
    """A plan was signed and published; the sites are asked."""

    event: Literal["run_proposed"]
    plan_sha256: str = Field(description="Hash that the sites approve.")
    rounds: int = Field(0, description="Rounds planned.")
    sites: tuple[str, ...] = Field((), description="Sites that are asked.")


class PlanApproved(SiteEvent):
    """A site approves the plan."""

    event: Literal["plan_approved"]
    reason: str = ""


class PlanRejected(SiteEvent):
    """A site rejects the plan."""

    event: Literal["plan_rejected"]
    reason: str = ""


class RunStarted(Event):
    """The run begins."""

    event: Literal["run_started"]
    sites: tuple[str, ...] = Field(description="Every site of the run.")
    rounds: int = Field(0, description="Rounds planned.")
    computing: str = Field(
        "", description="Device, type of matrix products and attention, chosen once for the run."
    )


class RunResumed(Event):
    """The run goes on after an interruption or a pause."""

    event: Literal["run_resumed"]
    from_round: int = Field(description="The last round that was finished before.")


class RunPaused(Event):
    """The operator holds the run before its next round."""

    event: Literal["run_paused"]
    round: int = 0


class RunStopped(Event):
    """The operator ended the run."""

    event: Literal["run_stopped"]
    round: int = 0


class RunFailed(Event):
    """The run can't go on."""

    event: Literal["run_failed"]
    code: str = Field(description="Error code (docs/errors.md).")
    detail: str = ""


class RunFinished(Event):
    """Every round is done."""

    event: Literal["run_finished"]
    rounds: int
    seconds: Number = Field(None, description="Wall time since this process began the run.")


class WorkerReady(Event):
    """A worker process of a simulation is up."""

    event: Literal["worker_ready"]
    worker: int
    seconds: Number = None


class BaselineFinished(Event):
    """A simulation's comparison model is trained."""

    event: Literal["baseline_finished"]
    title: str
    number: int
    of: int
    seconds: Number = None


# --- sites in a run ---


class SiteJoined(SiteEvent):
    """A site is in; it says what it declared and how it will add noise."""

    event: Literal["site_joined"]
    declared_units: int | None = None
    rate: Number = Field(None, description="Sampling rate q of its mechanism.")
    sigma: Number = Field(None, description="Noise multiplier of its mechanism.")
    dtype: str = Field(
        "", description="Number format that it computes in; 'auto' is its machine's."
    )


class SiteRefused(SiteEvent):
    """A site refuses to join."""

    event: Literal["site_refused"]
    code: str = Field("", description="Error code; the detail stays at the site.")
    detail: str = ""


class SitePhase(SiteRoundEvent):
    """A site came to another phase of a secure round."""

    event: Literal["site_phase"]
    phase: Phase


class SiteReplied(SiteRoundEvent):
    """A site's update arrived and counts."""

    event: Literal["site_replied"]
    bytes: int | None = None
    train_seconds: Number = Field(None, description="Known to simulations only.")


class SiteFailed(SiteRoundEvent):
    """A site's part of a round is lost."""

    event: Literal["site_failed"]
    code: str = ""
    detail: str = ""
    phase: str = Field("", description="Where in a secure round: keys, share, masked, check, open.")


# --- rounds ---


class RoundStarted(RoundEvent):
    """A round begins; a second one of the same number replaces the first."""

    event: Literal["round_started"]
    phase: str = Field("", description="What is trained: head or adapter; or statistics.")
    cohort: tuple[str, ...] = ()


class RoundSaved(RoundEvent):
    """A round's result is durable: recorded in the very transaction that keeps its adapter."""

    event: Literal["round_saved"]
    sha256: str = Field(description="SHA-256 of the adapter's file.")
    bytes: int = Field(description="Size of that file.")


class RoundFinished(RoundEvent):
    """A round in figures."""

    event: Literal["round_finished"]
    seconds: Number = None
    wait_seconds: Number = None
    aggregate_seconds: Number = None
    train_seconds: Number = Field(None, description="Summed over sites; simulations only.")
    bytes_up: int = Field(0, description="Bytes of the updates.")
    bytes_down: int = Field(0, description="Bytes sent to the sites.")
    update_norm: Number = None
    epsilon: dict[str, Number] = Field(
        {}, description="Spent so far, by site that the round asked, where permitted."
    )
    anomaly: dict[str, Number] = Field(
        {}, description="How unlike the others each site's update is, where updates are visible."
    )
    exchanges: int | None = Field(None, description="Waits for the sites, of a secure round.")
    saturated: int | None = Field(
        None, description="Numbers that the sites of a secure round set to their bound, summed."
    )


class RoundVoid(RoundEvent):
    """A round came to nothing: the adapter stays, and the next round goes on."""

    event: Literal["round_void"]
    code: str = ""
    detail: str = ""


class Evaluated(RoundEvent):
    """Scores after a round."""

    event: Literal["evaluated"]
    view: Literal["simulator", "released"] = Field(
        description="The simulator's own look, or sums that sites released under privacy."
    )
    split: str = ""
    pooled: dict[str, Number] = {}
    sites: dict[str, dict[str, Number]] = {}
    left_out: tuple[str, ...] = Field(
        (),
        description="Sites of the run that are not in these figures: they are not in the run, have no "
        "record in the split, or gave no answer in time.",
    )


class StatisticsReleased(Event):
    """What a statistics run found, all of it: the content of statistics.json."""

    event: Literal["statistics"]
    found: dict[str, Any] = Field(description="See docs/statistics.md.")


class VotesReleased(Event):
    """What a vote came to, all of it: the content of votes.json."""

    event: Literal["votes"]
    found: dict[str, Any] = Field(description="See docs/plans.md.")


# --- the federation ---


class SiteSilent(SiteEvent):
    """A site's daemon has sent no sign of life for too long."""

    event: Literal["site_silent"]
    seconds: Number = Field(None, description="Age of its last heartbeat.")


class SiteBack(Event):
    """A silent site is back."""

    event: Literal["site_back"]
    site: str


class EnrolmentRequested(SiteEvent):
    """Somebody asks to be let in under a site's name."""

    event: Literal["enrolment_requested"]
    words: str = Field("", description="Six words for two people to compare.")


class OperatorAction(Event):
    """A person did something, or was not allowed to."""

    event: Literal["operator_action"]
    who: str = Field(
        description="A person's name, or an account at the command line: `root (uid 0)`."
    )
    role: str
    action: str
    target: str = ""
    outcome: str = Field("done", description="`done`, or the code of the refusal.")


class Alarm(Event):
    """Something that only an attack or a mistake explains."""

    event: Literal["alarm"]
    kind: str
    site: str = ""
    detail: str = ""


KINDS: tuple[type[Event], ...] = (
    *(RunProposed, PlanApproved, PlanRejected, RunStarted, RunResumed, RunPaused, RunStopped),
    *(RunFailed, RunFinished, WorkerReady, BaselineFinished),
    *(SiteJoined, SiteRefused, SitePhase, SiteReplied, SiteFailed),
    *(
        RoundStarted,
        RoundSaved,
        RoundFinished,
        RoundVoid,
        Evaluated,
        StatisticsReleased,
        VotesReleased,
    ),
    *(SiteSilent, SiteBack, EnrolmentRequested, OperatorAction, Alarm),
)
"""Every kind of this version, in the order of the documentation."""


def kind_of(model: type[Event]) -> str:
    """The word that an event of this class carries in ``event``."""
    return str(get_args(model.model_fields["event"].annotation)[0])


_BY_KIND = {kind_of(model): model for model in KINDS}


def parse(row: Mapping[str, Any]) -> Event:
    """Read an event.

    Parameters
    ----------
    row : mapping
        A line of ``events.jsonl``, a row of the store or a message of the stream, as JSON data.

    Returns
    -------
    Event
        Of its kind's class; of `Event` itself if this version does not know the kind.

    Raises
    ------
    EventMalformed
        It names the fields, and never quotes their values.
    """
    model = _BY_KIND.get(str(row.get("event")), Event)
    try:
        return model.model_validate(row)
    except ValidationError as exc:
        wrong = sorted({".".join(map(str, error["loc"])) for error in exc.errors()})
        kind = str(row.get("event"))[:40]
        raise EventMalformed(f"{kind}: {', '.join(wrong)[:300]}") from exc


def written(kind: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """An event as it is written down: nothing that readers of the schema could not read.

    Raises
    ------
    EventMalformed
        There is no such kind, or the fields (`time` among them) are not its own.
    """
    event = {"time": fields.get("time"), "event": kind, **fields}
    if kind not in _BY_KIND:
        raise EventMalformed(f"{kind[:40]}: there is no such kind")
    parse(event)
    return event


_TOLD_APART = ("id", "time", "event")


def in_a_line(event: Mapping[str, Any], *, hidden: Collection[str] = ()) -> str:
    """Time, kind, and every field that says something, but for the `hidden` ones."""
    fields = "  ".join(
        f"{key}={_short(value)}"
        for key, value in event.items()
        if key not in _TOLD_APART and key not in hidden and value not in ("", None)
    )
    when = f"{datetime.fromtimestamp(event['time'], UTC):%H:%M:%S}"
    return f"{when}  {event['event']:<15} {fields}"


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ",".join(str(item) for item in value)
    if isinstance(value, dict) and any(isinstance(part, dict | list) for part in value.values()):
        return f"{len(value)} figures"  # of a document, which is no line
    return str(value)
