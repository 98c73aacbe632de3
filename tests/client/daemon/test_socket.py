"""The daemon's Unix socket: private, bounded, and never a way for an error to end the daemon."""

import os
import socket
import stat

import pytest

from silotune.client.daemon.socket import SOCKET, ControlSocket, ask
from silotune.client.errors import DaemonAbsent, RunNotProposed, SiteCommandFailed


@pytest.fixture
def folder(tmp_path):
    """Longer than the 107 bytes that the kernel takes as an address."""
    deep = tmp_path / ("x" * 60) / ("y" * 60)
    deep.mkdir(parents=True)
    return deep


def serve(folder, handle):
    return ControlSocket(folder, handle)


def test_requests_are_answered_with_the_callers_account(folder):
    server = serve(folder, lambda request, uid: {"said": request["command"], "uid": uid})
    try:
        assert ask(folder, "hello", x=1) == {"said": "hello", "uid": os.getuid()}
    finally:
        server.close()
    assert not (folder / SOCKET).exists()


def test_the_socket_is_its_owners_alone(folder):
    server = serve(folder, lambda request, uid: {})
    try:
        assert stat.S_IMODE((folder / SOCKET).stat().st_mode) == 0o600
    finally:
        server.close()


def test_errors_come_back_and_the_server_goes_on(folder):
    def handle(request, uid):
        if request["command"] == "known":
            raise RunNotProposed("no run 'x'")
        raise KeyError("something")

    server = serve(folder, handle)
    try:
        with pytest.raises(SiteCommandFailed, match="ST-642: no run 'x'") as error:
            ask(folder, "known")
        assert error.value.remedy == RunNotProposed.advice
        with pytest.raises(SiteCommandFailed, match="ST-000"):
            ask(folder, "unknown")
        with pytest.raises(SiteCommandFailed, match="ST-642"):
            ask(folder, "known")
    finally:
        server.close()


@pytest.mark.parametrize("garbage", [b"\n", b"[]\n", b"{\n", b"\xff\xfe\n", b'"x"\n'])
def test_garbage_is_answered_with_an_error(folder, garbage):
    server = serve(folder, lambda request, uid: {})
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as raw:
            here = os.open(folder, os.O_RDONLY)
            raw.connect(f"/proc/self/fd/{here}/{SOCKET}")
            os.close(here)
            raw.sendall(garbage)
            assert b'"code": "ST-000"' in raw.recv(65536)
        assert ask(folder, "x") == {}
    finally:
        server.close()


def test_without_a_daemon_the_error_says_so(folder):
    with pytest.raises(DaemonAbsent):
        ask(folder, "status")


def test_what_a_killed_daemon_left_behind_is_replaced(folder):
    dead = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    here = os.open(folder, os.O_RDONLY)
    dead.bind(f"/proc/self/fd/{here}/{SOCKET}")
    os.close(here)
    dead.close()
    with pytest.raises(DaemonAbsent):
        ask(folder, "status")
    server = serve(folder, lambda request, uid: {"alive": True})
    try:
        assert ask(folder, "status") == {"alive": True}
    finally:
        server.close()
