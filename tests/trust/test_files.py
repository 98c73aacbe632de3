"""Claims about files that survive a crash."""

import stat
from concurrent.futures import ThreadPoolExecutor

import pytest

from silotune.errors import FileExposed
from silotune.trust import files


def test_a_failed_write_leaves_the_old_content(tmp_path, monkeypatch):
    path = tmp_path / "file"
    files.replace_file(path, b"old")

    def fail(_):
        raise OSError("disk gone")

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(OSError, match="disk gone"):
        files.replace_file(path, b"new")
    assert path.read_bytes() == b"old"


def test_content_and_directory_are_forced_to_the_disk(tmp_path, monkeypatch):
    synced = []
    real = files.os.fsync
    monkeypatch.setattr(
        files.os, "fsync", lambda fd: (synced.append(stat.S_IFMT(_mode(fd))), real(fd))[1]
    )
    files.replace_file(tmp_path / "file", b"x")
    assert synced == [stat.S_IFREG, stat.S_IFDIR]


def _mode(fd):
    return files.os.fstat(fd).st_mode


def test_of_many_creators_exactly_one_succeeds(tmp_path):
    path = tmp_path / "file"
    contents = [f"content {i}".encode() * 1000 for i in range(16)]
    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(lambda content: files.create_file(path, content), contents))
    assert sum(won) == 1
    assert path.read_bytes() == contents[won.index(True)]
    assert list(tmp_path.iterdir()) == [path]


def test_only_the_owner_may_touch_a_private_file(tmp_path):
    path = tmp_path / "file"
    files.replace_file(path, b"x")
    files.require_private(path)
    path.chmod(0o644)
    with pytest.raises(FileExposed, match="0644"):
        files.require_private(path)


def test_missing_parents_are_made_for_the_owner_only(tmp_path):
    folder = tmp_path / "a" / "b"
    files.create_private_folder(folder)
    files.create_private_folder(folder)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (folder, folder.parent)}
    assert modes == {0o700}
