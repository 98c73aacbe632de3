"""Freed memory is used again instead of being cleared anew by the kernel."""

import subprocess
import sys

CYCLES, BLOCKS, SIZE, PAGE = 4, 12, 4 << 20, 4096

_SCRIPT = f"""
import resource, sys
from silotune.simulation.memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def cycle():
    blocks = [b"x" * {SIZE} for _ in range({BLOCKS})]
cycle()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range({CYCLES}):
    cycle()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how):
    found = subprocess.run(
        [sys.executable, "-c", _SCRIPT, how], check=True, capture_output=True, text=True
    )
    return int(found.stdout)


def test_pages_of_freed_memory_are_not_cleared_again_for_every_message():
    touched = CYCLES * BLOCKS * SIZE // PAGE
    assert faults("default") > touched / 2  # else the setting would be without use here
    assert faults("keep") < touched / 20
