"""What the display says was spent is never less than what was spent."""

import pytest

from silotune.privacy.accounting import epsilon
from silotune.privacy.events import step_event
from silotune.privacy.tally import LiveEpsilon

DELTA, ROUNDS, STEPS = 1e-5, 40, 2


@pytest.fixture(scope="module")
def told():
    """What is told after each of 40 rounds of one site, and of one that misses every other."""
    live = LiveEpsilon(delta=DELTA, rounds=ROUNDS, local_steps=STEPS)
    for site in ("always", "sometimes", "never"):
        live.joined(site, rate=0.06, sigma=1.1)
    after = []
    for number in range(1, ROUNDS + 1):
        live.replied("always", number)
        if number % 2:
            live.replied("sometimes", number)
        after.append(live.spent())
    return after


@pytest.mark.parametrize("number", [1, 7, 20, 33, 40])
def test_it_is_at_least_one_composition_of_all_steps(told, number):
    def exact(rounds):
        event = step_event(rate=0.06, sigma=1.1, steps=rounds * STEPS)
        return epsilon([event], delta=DELTA)

    spent = told[number - 1]
    assert spent["always"] >= exact(number) * (1 - 1e-9)
    assert spent["sometimes"] >= exact((number + 1) // 2) * (1 - 1e-9)


def test_it_never_falls_and_ends_at_the_certified_value(told):
    values = [spent["always"] for spent in told]
    assert values == sorted(values)
    event = step_event(rate=0.06, sigma=1.1, steps=ROUNDS * STEPS)
    assert values[-1] == pytest.approx(epsilon([event], delta=DELTA), rel=1e-6)


def test_a_site_that_released_nothing_spent_nothing(told):
    assert all("never" not in spent for spent in told)
