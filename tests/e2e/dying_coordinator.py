"""The real coordinator, which dies of SIGKILL where it is told to.

Arguments: a JSON list of ``[round, where, when]``, the file that remembers which of them came, and the
command line. ``where`` is a phase and ``when`` a number of replies taken, or "before" the messages are
sent; or a write ("settle", "checkpoint"), "before" or "after" it.
"""

import json
import os
import signal
import sys
from pathlib import Path

from silotune.flower.grid import LinkGrid
from silotune.server.store.runs import RunWriter

DEATHS, MARK = json.loads(sys.argv[1]), Path(sys.argv[2])


def strikes(*place):
    done = MARK.read_text().splitlines() if MARK.exists() else []
    mine = json.dumps(place)
    if list(place) in DEATHS and mine not in done:
        with MARK.open("a") as file:
            file.write(mine + "\n")
        os.kill(os.getpid(), signal.SIGKILL)


push, pull = LinkGrid.push_messages, LinkGrid.pull_messages
place, taken = [0, ""], [0]


def pushing(self, messages):
    messages = list(messages)
    config = messages[0].content.config_records["config"]
    place[:] = [int(config.get("round", 0)), messages[0].metadata.message_type.partition(".")[2]]
    taken[0] = 0
    strikes(*place, "before")
    return push(self, messages)


def pulling(self, ids):
    found = []
    for message_id in list(ids):
        for reply in pull(self, [message_id]):
            taken[0] += 1
            strikes(*place, taken[0])
            found.append(reply)
    return found


def beside(name, word, number_of):
    real = getattr(RunWriter, name)

    def writing(self, first, second):
        number = number_of(first, second)
        strikes(number, word, "before")
        real(self, first, second)
        strikes(number, word, "after")

    setattr(RunWriter, name, writing)


LinkGrid.push_messages, LinkGrid.pull_messages = pushing, pulling
beside("save_secure_round", "settle", lambda number, content: number)
beside("save_checkpoint", "checkpoint", lambda arrays, state: int(state["round"]))
sys.argv = ["silotune", *sys.argv[3:]]
from silotune.cli import main  # noqa: E402

main()
