"""An event in one line says all that it says, once."""

from silotune.events.schema import in_a_line

EVENT = {
    "id": 7,
    "time": 3661.0,
    "event": "site_failed",
    "run": "r",
    "site": "alpha",
    "seconds": 0.123456,
    "cohort": ["a", "b"],
    "detail": "",
    "code": None,
}


def test_every_field_that_says_something_is_in_the_line_and_empty_ones_are_not():
    assert (
        in_a_line(EVENT)
        == "01:01:01  site_failed     run=r  site=alpha  seconds=0.1235  cohort=a,b"
    )


def test_hidden_fields_are_left_out():
    assert "run=" not in in_a_line(EVENT, hidden=("run",))
