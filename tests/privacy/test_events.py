import contextlib
import json
import math

import pytest
from dp_accounting import (
    ComposedDpEvent,
    GaussianDpEvent,
    LaplaceDpEvent,
    NonPrivateDpEvent,
    NoOpDpEvent,
    PoissonSampledDpEvent,
    SelfComposedDpEvent,
    UnsupportedDpEvent,
)
from hypothesis import given
from hypothesis import strategies as st

from silotune.errors import EventInvalid
from silotune.privacy.events import from_json, gaussian_event, step_event, to_json, uses_of

gaussians = st.builds(GaussianDpEvent, st.floats(1e-3, 1e9))
sampled = st.builds(PoissonSampledDpEvent, st.floats(1e-9, 1.0), gaussians)
events = st.recursive(
    st.one_of(st.builds(NoOpDpEvent), gaussians, sampled),
    lambda inner: st.one_of(
        st.builds(SelfComposedDpEvent, inner, st.integers(1, 50)),
        st.builds(ComposedDpEvent, st.lists(inner, max_size=3)),
    ),
    max_leaves=6,
)


@given(events)
def test_json_gives_back_the_same_event(event):
    assert from_json(to_json(event)) == event


def test_json_is_what_it_was_in_earlier_versions():
    assert to_json(step_event(rate=0.06, sigma=0.704, steps=72)) == (
        '{"count":72,"event":{"event":{"kind":"Gaussian","noise_multiplier":0.704},'
        '"kind":"PoissonSampled","sampling_probability":0.06},"kind":"SelfComposed"}'
    )
    assert to_json(ComposedDpEvent([NoOpDpEvent(), gaussian_event(2)])) == (
        '{"events":[{"kind":"NoOp"},{"kind":"Gaussian","noise_multiplier":2.0}],"kind":"Composed"}'
    )


GAUSSIAN = '{"kind":"Gaussian","noise_multiplier":2.0}'


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        "{}",
        '"NoOp"',
        GAUSSIAN + " ",
        GAUSSIAN.replace(",", ", "),
        GAUSSIAN.replace("2.0", "2"),
        GAUSSIAN.replace("2.0", "2.00"),
        GAUSSIAN.replace("2.0", '"2.0"'),
        GAUSSIAN.replace("2.0", "true"),
        GAUSSIAN.replace("2.0", "NaN"),
        GAUSSIAN.replace("2.0", "Infinity"),
        GAUSSIAN.replace("2.0", "-2.0"),
        GAUSSIAN.replace("2.0", "0.0"),
        GAUSSIAN.replace("Gaussian", "Laplace"),
        '{"kind":"Gaussian","noise_multiplier":1.0,"noise_multiplier":2.0}',
        '{"extra":1,"kind":"NoOp"}',
        '{"noise_multiplier":2.0,"kind":"Gaussian"}',
        '{"event":{"kind":"NoOp"},"kind":"PoissonSampled","sampling_probability":0.5}',
        f'{{"event":{GAUSSIAN},"kind":"PoissonSampled","sampling_probability":0.0}}',
        f'{{"event":{GAUSSIAN},"kind":"PoissonSampled","sampling_probability":1.5}}',
        f'{{"count":0,"event":{GAUSSIAN},"kind":"SelfComposed"}}',
        f'{{"count":1.0,"event":{GAUSSIAN},"kind":"SelfComposed"}}',
        f'{{"count":true,"event":{GAUSSIAN},"kind":"SelfComposed"}}',
        f'{{"count":{10**12},"event":{GAUSSIAN},"kind":"SelfComposed"}}',
        f'{{"events":{{"0":{GAUSSIAN}}},"kind":"Composed"}}',
        '{"events":[' * 100_000,
        '{"count":1,"event":' * 5000 + GAUSSIAN + ',"kind":"SelfComposed"}' * 5000,
        '{"events":[' + ",".join([GAUSSIAN] * 30000) + '],"kind":"Composed"}',
    ],
)
def test_anything_but_canonical_json_of_a_known_event_is_refused(text):
    with pytest.raises(EventInvalid):
        from_json(text)


@given(events, st.data())
def test_a_text_with_one_character_changed_is_another_event_or_none(event, data):
    text = to_json(event)
    place = data.draw(st.integers(0, len(text) - 1))
    changed = text[:place] + data.draw(st.characters()) + text[place + 1 :]
    if changed != text:
        with contextlib.suppress(EventInvalid):
            assert from_json(changed) != event


@pytest.mark.parametrize(
    "event",
    [
        LaplaceDpEvent(1.0),
        NonPrivateDpEvent(),
        UnsupportedDpEvent(),
        PoissonSampledDpEvent(0.5, NoOpDpEvent()),
        PoissonSampledDpEvent(0.5, SelfComposedDpEvent(GaussianDpEvent(1.0), 2)),
        SelfComposedDpEvent(LaplaceDpEvent(1.0), 2),
        ComposedDpEvent([GaussianDpEvent(1.0), NonPrivateDpEvent()]),
        GaussianDpEvent(0.0),
        GaussianDpEvent(math.nan),
        GaussianDpEvent("1.0"),
        None,
    ],
)
def test_events_that_are_not_accounted_for_are_refused(event):
    with pytest.raises(EventInvalid):
        to_json(event)
    with pytest.raises(EventInvalid):
        uses_of([event])


@pytest.mark.parametrize(
    "wrong",
    [
        {"rate": 0.0},
        {"rate": 1.1},
        {"sigma": 0.0},
        {"sigma": math.inf},
        {"steps": 0},
        {"steps": 1.0},
    ],
)
def test_a_step_with_an_impossible_number_is_refused(wrong):
    with pytest.raises(EventInvalid):
        step_event(**{"rate": 0.1, "sigma": 1.0, "steps": 1} | wrong)


def test_uses_add_up_through_every_composition():
    inner = ComposedDpEvent([step_event(rate=0.1, sigma=2.0, steps=3), gaussian_event(5.0)])
    done = [SelfComposedDpEvent(inner, 4), gaussian_event(5.0), NoOpDpEvent()]
    assert uses_of(done) == {(0.1, 2.0): 12, (1.0, 5.0): 5}


def test_more_uses_than_can_be_counted_are_refused():
    event = step_event(rate=0.1, sigma=1.0, steps=10**6)
    with pytest.raises(EventInvalid, match="more than"):
        uses_of([SelfComposedDpEvent(event, 10**6)])


def test_the_error_does_not_quote_the_text():
    with pytest.raises(EventInvalid) as refused:
        from_json(json.dumps({"kind": "secret"}))
    assert "secret" not in str(refused.value)
