"""A site's daemon has no more of Flower in its memory than messages need, and what it needs works."""

import subprocess
import sys

CROSSES = """
from flwr.app import ConfigRecord, Message, RecordDict
from silotune.flower.message_frames import apart, together
from silotune.flower.messages import LinkRun, instruction, reply
import silotune.strategies

content = RecordDict({"config": ConfigRecord({"round": 3})})
asked = instruction(LinkRun(1, 2), node=7, kind="train", group="3", ttl=9.0, content=content)
assert together(apart(asked)).content == content
"""


def ran(code):
    """What a process of its own prints that starts as a daemon does."""
    lines = ("import sys", "import silotune.client.daemon.__main__", code)
    words = [sys.executable, "-c", "\n".join(lines)]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()


def test_a_daemon_has_neither_grpc_nor_flower_s_servers():
    loaded = set(ran(f"{CROSSES}\nprint(*sys.modules)"))
    assert {"flwr.app", "flwr.serverapp.strategy", "silotune.flower.site_link"} <= loaded
    unused = {"grpc", "grpc._cython.cygrpc", "flwr.server", "flwr.serverapp.server_app", "asyncio"}
    assert loaded & unused == set()


def test_what_wants_grpc_later_gets_the_real_one():
    """Such as an exporter of traces that an operator asks for."""
    code = "import grpc; print(grpc.insecure_channel.__module__, grpc.__version__ != '')"
    assert ran(code) == ["grpc", "True"]


def test_a_process_that_has_flower_already_keeps_all_of_it():
    code = (
        "import flwr.serverapp, grpc\nfrom silotune.flower.lean import lean_imports\n"
        "with lean_imports():\n    import silotune.flower.messages\n"
        "print(flwr.serverapp.ServerApp.__name__, grpc.insecure_channel.__name__)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["ServerApp", "insecure_channel"]
