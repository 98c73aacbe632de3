"""Texts that look like identifiers: e-mail addresses, phone numbers, national numbers, dates of birth.

Only counts come out of here, never a text or a part of one. A pattern finds what has the form of an
identifier; where a number has a check digit, the library python-stdnum says whether it is right. Of any
numbers a tenth or so has the right one by accident, so what passes is compared with what chance would
have passed. What has no form (a name in the middle of a sentence, a rare disease in a small town) is not
found: a clean count is no proof that texts are anonymous.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module

import numpy as np
from numpy.typing import NDArray

_MONTH = (
    "Jan(?:uary)?|Feb(?:ruary)?|Mar(?:ch)?|Apr(?:il)?|May|June?|July?|Aug(?:ust)?|Sept?(?:ember)?|"
    "Oct(?:ober)?|Nov(?:ember)?|Dec(?:ember)?|Januar|Februar|März|Mai|Juni|Juli|Oktober|Dezember|"
    "janvier|février|mars|avril|juin|juillet|août|septembre|octobre|novembre|décembre|"
    "enero|febrero|marzo|abril|mayo|junio|julio|agosto|octubre|diciembre"
)
_DATE = (
    r"(?:\d{1,2}([./-])\d{1,2}\1(?:(?:19|20)\d{2}|\d{2})(?!\d)|(?:19|20)\d{2}-\d{1,2}-\d{1,2}(?!\d)|"
    rf"\d{{1,2}}(?:st|nd|rd|th)?\.? (?:de )?(?:{_MONTH})\.?,?(?: de)? (?:19|20)\d{{2}}|"
    rf"(?:{_MONTH})\.? \d{{1,2}}(?:st|nd|rd|th)?,? (?:19|20)\d{{2}})"
)
_BORN = (
    r"\b(?:d\.?o\.?b\.?|date of birth|birth ?date|born(?: on)?|geb\.?|geboren(?: am| op)?|geburtsdatum|"
    r"geboortedatum|née? le|date de naissance|nacid[oa](?: el)?|fecha de nacimiento|nat[oa] il|"
    r"data di nascita|född|fødselsdato)[\s:.,(]{1,4}"
)
_RECORD_NUMBER = (
    r"\b(?:MRN|medical record|patient(?:en)?|hospital|case|accession|encounter|fall|aufnahme|dossier|"
    r"IPP|NHC|NHS|SSN|BSN|DNI|NIR|account|customer|policy)"
    r"(?:[ -]?(?:id|no|nr|num|number|nummer|n[°º]|#))?[\s:.#°º-]{1,4}"
    r"(?=[A-Z]{0,4}[-/]?\d[\d/-]{3})[A-Z0-9][A-Z0-9/-]{3,19}\b"
)
_PHONE = (
    r"(?<![\w.])(?:\+|00)[1-9]\d{0,2}[ ./-]?(?:\(\d{1,4}\)[ ./-]?)?\d(?:[ ./-]?\d){5,12}(?!\w)|"
    r"(?<!\w)(?:\(\d{3}\) ?|\d{3}[.-])\d{3}[ .-]\d{4}(?!\w)|"
    r"(?<![\w.])0\d{2,4}[ /-]\d{3,4}[ -]?\d{3,4}(?!\w)|"
    r"(?i:\b(?:tele?ph?on\w*|phone|tel|fax|mobile|cell|handy|téléphone|teléfono|telefoon)\b"
    r"[\s:.]{1,3}[\d+(](?:[ ()./-]{0,2}\d){5,14})"
)

Check = Callable[[str], bool]


@dataclass(frozen=True)
class IdentifierKind:
    """One kind of identifier: what it is called, its form, and what checks it.

    Attributes
    ----------
    name, title : str
        For machines and for people.
    form : re.Pattern
        What it looks like.
    check : str or None
        The module of python-stdnum that knows its check digits or ranges.
    chance : float or None
        Which share of numbers that begin with a date, where the form has one, passes the check by
        accident; None where the form is telling.
    digits : bool
        Whether it has four digits or more, close together.
    bare : bool
        Whether the check wants digits without anything between them.
    marks : tuple of str
        One of these is in every text that has it.
    """

    name: str
    title: str
    form: re.Pattern[str]
    check: str | None = None
    chance: float | None = None
    digits: bool = True
    bare: bool = False
    marks: tuple[str, ...] = ()

    def checker(self) -> Check:
        """Says whether a text of this form is such an identifier."""
        if self.check is None:
            return lambda _: True
        valid: Check = import_module(f"stdnum.{self.check}").is_valid

        def check(text: str) -> bool:
            try:
                return valid(text.replace(" ", "").replace("-", "") if self.bare else text)
            except Exception:  # python-stdnum 2.2 fails on some numbers that are none
                return False

        return check


def _number(name: str, title: str, form: str, check: str, chance: float | None) -> IdentifierKind:
    whole = re.compile(rf"(?<![\w.,-])(?:{form})(?![\w-]|[.,]\d)")
    return IdentifierKind(name, title, whole, check, chance, bare=check == "luhn")


KINDS: tuple[IdentifierKind, ...] = (
    IdentifierKind(
        "email",
        "e-mail addresses",
        re.compile(r"[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{2,63})+"),
        digits=False,
        marks=("@",),
    ),
    IdentifierKind(
        "url",
        "web addresses",
        re.compile(r"(?:[Hh][Tt][Tt][Pp][Ss]?://|\b(?:www|WWW)\.)[\w-]+\.\S"),
        digits=False,
        marks=("://", "www.", "WWW."),
    ),
    IdentifierKind(
        "titled_name",
        "names after a title",
        re.compile(
            r"\b(?:Dr|Mr|Mrs|Ms|Prof|Herrn?|Frau|Mme|Sr|Sra|Sig|Dhr|Mevr)\b\.? "
            r"(?:[A-Z]\.? )?[A-ZÀ-Þ][a-zß-ÿ]+"
        ),
        digits=False,
    ),
    IdentifierKind("phone", "phone numbers", re.compile(_PHONE)),
    IdentifierKind("birth_date", "dates of birth", re.compile(_BORN + _DATE, re.I)),
    IdentifierKind("date", "full dates", re.compile(rf"(?<![\d./-]){_DATE}", re.I)),
    IdentifierKind(
        "record_number",
        "record or account numbers",
        re.compile(_RECORD_NUMBER, re.I),
    ),
    _number(
        "iban", "IBAN", r"[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?", "iban", None
    ),
    _number("card", "card numbers", r"[2-6]\d{3}(?:[ -]?\d{4}){2}[ -]?\d{1,4}", "luhn", 0.1),
    _number("us_ssn", "US social security", r"\d{3}-\d{2}-\d{4}", "us.ssn", None),
    _number("uk_nhs", "UK NHS", r"\d{3}[ -]?\d{3}[ -]?\d{4}", "gb.nhs", 0.0909),
    _number("es_dni", "Spanish DNI", r"\d{8}-?[A-Z]", "es.dni", 0.0385),
    _number("es_nie", "Spanish NIE", r"[XYZ]-?\d{7}-?[A-Z]", "es.nie", 0.0385),
    _number(
        "it_fiscale",
        "Italian codice fiscale",
        r"[A-Z]{6}\d{2}[A-EHLMPRST]\d{2}[A-Z]\d{3}[A-Z]",
        "it.codicefiscale",
        None,
    ),
    _number("nl_bsn", "Dutch BSN", r"\d{9}", "nl.bsn", 0.0909),
    _number(
        "fr_nir",
        "French NIR",
        r"[12] ?\d{2} ?\d{2} ?\d[\dAB] ?\d{3} ?\d{3} ?\d{2}",
        "fr.nir",
        0.0103,
    ),
    _number("de_idnr", "German tax id", r"[1-9]\d ?\d{3} ?\d{3} ?\d{3}", "de.idnr", 0.0286),
    _number("at_vnr", "Austrian insurance", r"[1-9]\d{3} ?[0-3]\d[01]\d{3}", "at.vnr", 0.0926),
    _number("be_nn", "Belgian national", r"\d{2}\.\d{2}\.\d{2}-\d{3}\.\d{2}", "be.nn", None),
    _number("ch_ahv", "Swiss AHV", r"756\.?\d{4}\.?\d{4}\.?\d{2}", "ch.ssn", 0.1),
    _number("dk_cpr", "Danish CPR", r"[0-3]\d[01]\d{3}-\d{4}", "dk.cpr", None),
    _number("se_pnr", "Swedish personnummer", r"(?:19|20)?\d{6}[-+]\d{4}", "se.personnummer", None),
    _number("no_fnr", "Norwegian fødselsnummer", r"\d{6} ?\d{5}", "no.fodselsnummer", 0.0083),
    _number("fi_hetu", "Finnish HETU", r"[0-3]\d[01]\d{3}[-+A]\d{3}[0-9A-Y]", "fi.hetu", None),
    _number("pl_pesel", "Polish PESEL", r"\d{11}", "pl.pesel", 0.1),
    _number("pt_nif", "Portuguese NIF", r"[1-3]\d{8}", "pt.nif", 0.102),
    _number("ie_pps", "Irish PPS", r"\d{7}[A-W][A-IW]?", "ie.pps", 0.0435),
    _number("br_cpf", "Brazilian CPF", r"\d{3}\.\d{3}\.\d{3}-\d{2}", "br.cpf", None),
    _number("ca_sin", "Canadian SIN", r"\d{3}[- ]\d{3}[- ]\d{3}", "ca.sin", 0.08),
    _number("in_aadhaar", "Indian Aadhaar", r"[2-9]\d{3} \d{4} \d{4}", "in_.aadhaar", 0.1),
    _number("cn_ric", "Chinese RIC", r"\d{17}[\dX]", "cn.ric", 0.0909),
    _number("tr_kimlik", "Turkish kimlik", r"[1-9]\d{10}", "tr.tckimlik", 0.01),
)


@dataclass(frozen=True)
class Sighting:
    """How often one kind of identifier was seen: private, for the site's own people.

    Attributes
    ----------
    kind, title : str
        Which kind.
    records, units : int
        How many have at least one that passes its check.
    seen : int
        What has the form, over all records.
    passed : int
        How many of these pass the check.
    checked : bool
        Whether this kind has check digits or ranges.
    by_chance : float or None
        How many random digits of this form would pass; None where the form is telling.
    """

    kind: str
    title: str
    records: int
    units: int
    seen: int
    passed: int
    checked: bool
    by_chance: float | None

    @property
    def likely(self) -> bool:
        """Whether it is more than chance would have (at a false-alarm rate of one in a thousand)."""
        if not self.passed or self.by_chance is None:
            return self.passed > 0
        from scipy.stats import binom

        return float(binom.sf(self.passed - 1, self.seen, self.by_chance / self.seen)) < 1e-3


_DENSE = re.compile(r"\d(?:\D{0,12}\d){3,}")
_BEFORE, _AFTER = 40, 8


def find_identifiers(
    texts: Iterable[str], unit_of: NDArray[np.int64], *, advance: Callable[[], None] = lambda: None
) -> tuple[Sighting, ...]:
    """Count what looks like an identifier in the texts.

    Parameters
    ----------
    texts : iterable of str, length n
        One a record.
    unit_of : int64 array of shape [n]
        The unit of each.
    advance : callable
        Called after each text.
    """
    found = np.zeros((len(KINDS), len(unit_of)), dtype=bool)
    seen, passed = [0] * len(KINDS), [0] * len(KINDS)
    checks = [kind.checker() for kind in KINDS]
    for row, text in enumerate(texts):
        numbers = _around_digits(text)
        for place, kind in enumerate(KINDS):
            searched = numbers if kind.digits else text
            if not searched or (kind.marks and not any(mark in text for mark in kind.marks)):
                continue
            for match in kind.form.finditer(searched):
                seen[place] += 1
                if checks[place](match[0]):
                    passed[place] += 1
                    found[place, row] = True
        advance()
    return tuple(
        Sighting(
            kind.name,
            kind.title,
            records=int(np.count_nonzero(found[place])),
            units=len(np.unique(unit_of[found[place]])),
            seen=seen[place],
            passed=passed[place],
            checked=kind.check is not None,
            by_chance=None if kind.chance is None else kind.chance * seen[place],
        )
        for place, kind in enumerate(KINDS)
    )


def _around_digits(text: str) -> str:
    """The stretches of a text that have digits close together, with a few words before each."""
    spans: list[tuple[int, int]] = []
    for match in _DENSE.finditer(text):
        start, end = max(0, match.start() - _BEFORE), match.end() + _AFTER
        if spans and start <= spans[-1][1]:
            spans[-1] = (spans[-1][0], end)
        else:
            spans.append((start, end))
    return "\n\n\n\n".join(text[start:end] for start, end in spans)
