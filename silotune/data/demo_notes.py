"""The demonstration of de-identification: five hospitals' notes, all of them made up here.

No patient, doctor or hospital of these notes exists: names, addresses and numbers come from the
package ``Faker``, sentences from this file, and the README that is written beside them says so. What
stands where is known from how a note was put together, so its spans are exact.

Each hospital has a style of its own: headed forms, letters, shorthand, and names, dates and numbers as
its country writes them. What a model learns of one is of little use at another, which is why hospitals
would want to train together.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from silotune.data.columns import Role
from silotune.data.demo import Demo, lacking, minilm
from silotune.data.partition import (
    CommonTerms,
    read_template,
    refuse_other_sites,
    write_site,
)
from silotune.data.site import BudgetConfig
from silotune.models.spans import TextSpan, written
from silotune.plan.plan import Plan
from silotune.plan.written import toml_text

if TYPE_CHECKING:
    from faker import Faker

LABELS = ("NAME", "DATE", "PLACE", "PHONE", "NUMBER")
"""What is to be found. NUMBER is that of a record or an insurance."""

_LABEL_OF = {
    "patient": "NAME", "surname": "NAME", "doctor": "NAME", "relative": "NAME",
    "date": "DATE", "born": "DATE", "place": "PLACE", "city": "PLACE",
    "phone": "PHONE", "number": "NUMBER",
}  # fmt: skip
_FIELD = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class NoteStyle:
    """How a hospital writes.

    Attributes
    ----------
    name, title : str
        Of its folder, and for people.
    locale : str
        Of Faker: whose names, addresses and telephone numbers.
    dates : tuple of str
        How dates are written, as ``strftime`` has it.
    number : str
        A record's number: ``#`` is a digit, ``?`` a letter.
    openings, closings : tuple of str
        With ``{patient}``, ``{date}`` and the like: one of each a note.
    sentences : tuple of str
        Of which a note has some.
    small : bool
        Whether all is written in small letters.
    """

    name: str
    title: str
    locale: str
    dates: tuple[str, ...]
    number: str
    openings: tuple[str, ...]
    sentences: tuple[str, ...]
    closings: tuple[str, ...]
    small: bool = False


STYLES = (
    NoteStyle(
        name="riverside",
        title="Riverside General Hospital, United States: headed forms",
        locale="en_US",
        dates=("%m/%d/%Y", "%m/%d/%y"),
        number="#######",
        openings=(
            "PATIENT: {patient}\nMRN: {number}  DOB: {born}\nADMITTED: {date}\n",
            "NAME: {patient}   MRN {number}\nDATE OF SERVICE: {date}\nHOME: {place}\n",
        ),
        sentences=(
            "HPI: {age} year old with {condition}, onset {days} days ago.",
            "{surname} was last seen in clinic on {date} by Dr. {doctor}.",
            "Vitals: BP {pressure}, HR {pulse}. {drug} {dose} mg given.",
            "Next of kin is {relative}, phone {phone}.",
            "Assessment: {condition}, stable on {drug} {dose} mg daily.",
            "Transferred from a facility in {city} on {date}.",
            "Labs: Hb {decimal}, WBC {decimal}, creatinine 1.{digit}.",
        ),
        closings=("Attending: {doctor}, MD\n", "Dictated by {doctor} on {date}. Call {phone}.\n"),
    ),
    NoteStyle(
        name="st-hildas",
        title="St Hilda's Infirmary, Great Britain: letters to general practitioners",
        locale="en_GB",
        dates=("%d %B %Y", "%d %b %Y"),
        number="### ### ####",
        openings=(
            "Dear Dr {doctor},\n\nRe: {patient}, d.o.b. {born}, NHS no. {number}\n{place}\n\n",
            "Dear {doctor},\n\nThank you for referring {patient} ({born}), who lives at {place}.\n\n",
        ),
        sentences=(
            "I reviewed this pleasant {age}-year-old in clinic on {date} with {condition}.",
            "The symptoms began some {days} weeks ago and have not settled on {drug}.",
            "On examination the blood pressure was {pressure} and the pulse {pulse}.",
            "{surname} asked us to speak to the family; {relative} can be reached on {phone}.",
            "I have suggested {drug} {dose} mg at night and a review on {date}.",
            "There is a history of {condition}, treated in {city}.",
            "We shall repeat the bloods; haemoglobin was {decimal}.",
        ),
        closings=(
            "\nYours sincerely,\n{doctor}\nConsultant Physician\n",
            "\nWith kind regards,\n{doctor}, on behalf of {doctor}\nSecretary: {phone}\n",
        ),
    ),
    NoteStyle(
        name="arogya",
        title="Arogya Clinics, India: shorthand in small letters",
        locale="en_IN",
        dates=("%d/%m/%y", "%d-%m-%Y"),
        number="??######",
        openings=(
            "pt {patient} uhid {number} seen {date} ",
            "{date} opd {number} {patient} {age}/m ",
        ),
        sentences=(
            "c/o {condition} x {days}d, no fever",
            "bp {pressure} pr {pulse}, chest clear",
            "on {drug} {dose} od since {date}",
            "r/o {city}, attender {relative} ph {phone}",
            "adv {drug} {dose} bd, rpt hb ({decimal})",
            "k/c/o {condition}, prev rx dr {doctor}",
            "spoke to {relative} on {phone}, will come {date}",
        ),
        closings=(" sd/ {doctor}\n", " d/w dr {doctor}, rv {date}\n"),
        small=True,
    ),
    NoteStyle(
        name="lindenhof",
        title="Klinikum Lindenhof, Germany: reports in numbered points",
        locale="de_DE",
        dates=("%d.%m.%Y", "%d.%m.%y"),
        number="F-########",
        openings=(
            "Discharge report. Pat. {patient}, *{born}, case {number}, resident {place}.\n",
            "Case {number} - {patient} (born {born}). Stay until {date}.\n",
        ),
        sentences=(
            "Diagnosis: {condition}.",
            "Admission {date} via the emergency ward of {city}.",
            "Course: RR {pressure} mmHg, HF {pulse}/min, afebrile after {days} days.",
            "Medication: {drug} {dose} mg 1-0-1.",
            "The patient's {kin} {relative} was informed by telephone ({phone}).",
            "Consultation Dr. med. {doctor}: {condition} unlikely.",
            "Laboratory: Hb {decimal} g/dl, control on {date}.",
        ),
        closings=("gez. {doctor}, Oberarzt\n", "Prof. {doctor} / Tel. {phone}\n"),
    ),
    NoteStyle(
        name="santa-lucia",
        title="Hospital Santa Lucía, Spain: nurses' entries by the hour",
        locale="es_ES",
        dates=("%d-%m-%Y", "%d/%m"),
        number="HC ######",
        openings=(
            "[{date} 07:{digit}5] {patient}, {number}, bed {digit}{digit}. ",
            "{number} | {patient} | {born} | ",
        ),
        sentences=(
            "{hour}h pain {digit}/10, {drug} {dose} mg IV.",
            "{hour}h TA {pressure}, FC {pulse}, diuresis {dose} ml.",
            "{hour}h {relative} ({kin}) calls from {phone}.",
            "{hour}h seen by {doctor}: {condition}, nil by mouth.",
            "Family lives in {city}; arrives {date}.",
            "{hour}h wound dry, drain {digit}0 ml, Hb {decimal}.",
            "{patient} refuses {drug}, {doctor} informed.",
        ),
        closings=("Turn handed to {doctor}.\n", "Signed {doctor}, {date}.\n"),
    ),
)

_CONDITIONS = (
    "Parkinson's disease", "Crohn's disease", "Graves disease", "Bell's palsy", "Hodgkin lymphoma",
    "Dupuytren contracture", "Ménière's disease", "type 2 diabetes", "atrial fibrillation",
    "community acquired pneumonia", "chronic kidney disease stage 3", "iron deficiency anaemia",
    "a fractured neck of femur", "acute cholecystitis", "COPD", "Wernicke encephalopathy",
)  # fmt: skip
_DRUGS = ("metformin", "apixaban", "ramipril", "amoxicillin", "Augmentin", "paracetamol", "Lasix")
_KIN = ("daughter", "son", "wife", "husband", "sister")


def write_notes(
    folder: Path, *, patients: int | None = None, quick: bool = False, seed: int = 1
) -> Demo:
    """Write five site folders, a plan and a README; the same arguments give the same bytes.

    Parameters
    ----------
    folder : Path
        Where to; made if needed. Files of an earlier demonstration are overwritten.
    patients : int, optional
        Of each hospital, with one or two notes each; by default as many as the plan is made for.
    quick : bool
        A plan that is done in less than a minute, and finds less.
    seed : int
        Other seeds make other notes.

    Raises
    ------
    EnvironmentFault
        The package ``Faker`` is not installed.
    FolderOccupied
        The folder holds other sites.
    """
    refuse_other_sites(folder, [style.name for style in STYLES])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "plan.toml"
    path.write_text(_plan(quick=quick), encoding="utf-8")
    plan, counts = Plan.load(path), []
    patients = patients or (_QUICK if quick else _FULL).patients
    for number, style in enumerate(STYLES):
        rows = _rows(style, patients=patients, seed=1000 * seed + number)
        _write_hospital(folder / style.name, style, rows, plan=plan)
        counts.append(len(rows))
    listed = "\n".join(
        f"{style.name:14}{count:>6} notes  {style.title}"
        for style, count in zip(STYLES, counts, strict=True)
    )
    readme = read_template("notes_readme.txt").substitute(hospitals=listed)
    (folder / "README.txt").write_text(readme, encoding="utf-8")
    return Demo(
        plan=path,
        sites=tuple(folder / style.name for style in STYLES),
        records=tuple(counts),
    )


@dataclass(frozen=True)
class _Length:
    """What a plan's length changes in it."""

    name: str
    patients: int
    rounds: int


_FULL = _Length("notes", 200, 80)
_QUICK = _Length("notes-quick", 60, 40)


def _plan(*, quick: bool) -> str:
    chosen = _QUICK if quick else _FULL
    return read_template("notes_plan.toml").substitute(
        name=toml_text(chosen.name),
        base=toml_text(minilm()),
        labels=toml_text(LABELS),
        rounds=chosen.rounds,
    )


def _write_hospital(
    folder: Path, style: NoteStyle, rows: Sequence[Sequence[str]], *, plan: Plan
) -> None:
    columns: dict[Role, str] = {"text": "note", "spans": "identifiers", "unit": "patient"}
    write_site(
        folder,
        title=f"{style.title} (a demonstration: every note is made up).",
        offer=CommonTerms(
            dataset="notes",
            columns=columns,
            budget=BudgetConfig(epsilon=10.0, delta=1e-5),
            unit="patient",
            max_records_per_unit=2,
            labels=plan.model.labels,
            plan=plan,
        ),
        header=["note", "identifiers", "patient"],
        rows=rows,
        units=len({row[-1] for row in rows}),
    )


def _rows(style: NoteStyle, *, patients: int, seed: int) -> list[list[str]]:
    """Note, spans and patient's number of every note of a hospital."""
    writer = _Writer(style, seed)
    rows = []
    for number in range(patients):
        writer.next_patient()
        for _ in range(writer.rng.choice((1, 1, 2))):
            note, spans = writer.note()
            rows.append([note, written(spans), f"{style.name}-{number:04}"])
    return rows


def example_note(style: NoteStyle = STYLES[0], *, seed: int = 99) -> str:
    """A note that is in no hospital's records."""
    writer = _Writer(style, seed)
    writer.next_patient()
    return writer.note()[0]


class _Writer:
    """Writes the notes of one hospital, patient by patient."""

    def __init__(self, style: NoteStyle, seed: int) -> None:
        self._style, self.rng, self._faker = style, random.Random(seed), _faker(style.locale, seed)  # noqa: S311
        self._patient: Mapping[str, str] = {}

    def next_patient(self) -> None:
        """Go on to somebody else."""
        first, last = self._faker.first_name(), self._faker.last_name()
        in_order = f"{first} {last}"
        reversed_ = f"{last}, {first}"
        born = self._faker.date_of_birth(minimum_age=18, maximum_age=95)
        self._patient = {
            "patient": reversed_ if self._style.locale in {"en_US", "de_DE"} else in_order,
            "surname": f"Mr. {last}" if self.rng.random() < 0.5 else f"Mrs. {last}",
            "number": self._number(),
            "born": born.strftime(self._style.dates[0]),
            "place": self._place(),
        }

    def note(self) -> tuple[str, list[TextSpan]]:
        """A note of this patient, and what of it identifies somebody."""
        style, count = self._style, self.rng.randint(3, 6)
        parts = self.rng.sample(style.sentences, count)
        told = ", ".join(parts) if style.small else " ".join(parts)
        opening, closing = self.rng.choice(style.openings), self.rng.choice(style.closings)
        return self._filled(f"{opening}{told} {closing.strip(' ')}")

    def _filled(self, template: str) -> tuple[str, list[TextSpan]]:
        text, at, spans = "", 0, []
        for field in _FIELD.finditer(template):
            text += template[at : field.start()]
            value, label = self._value(field[1]), _LABEL_OF.get(field[1])
            if label is not None:
                title = re.match(r"(Mr|Mrs)\. ", value)
                start = len(text) + (title.end() if title else 0)
                spans.append(TextSpan(start, len(text) + len(value), label))
            text += value
            at = field.end()
        text += template[at:]
        return (text.lower(), spans) if self._style.small else (text, spans)

    def _value(self, name: str) -> str:
        if name in self._patient:
            return self._patient[name]
        rng = self.rng
        makers: dict[str, Callable[[], Any]] = {
            "doctor": self._doctor,
            "relative": lambda: f"{self._faker.first_name()} {self._faker.last_name()}",
            "date": self._date,
            "city": self._faker.city,
            "phone": self._faker.phone_number,
            "condition": lambda: rng.choice(_CONDITIONS),
            "drug": lambda: rng.choice(_DRUGS),
            "kin": lambda: rng.choice(_KIN),
            "dose": lambda: rng.choice((5, 10, 20, 40, 250, 500)),
            "age": lambda: rng.randint(18, 95),
            "days": lambda: rng.randint(2, 12),
            "pressure": lambda: f"{rng.randint(100, 180)}/{rng.randint(55, 100)}",
            "pulse": lambda: rng.randint(50, 120),
            "decimal": lambda: f"{rng.randint(7, 15)}.{rng.randint(0, 9)}",
            "digit": lambda: rng.randint(1, 9),
            "hour": lambda: f"{rng.randint(8, 22):02}",
        }
        return str(makers[name]())

    def _doctor(self) -> str:
        last = str(self._faker.last_name())
        return last if self.rng.random() < 0.5 else f"{self._faker.first_name()} {last}"

    def _date(self) -> str:
        day = date(2023, 1, 1).toordinal() + self.rng.randrange(1000)
        return date.fromordinal(day).strftime(self.rng.choice(self._style.dates))

    def _place(self) -> str:
        street = " ".join(str(self._faker.street_address()).split())
        return f"{street}, {self._faker.postcode()} {self._faker.city()}"

    def _number(self) -> str:
        found: str = self._faker.bothify(self._style.number)
        return found


def _faker(locale: str, seed: int) -> Faker:
    try:
        from faker import Faker
    except ImportError:
        raise lacking("Faker, which makes up the notes,", install="silotune[demo]") from None
    found = Faker(locale)
    found.seed_instance(seed)
    return found
