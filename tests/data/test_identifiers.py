"""What looks like an identifier is counted: with right check digits, beside what chance would have."""

import random
import re._parser as parser
import string
import time

import numpy as np
import pytest

from silotune.data.identifiers import KINDS, find_identifiers


def found_in(*texts, units=None):
    """Sightings by kind, of those that were seen at all."""
    unit_of = np.arange(len(texts)) if units is None else np.array(units)
    return {seen.kind: seen for seen in find_identifiers(texts, unit_of) if seen.seen}


KNOWN = {
    "email": "write to jane.doe+x@clinic.example.org please",
    "url": "see https://clinic.example/p/17",
    "titled_name": "seen by Dr. Miller in clinic",
    "phone": "call +49 30 1234567 or tel. 555 1234",
    "birth_date": "DOB: 03/04/1956",
    "date": "admitted 12 March 2021",
    "record_number": "MRN: A1234567",
    "iban": "to DE89 3704 0044 0532 0130 00",
    "card": "card 4111 1111 1111 1111 used",
    "us_ssn": "ssn 536-90-4399",
    "uk_nhs": "no. 943 476 5919",
    "es_dni": "DNI 54362315K",
    "es_nie": "X-2482300-W",
    "it_fiscale": "RCCMNL83S18D969H",
    "nl_bsn": "111222333",
    "fr_nir": "2 95 10 99 126 111 93",
    "de_idnr": "36 574 261 809",
    "at_vnr": "1237 010180",
    "be_nn": "85.07.30-033.28",
    "ch_ahv": "756.9217.0769.85",
    "dk_cpr": "211062-5629",
    "se_pnr": "880320-0016",
    "no_fnr": "151086 95088",
    "fi_hetu": "131052-308T",
    "pl_pesel": "44051401359",
    "pt_nif": "123456789",
    "ie_pps": "6433435F",
    "br_cpf": "390.533.447-05",
    "ca_sin": "123-456-782",
    "in_aadhaar": "2341 2341 2346",
    "cn_ric": "360426199101010071",
    "tr_kimlik": "17291716060",
}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_an_identifier_of_each_kind_is_found_in_a_sentence(kind):
    seen = found_in(f"The note says {KNOWN[kind.name]} and goes on.")[kind.name]
    assert (seen.records, seen.units) == (1, 1)


@pytest.mark.parametrize("kind", [k for k in KINDS if k.check], ids=lambda kind: kind.name)
def test_a_wrong_digit_is_not_counted(kind):
    text = KNOWN[kind.name]
    last = max(place for place, sign in enumerate(text) if sign.isdigit())
    wrong = []
    for digit in string.digits:
        seen = found_in(f"{text[:last]}{digit}{text[last + 1 :]}").get(kind.name)
        wrong.append(seen is None or not seen.passed)
    accepts_most = {"us_ssn", "dk_cpr"}  # ranges and dates, no check digit
    assert sum(wrong) >= (0 if kind.name in accepts_most else 5)


def test_numbers_of_an_impossible_range_are_no_social_security_numbers():
    seen = found_in("000-12-3456", "666-12-3456", "912-12-3456")["us_ssn"]
    assert (seen.seen, seen.passed) == (3, 0)


def random_text(tree, rng):
    made = ""
    for what, value in tree:
        match str(what):
            case "LITERAL":
                made += chr(value)
            case "IN":
                choices = []
                for kind, part in value:
                    if str(kind) == "LITERAL":
                        choices.append(chr(part))
                    elif str(kind) == "RANGE":
                        choices += map(chr, range(part[0], part[1] + 1))
                    else:
                        choices += string.digits
                made += rng.choice(choices)
            case "MAX_REPEAT":
                low, high, inner = value
                made += "".join(random_text(inner, rng) for _ in range(rng.randint(low, high)))
            case "SUBPATTERN":
                made += random_text(value[3], rng)
            case "BRANCH":
                made += random_text(rng.choice(value[1]), rng)
    return made


@pytest.mark.parametrize(
    "kind", [k for k in KINDS if k.chance is not None], ids=lambda kind: kind.name
)
def test_random_digits_pass_no_more_often_than_is_said(kind):
    """2,000 draws each; a false alarm in about one of 3,000 runs of all kinds (four deviations)."""
    rng, check, tree = random.Random(5), kind.checker(), parser.parse(kind.form.pattern)
    passed = sum(check(random_text(tree, rng)) for _ in range(2_000))
    expected = 2_000 * kind.chance
    assert passed <= expected + 4 * max(expected, 1) ** 0.5


def test_numbers_that_pass_by_accident_are_told_apart_from_real_ones():
    """Seeded draws: no false alarm."""
    rng = random.Random(3)
    orders = [f"order {rng.randrange(10**8, 10**9)}" for _ in range(400)]
    seen = found_in(*orders)["nl_bsn"]
    assert seen.passed > 0
    assert not seen.likely
    real = [text for text in orders if found_in(text)["nl_bsn"].passed]
    assert found_in(*real)["nl_bsn"].likely


def test_units_are_counted_once():
    seen = found_in("a@b.example", "c@d.example", "none", units=[0, 0, 1])["email"]
    assert (seen.records, seen.units) == (2, 1)


@pytest.mark.parametrize(
    "text",
    ["", "BP 120/80, HR 72, Na 140 mmol/l", "ICD J45.901 of the left lung, stage 4", "version 2.1"],
)
def test_usual_figures_of_a_note_are_no_identifiers(text):
    assert not [kind for kind, seen in found_in(text).items() if seen.passed]


def test_a_number_that_the_library_fails_on_is_none():
    """python-stdnum 2.2 raises KeyError for Chinese numbers of some counties."""
    rng, tree = random.Random(1), parser.parse(r"\d{17}[\dX]")
    texts = [random_text(tree, rng) for _ in range(300)]
    assert found_in(*texts)["cn_ric"].seen == 300


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "part",
    ["1", "1 ", "a@", "A", "a.b@c.", "1-", "+1 ", "(1)", "born ", "MRN:A-", "DE89 3704 ", "é1"],
)
def test_no_text_takes_long(part):
    """100,000 characters that patterns could stumble over, in the order of a second."""
    before = time.process_time()
    find_identifiers([part * (100_000 // len(part))], np.zeros(1, dtype=np.int64))
    assert time.process_time() - before < 10
