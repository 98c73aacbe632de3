"""Claims about the hours and defaults of a site's terms."""

from datetime import datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from silotune.data.site import PolicyConfig, SiteConfig, parse_window
from silotune.errors import SiteConfigInvalid

DAYS = ["Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"]
MONDAY = datetime(2026, 11, 23)


def minutes_allowed(first, last, start, end):
    """The slow truth: every minute of a week, marked one by one."""
    marked = set()
    day = first
    while True:
        minute = day * 1440 + start
        length = (end - start) % 1440 or 1440
        marked |= {(minute + n) % (7 * 1440) for n in range(length)}
        if day == last:
            return marked
        day = (day + 1) % 7


@given(
    first=st.integers(0, 6),
    last=st.integers(0, 6),
    start=st.integers(0, 1439),
    end=st.integers(0, 1440),
    probes=st.lists(st.integers(0, 7 * 1440 - 1), min_size=20, max_size=20),
)
def test_a_window_holds_exactly_its_minutes(first, last, start, end, probes):
    days = DAYS[first] if first == last else f"{DAYS[first]}-{DAYS[last]}"
    text = f"{days} {start // 60:02}:{start % 60:02}-{end // 60:02}:{end % 60:02}"
    window, truth = parse_window(text), minutes_allowed(first, last, start, end)
    edges = [day * 1440 + m for day in (first, last) for m in (start - 1, start, end - 1, end)]
    for minute in [*probes, *(e % (7 * 1440) for e in edges)]:
        moment = MONDAY + timedelta(minutes=minute)
        assert window.holds(moment) == (minute in truth), (text, moment)
        begins = window.next_start(moment)
        assert moment < begins <= moment + timedelta(days=7)
        assert window.holds(begins)


@pytest.mark.parametrize(
    "text",
    ["", "always", "Mon 9:00-17:00", "Mon 09:00-25:00", "Mo 09:00-17:00", "Mon 24:00-08:00",
     "Mon 09:60-17:00", "Mon-Xyz 09:00-17:00", "Mon 09:00-17:00 "],
)  # fmt: skip
def test_other_forms_are_refused_with_an_example(text):
    with pytest.raises(ValueError, match=r'"Mon-Fri 19:00-07:00"|between'):
        parse_window(text)


def test_what_is_left_out_allows_nothing():
    policy = PolicyConfig()
    limits = {name: value for name, value in policy if name not in {"approval"}}
    assert policy.approval == "manual"
    assert limits.pop("require_privacy") is True
    assert limits.pop("require_secure_aggregation") is True
    assert limits.pop("allow_seeded_noise") is False
    assert limits.pop("allow_large_delta") is False
    assert all(value in (None, (), {}) for value in limits.values())


def test_a_wrong_policy_is_told_by_its_path(tmp_path):
    path = tmp_path / "site.toml"
    path.write_text("""
name = "north"
[datasets.notes]
format = "csv"
path = "x.csv"
declared_units = 10
columns = { text = "t" }
[policy]
max_epsilom = 3.0
hours = ["whenever"]
base_models = { "abc" = "/models" }
[resources]
device = "tpu"
""")
    with pytest.raises(SiteConfigInvalid) as error:
        SiteConfig.load(path)
    said = str(error.value)
    assert "policy.max_epsilom: unknown key; did you mean 'max_epsilon'?" in said
    assert "policy.hours.0" in said
    assert "policy.base_models" in said
    assert "resources.device" in said
