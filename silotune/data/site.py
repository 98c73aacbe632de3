"""site.toml: who a site is and which datasets it offers, under the site's own terms.

Everything here is the site's word. What a plan may assume about a site (`declared_units`, the name
of the privacy unit) is public by declaration; where the records are and how to reach them is not,
and a database URL is never printed.

A clause of ``[policy]`` that is left out allows nothing. So a new clause of a later version refuses
until somebody at the site has decided about it. Others on the machine must not be able to change a
site's configuration or its state: `load_guarded` sees to it.
"""

from __future__ import annotations

import codecs
import json
import os
import re
import tomllib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, time, timedelta
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import quote, unquote

from pydantic import AfterValidator, Field, PrivateAttr, SecretStr, ValidationError, model_validator

from silotune.data.augmentation import AugmentationConfig
from silotune.data.columns import LISTS, Column, ColumnsConfig
from silotune.data.values import Rule, canonical
from silotune.errors import DatasetUnknown, SiteConfigInvalid
from silotune.plan.explain import explain
from silotune.plan.plan import Plan
from silotune.plan.sections import Name, Positive, Section, Share
from silotune.trust.files import require_private_tree, require_unwritable
from silotune.trust.vault import AtRest

_DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_HOURS = re.compile(r"(\w{3})(?:-(\w{3}))? (\d\d):(\d\d)-(\d\d):(\d\d)")
_DAY = 24 * 60

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Words = tuple[Annotated[str, Field(min_length=1)], ...]


@dataclass(frozen=True)
class Window:
    """A time of the week in which training is allowed, in the machine's local time.

    Attributes
    ----------
    days : frozenset of int
        Days on which it begins, Monday is 0.
    start, length : int
        Minutes after midnight, and how many minutes from there on, perhaps into the next day.
    """

    days: frozenset[int]
    start: int
    length: int

    def holds(self, moment: datetime) -> bool:
        """Whether `moment` is within it."""
        minutes = moment.hour * 60 + moment.minute
        today = moment.weekday() in self.days and self.start <= minutes < self.start + self.length
        yesterday = (moment.weekday() - 1) % 7 in self.days
        return today or (yesterday and minutes + _DAY < self.start + self.length)

    def next_start(self, moment: datetime) -> datetime:
        """When it begins next, after `moment`."""
        at = time(self.start // 60, self.start % 60)
        days = (moment.date() + timedelta(days=n) for n in range(8))
        starts = (datetime.combine(day, at, moment.tzinfo) for day in days)
        return next(s for s in starts if s.weekday() in self.days and s > moment)


def parse_window(text: str) -> Window:
    """Read ``"Mon-Fri 19:00-07:00"`` or ``"Sun 00:00-24:00"``.

    Raises
    ------
    ValueError
        It has another form.
    """
    match = _HOURS.fullmatch(text)
    if match is None or match[1] not in _DAYS or (match[2] or match[1]) not in _DAYS:
        raise ValueError(f'{text!r} is not of the form "Mon-Fri 19:00-07:00"')
    first, last = _DAYS.index(match[1]), _DAYS.index(match[2] or match[1])
    days = frozenset((first + n) % 7 for n in range((last - first) % 7 + 1))
    hour, minute, end_hour, end_minute = (int(match[n]) for n in range(3, 7))
    start, end = hour * 60 + minute, end_hour * 60 + end_minute
    if max(minute, end_minute) > 59 or start >= _DAY or end > _DAY:
        raise ValueError(f"{text!r}: a time is between 00:00 and 24:00")
    return Window(days, start, (end - start) % _DAY or _DAY)


def _hours(text: str) -> str:
    parse_window(text)
    return text


class PolicyConfig(Section):
    """``[policy]``: what a plan may ask of this site; a key that is left out allows nothing."""

    approval: Literal["manual", "auto"] = Field(
        "manual", description="Whether a person must approve each plan that passes."
    )
    max_epsilon: Positive | None = Field(None, description="Of one run.")
    max_total_epsilon: Positive | None = Field(None, description="Of all runs on a dataset.")
    max_delta: Annotated[float, Field(gt=0.0, lt=0.01)] | None = None
    allow_large_delta: bool = Field(
        False, description="Accept a delta at or above 1/declared_units, which promises little."
    )
    require_privacy: bool = Field(True, description="Refuse plans without differential privacy.")
    allow_seeded_noise: bool = Field(
        False, description="Accept plans whose noise can be repeated: such runs are not private."
    )
    require_secure_aggregation: bool = True
    min_cohort: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Sites that must take part in every round."
    )
    base_models: dict[Sha256, Annotated[str, Field(min_length=1)]] = Field(
        {}, description="SHA-256 of the weights, and the folder or cached hub id here."
    )
    tasks: Words = ()
    target_modules: Words = ()
    strategies: Words = ()
    max_rounds: Annotated[int, Field(ge=1)] | None = None
    max_upload_mb: Positive | None = Field(None, description="Millions of bytes a round.")
    hours: tuple[Annotated[str, AfterValidator(_hours)], ...] = Field(
        (), description="When training is allowed, in local time."
    )

    @property
    def windows(self) -> tuple[Window, ...]:
        """`hours`, read."""
        return tuple(parse_window(text) for text in self.hours)


ProtectionName = Literal[
    "no_new_privileges",
    "user_namespace",
    "network_namespace",
    "ipc_namespace",
    "capabilities",
    "memory_hidden",
    "memory_limit",
    "process_limit",
    "landlock_files",
    "landlock_network",
    "landlock_scopes",
    "seccomp",
]
"""What may confine the process that reads records; `client/isolation` has each."""


class IsolationConfig(Section):
    """``[isolation]``: what must confine the process that reads records."""

    require: tuple[ProtectionName, ...] = Field(
        (), description="Without these the site does not start; without others it warns."
    )


class ResourcesConfig(Section):
    """``[resources]``: what the trainer, which reads the records, may use of this machine."""

    threads: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Processor threads; PyTorch's own choice when absent."
    )
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"
    devices: Annotated[int, Field(ge=1, le=64)] | None = Field(
        None, description="GPUs that share a step, a process each; all when absent."
    )
    memory_mb: Annotated[int, Field(ge=512)] | None = Field(
        None, description="Memory of the trainer; a step that needs more fails and sends nothing."
    )
    keep_warm: Annotated[float, Field(ge=0.0, le=86400.0)] = Field(
        900.0, description="Seconds that the trainer is kept when nothing is asked of it."
    )
    max_rank: Annotated[int, Field(ge=1)] | None = Field(
        None,
        description="PUBLIC. Largest adapter rank; for strategies that let ranks differ by site.",
    )

    @model_validator(mode="after")
    def _one_device_is_one(self) -> Self:
        if ":" in self.device and self.devices not in (None, 1):
            raise ValueError(f"devices has no meaning where device is '{self.device}'; remove one")
        return self


Format = Literal[
    "csv", "jsonl", "json", "parquet", "arrow", "excel", "sql",
    "fhir", "i2b2", "camt053", "ofx", "dicom_sr",
]  # fmt: skip
Resource = Literal["DocumentReference", "DiagnosticReport", "Condition", "Observation"]

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")

# Keys of a dataset that mean something in some formats only.
_MEANT_FOR: dict[str, tuple[Format, ...]] = {
    "delimiter": ("csv",),
    "decimal": ("csv",),
    "encoding": ("csv", "jsonl", "json"),
    "skip_rows": ("csv", "excel"),
    "sheet": ("excel",),
    "resource": ("fhir",),
}


def _encoding(name: str) -> str:
    try:
        known = codecs.lookup(name)
    except LookupError:
        raise ValueError(f"{name!r} is no encoding that Python knows, such as cp1252") from None
    if not known._is_text_encoding:
        raise ValueError(f"{name!r} is no encoding of text")
    return known.name


# Roles that would not follow when words of a text are changed.
_FIXED = (LISTS - {"words", "labels"}) | {"image"}


class BudgetConfig(Section):
    """``[datasets.NAME.budget]``: what the ledger of this dataset may reach, all runs together."""

    epsilon: Positive
    delta: Annotated[float, Field(gt=0.0, lt=0.01)]
    colluding_epsilon: Positive | None = Field(
        None, description="What it may reach if the coordinator colludes with all other sites."
    )


class DatasetConfig(Section):
    """``[datasets.NAME]``: where the records are and on which terms they are offered."""

    format: Format
    path: Annotated[str, Field(min_length=1)] | None = None
    delimiter: Literal[",", ";", "\t", "|"] = ","
    encoding: Annotated[str, AfterValidator(_encoding)] = Field(
        "utf-8", description="Of text files: 'cp1252', 'utf-16', ... as Python names it."
    )
    skip_rows: Annotated[int, Field(ge=0)] = Field(0, description="Rows before the header.")
    decimal: Literal[".", ","] = Field(".", description="What numbers of a CSV file have.")
    sheet: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="Of a workbook; its first sheet when absent."
    )
    resource: Resource = Field(
        "DocumentReference", description="Of a FHIR export: which resources are records."
    )
    values: Rule | None = Field(
        None,
        description="By which rule values become text; by the newest one that this site's split "
        "began with when absent.",
    )
    url: SecretStr | None = Field(
        None, description="SQLAlchemy URL; ${VARIABLE} is taken from the environment."
    )
    query: Annotated[str, Field(min_length=1)] | None = None
    images: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="The folder of the images that columns.image names: no other is opened."
    )
    columns: ColumnsConfig
    numbers: dict[Name, Column] = Field(
        {}, description="Numeric columns whose statistics plans may ask for, by a name for plans."
    )
    unit: Name = Field(
        "record", description="'record', or what one value of columns.unit is: 'patient'."
    )
    declared_units: Annotated[int, Field(ge=1)] = Field(
        description="Number of units, rounded: the public number that weights and rates use."
    )
    max_records_per_unit: Annotated[int, Field(ge=1)] = 1
    labels: Words | dict[Column, str] = Field(
        (),
        description="PUBLIC. Labels that records have; others are left out. Or what the column says, "
        "and the label that it means; records that it means none of ('') are left out.",
    )
    label_separator: Annotated[str, Field(min_length=1, max_length=8)] | None = Field(
        None, description="What stands between two labels in columns.labels, where it is no list."
    )
    max_held_out: Share = Field(
        0.5, description="Most that a plan may hold out for validation and test together."
    )
    budget: BudgetConfig | None = None
    augmentation: AugmentationConfig | None = None

    @property
    def declared_labels(self) -> tuple[str, ...]:
        """The labels that records have, by the names that plans use."""
        if isinstance(self.labels, tuple):
            return self.labels
        return tuple(label for label in dict.fromkeys(self.labels.values()) if label)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        problems = [*self._source_conflicts(), *self._unit_conflicts()]
        if (same := self.same_label(self.labels)) is not None:
            problems.append(f"labels: {same}")
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def same_label(self, labels: Collection[str]) -> str | None:
        """What is wrong if two labels are one value under the rule of the dataset's values."""
        if self.values == 1:
            return None
        seen: dict[str, str] = {}
        for label in labels:
            other = seen.setdefault(canonical(label), label)
            if other != label:
                return f"{other!r} and {label!r} are one value; values = 1 tells them apart"
        return None

    def _source_conflicts(self) -> list[str]:
        wanted = ("url", "query") if self.format == "sql" else ("path",)
        found = []
        for key in ("path", "url", "query"):
            given = getattr(self, key) is not None
            if given and key not in wanted:
                found.append(f"{key} has no meaning when format is '{self.format}'; remove it")
            if not given and key in wanted:
                found.append(f"{key} is needed when format is '{self.format}'")
        for key, formats in _MEANT_FOR.items():
            if key in self.model_fields_set and self.format not in formats:
                listed = " or ".join(f"'{name}'" for name in formats)
                found.append(f"{key} is for format {listed} only; remove it")
        return found

    def _unit_conflicts(self) -> list[str]:
        found = []
        fixed = [role for role in self.columns.by_role() if role in _FIXED]
        if self.augmentation is not None and fixed:
            found.append(f"augmentation changes words, which {fixed[0]} would not follow")
        if (self.images is None) != (self.columns.image is None):
            found.append("images is the folder of what columns.image names: give both, or neither")
        if self.label_separator is not None and self.columns.labels is None:
            found.append(
                "label_separator stands between the labels of columns.labels: name that column"
            )
        if self.unit == "record" and self.columns.unit is not None:
            found.append('unit must say what one value of columns.unit is, e.g. "patient"')
        if self.unit != "record" and self.columns.unit is None:
            found.append(f"columns.unit is needed when unit is '{self.unit}'")
        if self.unit == "record" and self.max_records_per_unit != 1:
            found.append("max_records_per_unit must be 1 when unit is 'record'")
        return found


class SiteConfig(Section):
    """A whole site.toml. Read it with `SiteConfig.load`.

    Attributes
    ----------
    name : str
        The site's name in every log and report.
    state_dir : str or None
        Folder of the site's private state (ledger, outbox, certificates); see `state_folder`.
    share_certificates : bool
        Hand the privacy certificate of each run to the coordinator when the run is over.
    allow_attacks : bool
        Let `silotune simulate --attack` train on these records again and attack the result.
    datasets : dict of str to DatasetConfig
        What the site offers, by the name that a plan asks for.
    policy : PolicyConfig or None
        What a plan may ask. Without one a site can be simulated, and its daemon doesn't start.
    resources : ResourcesConfig
        What the trainer may use of the machine.
    isolation : IsolationConfig
        What must confine the process that reads records.
    at_rest : AtRest
        What opens the sealed files of the state.
    """

    name: Name
    state_dir: Annotated[str, Field(min_length=1)] | None = None
    share_certificates: bool = False
    allow_attacks: bool = True
    datasets: dict[Name, DatasetConfig] = Field(min_length=1)
    policy: PolicyConfig | None = None
    resources: ResourcesConfig = ResourcesConfig()
    isolation: IsolationConfig = IsolationConfig()
    at_rest: AtRest = AtRest()
    _folder: Path = PrivateAttr(default=Path())
    _file: Path | None = PrivateAttr(default=None)

    @classmethod
    def load(cls, path: Path) -> SiteConfig:
        """Read a site's configuration from a TOML file.

        Raises
        ------
        SiteConfigInvalid
            No such file, not TOML, or an unknown or wrong setting; the message lists every one.
        """
        try:
            raw = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as exc:
            raise SiteConfigInvalid(
                f"{path.absolute()}: {exc.strerror or type(exc).__name__}",
                remedy="Name the file by --config, or write it; examples/site.toml explains each key.",
            ) from exc
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
            raise SiteConfigInvalid(f"{path} is not valid TOML: {exc}") from exc
        site = cls.from_mapping(raw, folder=path.parent, source=str(path))
        site._file = path.absolute()
        return site

    @classmethod
    def from_mapping(
        cls, raw: Mapping[str, Any], *, folder: Path = Path(), source: str = "site"
    ) -> SiteConfig:
        """Validate plain data; paths in it are relative to `folder`. Raises `SiteConfigInvalid`."""
        try:
            site = cls.model_validate_json(json.dumps(raw, default=str))
        except ValidationError as exc:
            listed = "\n".join(f"  - {line}" for line in explain(exc, cls))
            # The cause would carry the rejected input, and with it perhaps a database URL.
            raise SiteConfigInvalid(f"{source}:\n{listed}") from None
        site._folder = folder.resolve()
        return site

    @property
    def folder(self) -> Path:
        """Absolute folder that relative paths start from: where site.toml is."""
        return self._folder

    @property
    def file(self) -> Path | None:
        """Where it was read from, if from a file."""
        return self._file

    @property
    def state_folder(self) -> Path:
        """Absolute folder of the site's private state: ``state`` beside site.toml by default."""
        return self._folder / (self.state_dir or "state")

    def dataset(self, name: str) -> DatasetConfig:
        """The terms of one dataset. Raises `DatasetUnknown`."""
        try:
            return self.datasets[name]
        except KeyError:
            offered = ", ".join(sorted(self.datasets))
            raise DatasetUnknown(
                f"site {self.name!r} offers no dataset {name!r}; it offers: {offered}"
            ) from None

    def units_for(self, plan: Plan) -> int:
        """Units that it declares of the dataset that a plan asks for. Raises `DatasetUnknown`."""
        return self.dataset(plan.data.dataset).declared_units

    def images_of(self, dataset: DatasetConfig) -> Path:
        """The folder below which a dataset's images are."""
        assert dataset.images is not None  # validated beside columns.image
        return self.folder / dataset.images

    def model_place(self, plan: Plan) -> str:
        """Where the plan's base model is here: what the policy says of its hash, else the plan."""
        places = self.policy.base_models if self.policy else {}
        return places.get(plan.model.sha256 or "", plan.model.base)


def load_sites(folder: Path) -> tuple[SiteConfig, ...]:
    """Every site of a simulation: the subfolders of `folder` that hold a site.toml.

    Returns
    -------
    tuple of SiteConfig
        In the order of the folders' names.

    Raises
    ------
    SiteConfigInvalid
        No site there, one of them is wrong, or two have the same name.
    """
    sites = tuple(SiteConfig.load(path) for path in sorted(folder.glob("*/site.toml")))
    if not sites:
        raise SiteConfigInvalid(f"{folder}: no subfolder has a site.toml")
    names = [site.name for site in sites]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise SiteConfigInvalid(f"{folder}: two sites are named {', '.join(map(repr, twice))}")
    return sites


def declared_units(sites: Iterable[SiteConfig], dataset: str) -> dict[str, int]:
    """Units that each site declares which has a dataset, by its name."""
    return {s.name: s.datasets[dataset].declared_units for s in sites if dataset in s.datasets}


def expand_url(url: SecretStr) -> str:
    """The database URL with every ``${VARIABLE}`` taken from the environment.

    A URL that is one variable and nothing else is used as it is; inside a longer URL a value is
    percent-encoded, so that a password may have any character.

    Raises
    ------
    SiteConfigInvalid
        A variable is not set. The URL itself is never part of a message.
    """
    template = url.get_secret_value()
    whole = _VARIABLE.fullmatch(template) is not None

    def value(match: re.Match[str]) -> str:
        found = os.environ.get(match[1])
        if found is None:
            raise SiteConfigInvalid(f"url: the environment variable {match[1]} is not set")
        return found if whole else quote(found, safe="")

    return _VARIABLE.sub(value, template)


def load_guarded(path: Path) -> SiteConfig:
    """Read the site.toml of a real site.

    Raises
    ------
    SiteConfigInvalid
        It is missing or wrong.
    FileExposed
        As `require_guarded`.
    """
    site = SiteConfig.load(path)
    require_guarded(site)
    return site


def require_guarded(site: SiteConfig) -> None:
    """Refuse a site whose configuration or state is not in its own hands.

    Raises
    ------
    FileExposed
        Others may write site.toml or its folder, enter the state folder, or have put a link there.
    """
    if site.file is not None:
        require_unwritable(site.file)
    if site.state_folder.is_symlink() or site.state_folder.exists():
        require_private_tree(site.state_folder)


def sqlite_file(url: str, folder: Path) -> Path | None:
    """The file of a SQLite database, as SQLAlchemy reads its URL; None if there is none."""
    kind, _, rest = url.partition("://")
    database = unquote(rest.partition("?")[0].partition("/")[2])
    if kind.partition("+")[0] != "sqlite" or database in ("", ":memory:"):
        return None
    return folder / database
