"""Claims about audit logs: whatever is changed after the fact is found."""

import csv
import hashlib
import io
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from silotune.errors import EnvironmentFault, FileExposed
from silotune.trust import audit
from silotune.trust.audit import AuditHead, AuditLog
from silotune.trust.errors import AuditLogDamaged

KEY = Ed25519PrivateKey.generate()


def written(folder, lines=6):
    log = AuditLog(folder / "audit.jsonl", owner="north")
    for number in range(lines):
        log.append("round", run="r", round=number, size=0.1 * number)
    return log


def raw(log):
    return log.path.read_bytes().splitlines(keepends=True)


def test_lines_come_back_as_they_were_written(tmp_path):
    written(tmp_path)
    lines = AuditLog(tmp_path / "audit.jsonl").lines()
    assert [line.kind for line in lines] == ["opened"] + ["round"] * 6
    assert [line.fields["round"] for line in lines[1:]] == list(range(6))
    assert lines[3].fields["size"] == 0.2


def test_the_chain_can_be_checked_without_this_program(tmp_path):
    log, previous = written(tmp_path), "0" * 64
    for text in raw(log):
        line = json.loads(text)
        digest = line.pop("hash")
        again = json.dumps(line, sort_keys=True, separators=(",", ":"))
        assert line["previous"] == previous
        assert hashlib.sha256(again.encode()).hexdigest() == digest
        previous = digest
    assert log.verify().hash == previous


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(position=st.integers(min_value=0), byte=st.integers(0, 255))
def test_one_changed_byte_anywhere_is_found(tmp_path_factory, position, byte):
    log = written(tmp_path_factory.mktemp("log"))
    content = bytearray(log.path.read_bytes())
    if content[position % len(content)] == byte:
        return
    content[position % len(content)] = byte
    log.path.write_bytes(content)
    with pytest.raises(AuditLogDamaged):
        AuditLog(log.path).verify()


@pytest.mark.parametrize(
    "edit",
    [
        lambda lines: lines[:3] + lines[4:],
        lambda lines: [*lines[:2], lines[3], lines[2], *lines[4:]],
        lambda lines: lines[:-1],
        lambda lines: lines[:-2],
        lambda lines: [*lines, lines[-1]],
        lambda lines: [],
        lambda lines: lines[1:],
        lambda lines: [lines[0].replace(b"north", b"south"), *lines[1:]],
    ],
    ids=["removed", "swapped", "cut-1", "cut-2", "repeated", "emptied", "beheaded", "renamed"],
)
def test_removing_or_moving_lines_is_found(tmp_path, edit):
    log = written(tmp_path)
    log.path.write_bytes(b"".join(edit(raw(log))))
    with pytest.raises(AuditLogDamaged):
        AuditLog(log.path)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace(b'"kind":"round"', b'"kind":"nothing","kind":"round"'),
        lambda text: text.replace(b'"kind":"round"', b'"kind": "round"'),
        lambda text: text.replace(b'"kind":"round"', b'"kind":"\\u0072ound"'),
        lambda text: text.replace(b'"seq":4', b'"seq":4.0'),
    ],
    ids=["twice", "space", "escape", "number"],
)
def test_a_line_reads_alike_for_everybody(tmp_path, change):
    """Its hash fits what a lenient reader makes of it, and another makes something else of it."""
    log = written(tmp_path)
    lines = raw(log)
    changed = [*lines[:3], change(lines[3]), *lines[4:]]
    assert changed != lines
    log.path.write_bytes(b"".join(changed))
    with pytest.raises(AuditLogDamaged, match="is no line of an audit log"):
        AuditLog(log.path)


def test_a_crash_between_line_and_head_is_repaired(tmp_path):
    log = written(tmp_path)
    old_head = (tmp_path / "audit.jsonl.head").read_bytes()
    end = log.append("last")
    (tmp_path / "audit.jsonl.head").write_bytes(old_head)
    again = AuditLog(log.path)
    assert again.head == end
    assert again.append("next").seq == end.seq + 1
    again.verify()


def test_a_line_that_a_crash_cut_short_is_cut_off(tmp_path):
    log = written(tmp_path)
    whole = log.path.read_bytes()
    log.path.write_bytes(whole + b'{"fields": "half a li')
    again = AuditLog(log.path)
    assert log.path.read_bytes() == whole
    again.append("next")
    assert again.verify().seq == 8


def test_both_rolled_back_is_found_by_the_other_sides_memory(tmp_path):
    log = written(tmp_path)
    other = AuditLog(tmp_path / "other.jsonl", owner="coordinator")
    backup = {p: p.read_bytes() for p in (log.path, tmp_path / "audit.jsonl.head")}
    log.append("released", run="r", round=9)
    head = log.head
    signature = head.sign(KEY)
    other.counter_signed(head, signature, KEY.public_key())
    log.witness(head, signature, KEY.public_key())
    assert audit.compare(log, other) == 1
    for path, content in backup.items():
        path.write_bytes(content)
    rolled_back = AuditLog(log.path)  # by itself it looks whole
    with pytest.raises(AuditLogDamaged, match="does not have that line"):
        audit.compare(rolled_back, other)
    with pytest.raises(AuditLogDamaged, match="counter-signed"):
        rolled_back.witness(head, signature, KEY.public_key())


def test_the_other_side_can_not_forget_what_it_signed(tmp_path):
    log = written(tmp_path)
    other = AuditLog(tmp_path / "other.jsonl", owner="coordinator")
    for forgotten in (True, False):
        head = log.append("round")
        signature = head.sign(KEY)
        log.witness(head, signature, KEY.public_key())
        if not forgotten:
            other.counter_signed(head, signature, KEY.public_key())
    with pytest.raises(AuditLogDamaged, match="lacks the counter-signature"):
        audit.compare(log, other)


def test_only_a_true_signature_over_an_own_line_is_kept(tmp_path):
    log, stranger = written(tmp_path), Ed25519PrivateKey.generate()
    head = log.head
    with pytest.raises(AuditLogDamaged):
        log.witness(head, head.sign(stranger), KEY.public_key())
    foreign = AuditHead("south", head.seq, head.hash)
    with pytest.raises(AuditLogDamaged):
        log.witness(foreign, foreign.sign(KEY), KEY.public_key())
    log.witness(head, head.sign(stranger), stranger.public_key())
    log.verify()
    with pytest.raises(AuditLogDamaged, match="another key"):
        log.verify(trusted=KEY.public_key())


def test_threads_and_processes_write_one_chain(tmp_path):
    path = tmp_path / "audit.jsonl"
    AuditLog(path, owner="north")
    code = (
        "import sys; from pathlib import Path; from silotune.trust.audit import AuditLog\n"
        "log = AuditLog(Path(sys.argv[1]))\nfor i in range(15): log.append('p', i=i)"
    )
    others = [subprocess.Popen([sys.executable, "-c", code, str(path)]) for _ in range(2)]
    log = AuditLog(path)
    threads = [
        threading.Thread(target=lambda: [log.append("t", i=i) for i in range(15)]) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [process.wait(60) for process in others] == [0, 0]
    assert log.verify().seq == 1 + 4 * 15


def test_a_full_disk_is_told_and_leaves_a_whole_log(tmp_path):
    log = written(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (log.path.stat().st_size + 50, before[1]))
    try:
        with pytest.raises(EnvironmentFault):
            log.append("too long", text="x" * 500)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, old)
    assert log.append("fits").seq == 8
    assert AuditLog(log.path).verify().seq == 8


def test_a_log_that_others_can_read_is_refused(tmp_path):
    log = written(tmp_path)
    assert log.path.stat().st_mode & 0o777 == 0o600
    log.path.chmod(0o644)
    with pytest.raises(FileExposed):
        AuditLog(log.path)


def test_another_owners_log_is_refused(tmp_path):
    log = written(tmp_path)
    with pytest.raises(AuditLogDamaged, match="south"):
        AuditLog(log.path, owner="south")
    with pytest.raises(AuditLogDamaged, match="no audit log"):
        AuditLog(tmp_path / "nowhere.jsonl")


@pytest.mark.parametrize(
    "fields", [{"seq": 1}, {"hash": "x"}, {"x": object()}, {"x": float("nan")}]
)
def test_a_line_can_not_pose_as_another(tmp_path, fields):
    log = written(tmp_path)
    with pytest.raises(ValueError):
        log.append("x", **fields)
    assert log.verify().seq == 7


def test_a_line_is_on_the_disk_when_append_returns(tmp_path, monkeypatch):
    log, order = written(tmp_path), []
    real = os.fsync
    monkeypatch.setattr(
        os,
        "fsync",
        lambda fd: (order.append(str(Path(f"/proc/self/fd/{fd}").readlink())), real(fd)),
    )
    log.append("x")
    assert order[0].endswith("audit.jsonl")
    assert order[1].endswith("audit.jsonl.head.tmp")


def test_exports_are_the_lines_themselves_or_a_table(tmp_path):
    log = written(tmp_path)
    log.append("stopped", run="other", reason='said "no", twice')
    lines = log.lines()
    assert audit.export(lines, "jsonl").encode() == log.path.read_bytes()
    chosen = audit.select(lines, run="other")
    rows = list(csv.DictReader(io.StringIO(audit.export(chosen, "csv"))))
    assert [row["kind"] for row in rows] == ["stopped"]
    assert json.loads(rows[0]["particulars"])["reason"] == 'said "no", twice'
    assert audit.select(lines, kind="round", since=lines[3].time, until=lines[4].time)
