"""Claims about what a site's people are told of work that failed, and nobody else is."""

import stat

from silotune.client.troubles import TROUBLES_FILE, Troubles, in_words, latest_troubles
from silotune.commands.site import print_status
from tests.consoles import console

STATUS = {
    "site": "ward7",
    "federation": "cardio",
    "coordinator": "https://coord.example.org:8443",
    "link": "online",
    "reason": "",
    "seconds": 5.0,
    "work": "",
    "paused": False,
    "trouble": "",
    "isolation": [],
    "answered": 3,
    "refused": 0,
    "pid": 1,
    "roster": 1,
    "certificate_days": 80.0,
    "proposed": 0,
}


def test_status_tells_the_newest_failures_in_words(tmp_path):
    troubles = Troubles(tmp_path, run="r1")
    for number in range(1, 8):
        troubles.add("blank", round=number, error=MemoryError("out of memory"))
    failures = [in_words(each) for each in latest_troubles(tmp_path)]
    assert len(failures) == 5
    drawn = console(width=200)
    print_status({**STATUS, "failures": failures}, drawn)
    text = drawn.file.getvalue()
    assert "round 7 of r1: could not be computed, noise alone was sent (MemoryError)" in text
    assert "round 2 of r1" not in text
    assert stat.S_IMODE((tmp_path / TROUBLES_FILE).stat().st_mode) == 0o600


def test_every_kind_of_failure_has_words(tmp_path):
    troubles = Troubles(tmp_path, run="r1")
    for kind in ("unprepared", "blank", "died"):
        troubles.add(kind, round=0)
    assert len({in_words(each) for each in latest_troubles(tmp_path)}) == 3


def test_a_run_stops_after_three_blank_rounds_or_two_deaths_and_another_goes_on(tmp_path):
    for kind, most in (("blank", 3), ("died", 2)):
        troubles = Troubles(tmp_path, run=kind)
        for number in range(most):
            assert not troubles.too_many
            troubles.add(kind, round=number)
        assert troubles.too_many
    assert not Troubles(tmp_path, run="another").too_many
