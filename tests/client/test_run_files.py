"""Files of runs: whole or not there, sealed, of one run each, and gone some time after its end."""

import os
from pathlib import Path

import pytest

from silotune.client.run_files import KEPT_DAYS, KINDS, OUTBOX, ROUNDS, RunFiles, remove_old
from silotune.errors import FileExposed
from silotune.trust.errors import SealBroken
from silotune.trust.vault import Vault

DAY = 24 * 3600.0
NOW = 1000 * DAY


@pytest.fixture
def state(tmp_path):
    return tmp_path / "state"


def files(state, kind=ROUNDS, run="run"):
    return RunFiles(state, kind, run=run, vault=Vault(state))


def left(state):
    return sorted(p.name for kind in KINDS for p in (state / kind.folder).glob("*"))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.folder)
def test_a_file_is_found_by_run_kind_round_and_name(state, kind):
    made = files(state, kind)
    for number, name in ((1, ""), (2, "a-1"), (2, "b-2"), (12, "c")):
        made.write(number, f"{number}{name}".encode(), name=name)
    again = files(state, kind)
    assert again.rounds() == [1, 2, 12]
    assert again.names(2) == ["a-1", "b-2"]
    assert again.read(2, name="a-1") == b"2a-1"
    assert again.read(1) == b"1"
    assert again.read(2) is None
    assert files(state, kind, "../../other").rounds() == []
    again.remove(2, name="a-1")
    again.prune(below=2)
    assert (again.rounds(), again.names(2)) == ([2, 12], ["b-2"])


def test_files_are_private_and_sealed_under_their_own_name(state):
    made = files(state)
    made.write(1, b"a secret of the round")
    (path,) = (state / "rounds").iterdir()
    assert path.stat().st_mode & 0o777 == 0o600
    assert b"secret" not in path.read_bytes()
    path.rename(path.with_name(path.name.replace("01.", "02.")))
    with pytest.raises(SealBroken):
        made.read(2)
    made.write(3, b"x")
    next(p for p in path.parent.iterdir() if "03." in p.name).chmod(0o640)
    with pytest.raises(FileExposed):
        made.read(3)


def test_a_round_that_is_written_anew_has_another_version(state):
    made = files(state)
    assert made.version(1) is None
    made.write(1, b"x")
    first = made.version(1)
    made.write(1, b"x")
    assert made.version(1) != first is not None


def fill(state, run):
    for kind in KINDS:
        for number in (1, 2):
            files(state, kind, run).write(number, b"content", name="update-ab")


def test_only_what_is_of_a_run_that_is_over_long_enough_goes(state):
    for run in ("old", "fresh", "open"):
        fill(state, run)
    ended = {"old": NOW - KEPT_DAYS * DAY, "fresh": NOW - KEPT_DAYS * DAY + 1, "open": None}
    before = len(left(state))
    assert remove_old(state, ended=ended, now=NOW) == ["old"]
    assert len(left(state)) == before - 2 * len(KINDS)
    assert not any(files(state, kind, "old").rounds() for kind in KINDS)
    for run in ("fresh", "open"):
        assert all(files(state, kind, run).read(2, name="update-ab") for kind in KINDS)
    assert remove_old(state, ended=ended, now=NOW) == []


def test_what_is_of_no_known_run_goes_by_its_age(state):
    """Proposals are dropped where there are too many; so are the files of theirs that are left."""
    fill(state, "dropped")
    for kind in KINDS:
        for path in (state / kind.folder).iterdir():
            os.utime(path, (NOW, NOW))
    assert remove_old(state, ended={}, now=NOW + KEPT_DAYS * DAY - 1) == []
    assert len(left(state)) == 2 * len(KINDS)
    remove_old(state, ended={}, now=NOW + KEPT_DAYS * DAY)
    assert left(state) == []


def test_what_a_crash_left_half_written_goes_with_its_run(state):
    fill(state, "run")
    for path in list((state / "outbox").iterdir()):
        path.rename(path.with_name(f".{path.name}.tmp"))
    remove_old(state, ended={"run": None}, now=NOW)
    assert len(left(state)) == 2 * len(KINDS)
    remove_old(state, ended={"run": 0.0}, now=NOW)
    assert left(state) == []


@pytest.mark.parametrize("survived", range(6))
def test_a_removal_that_was_cut_short_is_finished_by_the_next(state, monkeypatch, survived):
    fill(state, "over")
    fill(state, "open")
    real, done = Path.unlink, []

    def dying(path, **options):
        if len(done) == survived:
            raise KeyboardInterrupt
        done.append(path)
        real(path, **options)

    ended = {"over": 0.0, "open": None}
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", dying)
        with pytest.raises(KeyboardInterrupt):
            remove_old(state, ended=ended, now=NOW)
    assert len(left(state)) == 4 * len(KINDS) - survived
    assert remove_old(state, ended=ended, now=NOW) == ["over"]
    assert len(left(state)) == 2 * len(KINDS)
    assert files(state, OUTBOX, "open").read(1, name="update-ab") == b"content"


def test_a_state_without_any_run_is_left_alone(tmp_path):
    assert remove_old(tmp_path / "nothing", ended={}, now=NOW) == []
