"""Passwords, sessions and the brake on guessing."""

import json
import stat

import pytest

from silotune.dashboard.accounts import (
    IDLE_SECONDS,
    LONGEST_SECONDS,
    Accounts,
    AttemptLimit,
    Sessions,
)
from silotune.dashboard.errors import AccountsInvalid, TooManyAttempts
from silotune.trust.identity import Person

VERA = Person(name="vera", role="viewer")


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def test_only_the_right_password_of_the_right_account_lets_in(tmp_path):
    accounts = Accounts(tmp_path / "accounts.json")
    accounts.add("vera", "viewer", "correct horse battery")
    accounts.add("olga", "operator", "other horse battery")
    assert accounts.check("vera", "correct horse battery") == VERA
    for name, password in (
        ("vera", "other horse battery"),
        ("vera", "correct horse batter"),
        ("vera", ""),
        ("nobody", "correct horse battery"),
    ):
        assert accounts.check(name, password) is None


def test_no_password_is_in_the_file_and_nobody_else_can_read_it(tmp_path):
    path = tmp_path / "accounts.json"
    Accounts(path).add("vera", "viewer", "correct horse battery")
    Accounts(path).add("olga", "viewer", "correct horse battery")
    rows = json.loads(path.read_text())
    assert "horse" not in path.read_text()
    assert rows["vera"]["scrypt"] != rows["olga"]["scrypt"]  # salted
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("name", ["", "Vera", "a b", "<script>", "../x", "a" * 64])
def test_unusable_names_are_refused(tmp_path, name):
    with pytest.raises(AccountsInvalid):
        Accounts(tmp_path / "a.json").add(name, "viewer", "correct horse battery")


def test_a_short_password_and_a_damaged_file_are_refused(tmp_path):
    accounts = Accounts(tmp_path / "a.json")
    with pytest.raises(AccountsInvalid):
        accounts.add("vera", "viewer", "too short")
    accounts.add("vera", "viewer", "correct horse battery")
    (tmp_path / "a.json").write_text('{"vera": {"role": "king"}}')
    with pytest.raises(AccountsInvalid):
        accounts.check("vera", "correct horse battery")


def test_a_session_ends_when_it_is_not_used_and_after_twelve_hours_in_any_case():
    clock = Clock()
    sessions = Sessions(clock)
    idle, busy = sessions.begin(VERA), sessions.begin(VERA)
    while clock.now < 1000.0 + LONGEST_SECONDS - IDLE_SECONDS:
        clock.now += IDLE_SECONDS - 1
        assert sessions.find(busy) is not None
    assert sessions.find(idle) is None
    clock.now = 1000.0 + LONGEST_SECONDS
    assert sessions.find(busy) is None


def test_looking_without_touching_does_not_prolong_a_session():
    clock = Clock()
    sessions = Sessions(clock)
    cookie = sessions.begin(VERA)
    clock.now += IDLE_SECONDS - 1
    assert sessions.find(cookie, touch=False) is not None
    clock.now += 2
    assert sessions.find(cookie) is None


def test_cookies_are_not_kept_and_a_made_up_one_opens_nothing():
    sessions = Sessions()
    cookie = sessions.begin(VERA)
    assert cookie not in repr(vars(sessions))
    assert sessions.find(cookie[:-1] + "x") is None
    sessions.end(cookie)
    assert sessions.find(cookie) is None


def test_guesses_are_slowed_so_that_a_day_allows_about_a_hundred():
    clock = Clock()
    limit = AttemptLimit(clock)
    tried = 0
    while clock.now < 1000.0 + 86400.0:
        try:
            limit.require_open("account vera")
        except TooManyAttempts:
            clock.now += 1.0
        else:
            limit.failed("account vera")
            tried += 1
    # 5 at once, some 10 while the wait doubles to 15 minutes, then one each 15 minutes.
    assert 90 <= tried <= 115


def test_the_right_password_forgets_the_failures():
    limit = AttemptLimit(Clock())
    for _ in range(4):
        limit.failed("account vera")
    limit.succeeded("account vera")
    limit.failed("account vera")
    limit.require_open("account vera")
