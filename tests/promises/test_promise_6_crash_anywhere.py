"""Promise 6: crash anywhere; nothing is lost, everything is counted."""

import os
import signal
import subprocess
import sys

from silotune.privacy.ledger import Ledger
from silotune.simulation.run import Settings, resume
from tests.federation import SITES
from tests.whole_run import final


def test_a_run_killed_in_a_round_is_resumed_to_the_same_adapter(federation, whole):
    code = (
        "import sys, time; from pathlib import Path\n"
        "from silotune.simulation.run import Settings, simulate\n"
        "from tests.federation import PRIVATE\n"
        "slow = lambda e: print(e['event'], e.get('round'), flush=True)\n"
        "simulate(Path(sys.argv[1]), runs=Path(sys.argv[2]), settings=Settings(workers=2),"
        " listener=slow, overrides=PRIVATE)\n"
    )
    runs = federation.folder / "killed"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(federation.plan_path), str(runs)],
        stdout=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line.split() == ["site_replied", "4"]:
            os.kill(process.pid, signal.SIGKILL)
            break
    process.wait()
    process.stdout.close()
    (path,) = runs.iterdir()
    directory = resume(path, settings=Settings(workers=1), listener=lambda event: None)
    assert final(directory) == final(whole[0])
    (again,) = [e for e in directory.events if e["event"] == "run_resumed"]
    assert again["from_round"] == 3
    # Sites that had answered before the kill answered from their outbox: one charge a round.
    for site in SITES:
        ledger = Ledger(directory.site(site) / "ledger.sqlite", create=False)
        assert len(ledger.events("notes")) == 5
        ledger.verify()
        ledger.close()
