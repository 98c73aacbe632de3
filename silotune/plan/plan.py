"""The plan: what is to be trained, as a small, typed document.

A plan is data and nothing else (promise 2): frozen models with strict types, read from TOML, hashed
as canonical JSON. The hash is what sites approve and what every log carries. `plan_in_words` says what
will be trained, by whom, under which protection, and how.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from pydantic import ValidationError, model_validator

from silotune.errors import PlanInvalid, PlanUnreadable
from silotune.percents import said_percent
from silotune.plan.counted import statistics_in_words
from silotune.plan.document import text_sha256, with_settings
from silotune.plan.explain import explain
from silotune.plan.left_out import Number, left_out, settings_of
from silotune.plan.rules import conflicts
from silotune.plan.sections import Sections
from silotune.plan.voted import candidate_tables, vote_in_words


class Plan(Sections):
    """A whole plan. Build it with `Plan.load` or `Plan.from_mapping`."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if problems := conflicts(self):
            raise ValueError("\n".join(problems))
        return self

    @classmethod
    def load(cls, path: Path, settings: Mapping[str, Any] | None = None) -> Plan:
        """Read a plan from a TOML file, with what its author left out (`silotune.plan.left_out`).

        Parameters
        ----------
        path : Path
            The file.
        settings : mapping, optional
            Replace keys of the file, as in `override`, before what is left out is looked for.

        Raises
        ------
        PlanUnreadable
            No such file, or not TOML.
        PlanInvalid
            Unknown key, wrong type or impossible combination; the message lists every one.
        """
        written = cls.written_in(path, settings)
        return written.completed(left_out(written), source=str(path))

    @classmethod
    def written_in(cls, path: Path, settings: Mapping[str, Any] | None = None) -> Plan:
        """What an author wrote in a file and nothing else. Raises what `load` does."""
        try:
            raw = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as exc:
            raise PlanUnreadable(f"{path}: {exc.strerror or exc}") from exc
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
            raise PlanUnreadable(f"{path} is not valid TOML: {exc}") from exc
        return cls.from_mapping(raw, source=str(path)).override(settings or {})

    @classmethod
    def from_mapping(cls, raw: Mapping[str, Any], *, source: str = "plan") -> Plan:
        """Validate plain data, e.g. parsed TOML. Raises `PlanInvalid`."""
        try:
            # Strict JSON mode takes arrays as tuples, which strict Python mode refuses.
            return cls.model_validate_json(json.dumps(raw, default=str))
        except ValidationError as exc:
            listed = "\n".join(f"  - {line}" for line in explain(exc, cls))
            raise PlanInvalid(f"{source}:\n{listed}") from exc

    @classmethod
    def from_canonical(cls, text: str) -> Plan:
        """Read back what `canonical` wrote. Raises `PlanInvalid`."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as exc:
            raise PlanInvalid("the plan in the message is not valid") from exc

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the canonical text, in hex: the plan's identity."""
        return text_sha256(self.canonical())

    def override(self, settings: Mapping[str, Any]) -> Plan:
        """A new plan with dotted keys replaced (``None`` removes a key), validated again."""
        return self._with(settings, source="plan with overrides")

    def completed(self, numbers: Iterable[Number], *, source: str) -> Plan:
        """A new plan with what its author left out, validated again."""
        return self._with(settings_of(numbers), source=source)

    def _with(self, settings: Mapping[str, Any], *, source: str) -> Plan:
        if not settings:
            return self
        # Without the defaults: a key that nobody gave is not given afterwards.
        raw = self.model_dump(mode="json", exclude_none=True, exclude_unset=True)
        return Plan.from_mapping(with_settings(raw, settings), source=source)


def candidates_of(plan: Plan) -> tuple[Plan, ...]:
    """The plans that a vote is among, in their order."""
    return tuple(Plan.from_mapping(tables) for tables in candidate_tables(plan))


def schema() -> dict[str, Any]:
    """JSON schema of a plan."""
    return Plan.model_json_schema()


def dotted(tables: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A plan's tables as one: values by dotted key, as `Plan.override` takes them."""
    found: dict[str, Any] = {}
    for key, value in tables.items():
        if isinstance(value, Mapping):
            found |= dotted(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def plan_in_words(plan: Plan) -> list[tuple[str, str]]:
    """Pairs of a heading and one or two sentences, in the order a reader asks."""
    if plan.statistics is not None:
        return [
            ("Purpose", plan.plan.purpose),
            ("Statistics", statistics_in_words(plan)),
            ("Data", f"Every record of each site's dataset '{plan.data.dataset}'."),
            ("Rounds", f"One, with {_patience(plan)}."),
            ("Privacy", _privacy(plan)),
            ("Aggregation", f"The sites' sums are added.{_secure(plan)}"),
        ]
    if plan.vote is not None:
        return [
            ("Purpose", plan.plan.purpose),
            ("Vote", vote_in_words(plan)),
            ("Model", _model(plan)),
            ("Data", f"{_data(plan)} Held-out records take no part in the vote."),
            ("Rounds", f"One, with {_patience(plan)}."),
            ("Privacy", _privacy(plan)),
            ("Aggregation", f"The sites' votes are added.{_secure(plan)}"),
        ]
    return [
        ("Purpose", plan.plan.purpose),
        ("Model", _model(plan)),
        ("Adapter", _adapter(plan)),
        ("Data", _data(plan)),
        ("Rounds", _rounds(plan)),
        ("Optimizers", _optimizers(plan)),
        ("Privacy", _privacy(plan)),
        ("Aggregation", _aggregation(plan)),
    ]


def stored_plan_in_words(plan: Mapping[str, Any]) -> list[tuple[str, str]]:
    """`plan_in_words` of plain data; nothing if it is of a version that can't be read any more."""
    try:
        return plan_in_words(Plan.from_canonical(json.dumps(plan)))
    except PlanInvalid:
        return []


def stored_bands(plan: Mapping[str, Any]) -> int:
    """How many rounds are charged once, together, by a plan's plain data of any version."""
    return int((plan.get("privacy") or {}).get("bands") or 1)


def stored_finds(plan: Mapping[str, Any]) -> str:
    """`Plan.finds` of a plan's plain data of any version."""
    return "votes" if plan.get("vote") else "statistics" if plan.get("statistics") else ""


def notes_on(plan: Plan) -> list[str]:
    """What the plan leaves open and its author should know, in sentences."""
    if plan.rounds.min_sites > 1 or "min_sites" in plan.rounds.model_fields_set:
        return []
    return [
        "rounds.min_sites is not given, so a round counts with one site alone: its update is then "
        "the whole step. Say how many sites a round needs, even if it is 1"
    ]


def _model(plan: Plan) -> str:
    task = plan.task.learns.format(
        labels=_joined(plan.model.labels), text=_seen(plan), target=_target(plan)
    )
    weighed = [f"{label} {weight:g}" for label, weight in sorted(plan.model.class_weights.items())]
    if weighed:
        task += f", the loss weighed by {_joined(tuple(weighed))}"
    checked = " Its weights must have the plan's SHA-256." if plan.model.sha256 else ""
    bits = {"none": 32, "int8": 8, "nf4": 4}[plan.model.quantization]
    kept = f" Its frozen weights are kept in {bits} bits." if bits < 32 else ""
    return f"{plan.model.base}, tuned to {task}.{_chat(plan)}{checked}{kept}"


def _chat(plan: Plan) -> str:
    """By which template records are shown."""
    if (chat := plan.model.chat) is None:
        return ""
    whose = "the base model's own" if chat.template == "base" else "the plan's"
    turns = "Prompt and response are" if chat.records == "prompts" else "Each record is"
    system = f" It begins with: {chat.system!r}." if chat.system else ""
    return f" {turns} shown as a chat, by {whose} template; only assistants' turns are learned.{system}"


def _target(plan: Plan) -> str:
    """The range of a number that is learned."""
    target = plan.model.target
    return "" if target is None else f"from {target.lower:g} to {target.upper:g}"


def _seen(plan: Plan) -> str:
    """What the head is given."""
    seen = "image" if plan.task.sees else "text"
    if (chosen := plan.model.head_features) is None:
        return seen
    return f"{seen}, through {chosen.number:,} fixed random cosines (scale {chosen.scale:g})"


def _joined(names: tuple[str, ...]) -> str:
    return " and ".join(part for part in (", ".join(names[:-1]), *names[-1:]) if part)


def _adapter(plan: Plan) -> str:
    lora = plan.lora
    modules = lora.target_modules
    if modules == "none":
        return "None: the head alone is trained."
    named = {"auto": "the attention's query and value", "all-linear": "all linear layers"}
    where = named[modules] if isinstance(modules, str) else _joined(modules)
    layers = f" in the last {lora.last_layers} layers" if lora.last_layers else ""
    frozen = " Only B is trained, A stays at its start (FFA)." if plan.freezes_a else ""
    scaled = ", scaled by its root: rsLoRA" if lora.scaling == "rslora" else ""
    begins = (
        f" It goes on with the adapter {lora.start.sha256[:12]}… of {lora.start.adapter}, whose cost at "
        "a site adds up with this run's."
        if lora.start
        else ""
    )
    return (
        f"LoRA of rank {lora.r} (alpha {lora.alpha:g}{scaled}) on {where}{layers}.{frozen}{begins}"
    )


def _data(plan: Plan) -> str:
    data = plan.data
    train = 1 - data.test_share - data.validation_share
    whole = "each privacy unit" if data.split_by == "unit" else "each group"
    windows = f"{data.max_windows} windows of " if plan.task.each_token else ""
    texts = f"texts of up to {windows}{data.max_length} tokens"
    size = "images" if plan.task.sees else texts
    return (
        f"Each site's dataset '{data.dataset}', {size}; {said_percent(train)} to train, "
        f"{said_percent(data.validation_share)} to validate, {said_percent(data.test_share)} to test, "
        f"with {whole} on one side only."
    )


def _rounds(plan: Plan) -> str:
    rounds, head = plan.rounds, plan.head_rounds
    steps = "one step" if rounds.local_steps == 1 else f"{rounds.local_steps} local steps"
    first = f" The first {head} train" if head < rounds.number else " All train"
    first = f"{first} the head alone, on features computed once." if head else ""
    where = "each site" if rounds.sites is None else f"each of {rounds.sites} sites drawn for it"
    return f"{rounds.number} rounds of {steps} at {where}, with {_patience(plan)}.{first}"


def _patience(plan: Plan) -> str:
    rounds = plan.rounds
    sites = f"{rounds.min_sites} site{'s' * (rounds.min_sites > 1)}"
    return f"at least {sites} answering within {rounds.deadline:g} s"


def _optimizers(plan: Plan) -> str:
    site, server = plan.optimizer.site, plan.optimizer.server
    head = f", head {site.head_lr:g}" if plan.task.has_head else ""
    rates = f"learning rates: adapter {site.adapter_lr:g}{head}, {site.schedule} schedule"
    name = {"none": "as it is", "sgd": "by SGD with momentum", "adam": "by Adam"}[server.name]
    scaled = "" if server.lr == 1 else f", scaled by {server.lr:g}"
    rates += _averaged(plan)
    if plan.rounds.local_steps == 1:
        return f"The server applies the sites' summed gradients {name}{scaled}; {rates}."
    return (
        f"Each site trains with {site.local}, and the server applies the mean change "
        f"{name}{scaled}; {rates}."
    )


def _averaged(plan: Plan) -> str:
    server = plan.optimizer.server
    kinds = {"ema": "an exponential mean", "uniform": "the mean"}
    if server.average == "none":
        return ""
    return (
        f". The run ends with {kinds[server.average]} of the adapters of its last "
        f"{said_percent(server.average_share)} of rounds"
    )


def _seeded(plan: Plan) -> str:
    return "" if plan.plan.seed is None else " The noise is seeded, so the run is not private."


def _correlated(plan: Plan) -> str:
    """How the noise of rounds is correlated, and what that asks of sampling and of sites."""
    bands = plan.privacy.bands
    if bands == 1:
        return ""
    earlier = "one" if bands == 2 else str(bands - 1)
    return (
        f" Noise is correlated over {bands} rounds: each takes back a part of what the {earlier} "
        f"before it added. So a {plan.privacy.unit} can be drawn in one of any {bands} rounds in a row "
        f"only, {bands} times as often, and is charged once for all of them; each site keeps its own "
        "noise of these rounds, sealed."
    )


def _site_privacy(plan: Plan) -> str:
    privacy = plan.privacy
    assert privacy.site is not None and privacy.epsilon is not None and privacy.delta is not None
    who = (
        "The coordinator adds the noise and sees the sites' updates without it: it must be trusted."
        if plan.trusts_coordinator
        else "Each site adds noise to its own update, so nobody need be trusted."
    )
    norm = f"{privacy.clipping.norm:g}"
    norm = f"starting at {norm} and adapting" if privacy.clipping.adapts else norm
    return (
        f"At most epsilon {privacy.epsilon:g} at delta {privacy.delta:g} for all records of a site "
        f"together; whole updates clipped to norm {norm}. {who}{_seeded(plan)}"
    )


def _privacy(plan: Plan) -> str:
    privacy = plan.privacy
    if privacy.mode == "site":
        return _site_privacy(plan)
    if not plan.private:
        return "None: updates are sent as they are. Use it only with records that may be public."
    assert privacy.epsilon is not None  # a validated private plan has both
    assert privacy.delta is not None
    clipping, delta = privacy.clipping, f"{privacy.delta:g}".replace("e-0", "e-")
    norms = (
        " and ".join(f"{name} {bound.norm:g}" for name, bound in clipping.bounds.items())
        + ", as one mechanism"
        if clipping.grouped
        else f"{clipping.norm:g}"
    )
    sampled = (
        f"{privacy.rate:.3g} of the units"
        if privacy.rate is not None
        else f"about {privacy.batch} units"
    )
    metrics = (
        f" {said_percent(privacy.metrics_share)} of it pays for noisy metrics."
        if privacy.metrics_share
        else " No metric is released."
    )
    shared = (
        f" Each site adds 1/{plan.aggregation.threshold} of the noise's variance: the sum over so many "
        "honest sites has the noise of pooled training."
        if privacy.noise == "shared"
        else ""
    )
    promised = f"At most epsilon {privacy.epsilon:g} at delta {delta} for each {privacy.unit}; "
    if plan.statistics is not None:
        return f"{promised}all that one adds has length 1 at most.{shared}{_seeded(plan)}"
    if plan.vote is not None:
        return (
            f"{promised}this pays for the vote and all that is trained for it; training by what it "
            f"chooses is charged anew.{shared}{_seeded(plan)}"
        )
    return (
        f"{promised}gradients clipped to {norms}; each step samples {sampled}.{_correlated(plan)}"
        f"{shared}{metrics}"
        f"{_seeded(plan)}"
    )


def _aggregation(plan: Plan) -> str:
    weights = {
        "declared": "weighted by the sizes that the sites declare",
        "equal": "every site weighing the same",
    }
    found = f"{plan.aggregation.strategy}, {weights[plan.aggregation.weights]}."
    return found + _secure(plan)


def _secure(plan: Plan) -> str:
    aggregation = plan.aggregation
    if not aggregation.secure:
        return ""
    needed = aggregation.threshold or "more than two thirds"
    return (
        f" Under secure aggregation, in {aggregation.encoding}: the coordinator sees the sum over at "
        f"most {aggregation.cohort} sites and no update; a round that fewer than {needed} of them come "
        "through is void."
    )
