"""The demonstration of letters: three hospitals whose discharge letters are made up here.

Nobody's letters are in it: a record is put together of a few lists of words, by hash, and says nothing
of anyone. What a model learns from it is a house's way of writing: from some facts to a letter to the
family doctor, and in a third of the records a second answer, in plain words for the patient.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from silotune.data.demo import Demo
from silotune.data.partition import (
    CommonTerms,
    read_template,
    refuse_other_sites,
    write_site,
)
from silotune.data.site import BudgetConfig
from silotune.plan.plan import Plan
from silotune.plan.written import toml_text

_NAMES = (
    "Abbott", "Barlow", "Carver", "Dunn", "Ellery", "Frost", "Garland", "Hale", "Ingram", "Jarvis",
    "Keating", "Lowe", "Marsh", "Norris", "Osborn", "Pryor", "Quill", "Rowan", "Seward", "Tilley",
    "Upton", "Vance", "Wilder", "Yardley",
)  # fmt: skip
_TITLES = ("Mr", "Ms", "Mrs")


@dataclass(frozen=True)
class House:
    """A hospital of the demonstration.

    Attributes
    ----------
    name : str
        Of its folder.
    title : str
        As its letters are signed.
    cases : tuple of tuple of str
        Diagnosis, what was done, and the diagnosis in plain words.
    drugs : tuple of str
        What it prescribes.
    """

    name: str
    title: str
    cases: tuple[tuple[str, str, str], ...]
    drugs: tuple[str, ...]


HOUSES = (
    House(
        "heart",
        "Heart Centre",
        (
            ("atrial fibrillation", "cardioversion", "your heart was out of rhythm"),
            ("stable angina", "coronary stent", "your heart got too little blood"),
            ("aortic stenosis", "valve replacement", "a valve of your heart was too narrow"),
            ("heart failure", "diuretic therapy", "your heart was too weak"),
            ("heart block", "pacemaker implantation", "your heart beat too slowly"),
            ("pericarditis", "anti-inflammatory therapy", "the skin of your heart was inflamed"),
        ),
        ("bisoprolol", "ramipril", "apixaban", "atorvastatin", "furosemide"),
    ),
    House(
        "bones",
        "Orthopaedic Clinic",
        (
            ("fracture of the femur", "intramedullary nailing", "your thigh bone was broken"),
            ("osteoarthritis of the hip", "hip replacement", "your hip joint was worn out"),
            ("torn meniscus", "knee arthroscopy", "a cushion in your knee was torn"),
            ("carpal tunnel syndrome", "nerve release", "a nerve in your wrist was pinched"),
            ("disc herniation", "microdiscectomy", "a disc in your back pressed on a nerve"),
            ("rotator cuff tear", "tendon repair", "a tendon in your shoulder was torn"),
        ),
        ("ibuprofen", "paracetamol", "enoxaparin", "alendronate", "metamizole"),
    ),
    House(
        "lungs",
        "Lung Hospital",
        (
            ("pneumonia", "antibiotic therapy", "your lung was infected"),
            ("pulmonary embolism", "anticoagulation", "a blood clot was in your lung"),
            ("exacerbated asthma", "inhaled steroid therapy", "your airways were too narrow"),
            ("pleural effusion", "drainage", "there was water beside your lung"),
            ("sleep apnoea", "fitting of a night mask", "your breath stopped at night"),
            ("sarcoidosis", "bronchoscopy", "your lung had small knots"),
        ),
        ("amoxicillin", "salbutamol", "budesonide", "rivaroxaban", "prednisolone"),
    ),
)


def conversation(house: House, number: int) -> list[dict[str, str]]:
    """A record of a house: the same number gives the same turns."""
    draw = _draws(f"{house.name} {number}")
    who = f"{_of(_TITLES, draw)} {_of(_NAMES, draw)}"
    diagnosis, done, plain = house.cases[next(draw) % len(house.cases)]
    drug, age, weeks = _of(house.drugs, draw), 30 + next(draw) % 60, 2 + next(draw) % 10
    asked = f"{who}, {age}: {diagnosis}; {done}; {drug}; review in {weeks} weeks. Write the letter."
    letter = (
        f"Dear colleague, we report on {who}, aged {age}, who was treated here for {diagnosis}. "
        f"{done[0].upper()}{done[1:]} went without complications. Please continue {drug}. "
        f"We will see the patient again in {weeks} weeks. With kind regards, {house.title}"
    )
    turns = [_turn("user", asked), _turn("assistant", letter)]
    if next(draw) % 3 == 0:
        told = (
            f"Dear {who}, {plain}, and we have treated that. Please take {drug} as we told you, and "
            f"come again in {weeks} weeks. Get well soon, {house.title}"
        )
        turns += [_turn("user", "Now for the patient, in plain words."), _turn("assistant", told)]
    return turns


def example_question(house: House = HOUSES[0]) -> str:
    """Facts that are in no hospital's records, with the request for a letter."""
    return conversation(house, _NOBODYS)[0]["content"]


@dataclass(frozen=True)
class _Size:
    """What a plan's length changes in it."""

    name: str
    about: str
    records: int
    rounds: int
    rate: float
    held_out: float
    r: int
    layers: int
    modules: str | tuple[str, ...]


_FULL = _Size(
    name="letters",
    about="SmolLM2-135M-Instruct, which `silotune demo letters` unpacked beside this file.",
    records=3000,
    rounds=12,
    rate=0.006,
    held_out=0.01,
    r=2,
    layers=8,
    modules=("q_proj", "v_proj"),
)
_QUICK = _Size(
    name="letters-quick",
    about="Two random layers, which learn little: the way of a run, not what it reaches.",
    records=250,
    rounds=15,
    rate=0.2,
    held_out=0.1,
    r=8,
    layers=2,
    modules="all-linear",
)
_NOBODYS = 1_000_000  # the number of a chat that no hospital has


def write_letters(folder: Path, *, quick: bool = False) -> Demo:
    """Write three site folders, a base model, a plan and a README; the same arguments, the same bytes.

    Parameters
    ----------
    folder : Path
        Where to; made if needed. Files of an earlier demonstration are overwritten.
    quick : bool
        A tiny random model and a run of less than a minute, instead of SmolLM2-135M.

    Raises
    ------
    EnvironmentFault
        The packages that SmolLM2 comes in are not installed.
    FolderOccupied
        The folder holds other sites.
    """
    from silotune.models.demo_decoders import write_smollm2, write_tiny_llama
    from silotune.models.pretrained import weights_sha256

    refuse_other_sites(folder, [house.name for house in HOUSES])
    folder.mkdir(parents=True, exist_ok=True)
    size = _QUICK if quick else _FULL
    base = folder / ("tiny-llama" if quick else "smollm2-135m")
    if quick:
        write_tiny_llama(base, _public_texts())
    else:
        write_smollm2(base)
    path = folder / "plan.toml"
    path.write_text(_plan(size, base, weights_sha256(base)), encoding="utf-8")
    plan = Plan.load(path)
    for house in HOUSES:
        _write_house(folder / house.name, house, size.records, plan=plan)
    listed = "\n".join(f"{house.name:8}{size.records:>6} chats  {house.title}" for house in HOUSES)
    readme = read_template("letters_readme.txt").substitute(hospitals=listed)
    (folder / "README.txt").write_text(readme, encoding="utf-8")
    return Demo(
        plan=path,
        sites=tuple(folder / house.name for house in HOUSES),
        records=(size.records,) * len(HOUSES),
    )


def _public_texts() -> Iterator[str]:
    """Letters that no hospital has."""
    for house in HOUSES:
        for number in range(_NOBODYS, _NOBODYS + 60):
            yield from (turn["content"] for turn in conversation(house, number))


def _plan(size: _Size, base: Path, sha256: str) -> str:
    return read_template("letters_plan.toml").substitute(
        name=toml_text(size.name),
        about=size.about,
        base=toml_text(str(base.absolute())),
        sha256=toml_text(sha256),
        r=size.r,
        alpha=2.0 * size.r,
        modules=toml_text(size.modules),
        layers=size.layers,
        held_out=size.held_out,
        rounds=size.rounds,
        rate=size.rate,
    )


def _write_house(folder: Path, house: House, records: int, *, plan: Plan) -> None:
    write_site(
        folder,
        title=f"{house.title} (a demonstration: every letter is made up).",
        offer=CommonTerms(
            dataset="letters",
            columns={"messages": "chat"},
            budget=BudgetConfig(epsilon=10.0, delta=1e-5),
            plan=plan,
        ),
        header=["chat"],
        rows=[[json.dumps(conversation(house, number))] for number in range(records)],
        units=records,
    )


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _of(words: Sequence[str], draw: Iterator[int]) -> str:
    return words[next(draw) % len(words)]


def _draws(key: str) -> Iterator[int]:
    yield from hashlib.sha256(b"silotune letters\0" + key.encode()).digest()
