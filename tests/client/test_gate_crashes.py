"""Claims about a site that is killed: nothing left it uncharged, nothing was charged twice.

Children come from a fork server that has imported everything already, so that each of them starts
in milliseconds and is killed at work rather than at importing.
"""

import random
import shutil
import time
from collections import Counter

import pytest
from crashing_site import (
    BANDED,
    answer,
    crash_at,
    key,
    memory_in,
    open_site,
    plan_in,
    serve,
    wire,
)

from silotune.privacy.ledger import Ledger
from tests.forked import FORKS, start_forkserver


@pytest.fixture(scope="module")
def children():
    start_forkserver()
    return FORKS


def require_consistent(folder):
    """What must hold after any crash; returns the charged rounds."""
    ledger, gate = open_site(folder)
    assert ledger.verify() == ledger.head
    charges = Counter(
        (row.entry.release, row.entry.round) for row in ledger.rows() if row.entry.kind == "charge"
    )
    assert set(charges.values()) <= {1}, "a release was charged twice"
    times = Counter({number: n for (release, number), n in charges.items() if release == "update"})
    if plan_in(folder) is BANDED:
        paid = {number for release, number in charges if release == "block"}
        assert {BANDED.block_of(number) for number in times} <= paid, "a round rests on nothing"
        kept = memory_in(folder, gate).all(times)  # raises if one that was released has none
        for number, arrays in kept.items():
            (record,) = gate.recall(key(number)).array_records.values()
            (sent,) = record.values()
            assert arrays["noise"].tobytes() == sent.numpy().tobytes()
    contents = {}
    for number, content in wire(folder):
        assert times[number] == 1, "something left uncharged"
        assert contents.setdefault(number, content) == content, "a resend had other content"
    charged = sorted(times)
    # A charge without a release is the one in flight at the crash: one at most, and kept.
    assert len(charged) - len(contents) in {0, 1}
    for number in charged[-3:]:
        recalled = gate.recall(key(number))
        if recalled is None:  # charged when it began, and nothing was ever made of it
            assert number not in contents
        else:
            assert contents.get(number, recalled.object_id) == recalled.object_id
    ledger.close()
    return charged


def kill_at_random(children, folder, *, kills, seed):
    chance = random.Random(seed)
    open_site(folder)[0].close()  # the reservation's composition would outlive no child
    for number in range(kills):
        child = children.Process(target=serve, args=(folder,))
        child.start()
        until = time.monotonic() + 60.0
        while number == 0 and not wire(folder) and time.monotonic() < until:
            child.join(0.01)  # on a busy machine no other one may come as far as a release
        child.join(chance.uniform(0.0, 0.15))
        assert child.exitcode is None, "the site stopped by itself"
        child.kill()
        child.join()
        Ledger(folder / "ledger.sqlite").close()  # opens, every time
    return require_consistent(folder)


def test_killed_at_random_nothing_is_uncharged_and_nothing_charged_twice(children, tmp_path):
    charged = kill_at_random(children, tmp_path, kills=25, seed=1)
    assert charged == list(range(1, len(charged) + 1))
    assert charged, "no child got as far as a release"


@pytest.mark.slow
def test_killed_200_times_nothing_is_uncharged_and_nothing_charged_twice(children, tmp_path):
    charged = kill_at_random(children, tmp_path, kills=200, seed=2)
    assert charged == list(range(1, len(charged) + 1))
    assert len(charged) > 50


@pytest.mark.parametrize("banded", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_crash_before_any_durable_step_of_a_release_is_safe(children, tmp_path, banded):
    """Not at random: one child for every statement, write, sync and rename of a release."""
    (tmp_path / "before").mkdir(mode=0o700)
    if banded:  # noise that is correlated over rounds: a block's charge, and what is kept of a row
        (tmp_path / "before" / "banded").touch(mode=0o600)
    ledger, gate = open_site(tmp_path / "before")
    answer(tmp_path / "before", gate, 1)
    ledger.close()
    outcomes = []
    for step in range(1000):
        folder = shutil.copytree(tmp_path / "before", tmp_path / str(step))
        child = children.Process(target=crash_at, args=(folder, step))
        child.start()
        child.join()
        outcomes.append((child.exitcode, len(require_consistent(folder))))
        ledger, gate = open_site(folder)
        assert answer(folder, gate, 2) == answer(folder, gate, 2)
        ledger.close()
        assert require_consistent(folder) == [1, 2]
        if child.exitcode == 0:
            break
    assert outcomes[0] == (9, 1)
    assert outcomes[-1] == (0, 2)
    assert (9, 2) in outcomes, "no crash came between the charge and the release"
    assert len(outcomes) > 12
