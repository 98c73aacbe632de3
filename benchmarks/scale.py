"""A thousand simulated sites, a hundred a round: beside pfl-research and Flower's Ray engine.

    python benchmarks/scale.py [--sites 1000] [--cohort 100] [--turns 3] [--workers 1] [--out FILE]

All train PEFT's shape of LoRA on the same tiny Llama (`scale_material.py`), on the same token ids, with
4 steps of SGD on batches of 4 a user, float32, one thread a process and as many processes: our sites
in worker processes and on Ray, pfl-research in its one process (with `--workers 2` under torchrun), and
Flower's Ray engine; with central client-level privacy, and without. `scale_contenders.py` has the code.
Ours draws each batch by Poisson sampling, 4 units on average; the others take 16 records in 4 batches.

Every contender is started, does a round to warm up, and then they take turns round by round. Of a turn
the wall time is taken, and the processor time of all the contender's processes, which means more on a
shared machine. Memory is the proportional set size (PSS) of all its processes, the largest one seen at
the end of a turn. The other two run in an environment of their own, made here.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
from scale_material import write_model, write_sites

PINNED = (
    "pfl==0.6.0", "flwr[simulation]==1.41.0", "ray==2.55.1", "torch==2.13.0",
    "transformers==5.23.0", "peft==0.21.2", "numpy==2.4.6",
)  # fmt: skip
NAMES = ("silotune", "silotune_ray", "pfl", "flower")
HERE = Path(__file__).parent
_TICKS = os.sysconf("SC_CLK_TCK")
_QUIET = {
    "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
    "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0", "CUDA_VISIBLE_DEVICES": "",
}  # fmt: skip


def environment(folder: Path) -> Path:
    """The others' interpreter."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *PINNED], check=True)
    return python


def write_tokens(folder: Path) -> None:
    """All sites' records as the token ids that ours makes of them."""
    from transformers import AutoTokenizer

    from silotune.models.tasks.causal_lm import CausalLm
    from silotune.plan.plan import Plan

    examples = []
    for site in sorted(folder.glob("site-*")):
        with (site / "records.csv").open(newline="") as file:
            examples += list(csv.DictReader(file))
    plan = Plan.load(folder / "plan.toml")
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    found = CausalLm().encode(examples, tokenizer, plan=plan)
    np.savez(folder / "tokens.npz", ids=found.ids, offsets=found.offsets, prompts=found.targets)


class Contender:
    """A started contender, waiting for its turn."""

    def __init__(self, name: str, folder: Path, *, kind: str, python: Path, workers: int) -> None:
        self.seconds: list[float] = []
        self.cpu: list[float] = []
        self.megabytes = 0.0
        command = [str(python), str(HERE / "scale_contenders.py"), name, str(folder), kind]
        if name == "pfl" and workers > 1:
            command[1:1] = ["-m", "torch.distributed.run", f"--nproc_per_node={workers}"]
        env = {**os.environ, **_QUIET}
        if name in {"pfl", "flower"}:
            env.pop("PYTHONPATH", None)
        began = time.perf_counter()
        self._log = (folder / f"{name}-{kind}.log").open("w")
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
            env=env,
        )  # fmt: skip
        self.waiting = self._hear()
        self.start_seconds = time.perf_counter() - began
        self.start_cpu = self._cpu()

    def turn(self) -> None:
        """One round, measured."""
        assert self.process.stdin is not None
        before, began = self._cpu(), time.perf_counter()
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        self.waiting = self._hear()
        self.seconds.append(time.perf_counter() - began)
        self.cpu.append(self._cpu() - before)
        self.megabytes = max(self.megabytes, self._pss())

    def close(self) -> None:
        for pid in reversed(self._tree()):
            with suppress(ProcessLookupError):
                os.kill(pid, 9)
        self.process.wait()
        self._log.close()

    def _hear(self) -> bool:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.strip() == "TURN":
                return True
        raise RuntimeError(f"{self.process.args}: ended early, see {self._log.name}")

    def _tree(self) -> list[int]:
        parents: dict[int, list[int]] = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):
                fields = stat.read_text().rpartition(")")[2].split()
                parents.setdefault(int(fields[1]), []).append(int(stat.parent.name))
        found = [self.process.pid]
        for pid in found:
            found += parents.get(pid, [])
        return found

    def _cpu(self) -> float:
        total = 0
        for pid in self._tree():
            with suppress(OSError):
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                total += sum(map(int, fields[11:15]))
        return total / _TICKS

    def _pss(self) -> float:
        total = 0
        for pid in self._tree():
            with suppress(OSError, StopIteration):
                lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
                total += int(next(line for line in lines if line.startswith("Pss:")).split()[1])
        return total / 1024


def measured(
    options: argparse.Namespace, folder: Path, *, kind: str, python: Path
) -> dict[str, Any]:
    """One table: every contender, in turns."""
    with ExitStack() as stack:
        started = {}
        for name in options.only or NAMES:
            own = Path(sys.executable) if name.startswith("silotune") else python
            started[name] = Contender(name, folder, kind=kind, python=own, workers=options.workers)
            stack.callback(started[name].close)
            started[name].turn()  # reads records, imports what is late
            print(f"{kind} {name}: started in {started[name].start_seconds:.0f} s", file=sys.stderr)
        for turn in range(options.turns):
            for name in sorted(started, reverse=bool(turn % 2)):
                started[name].turn()
        return {name: told(one, options.cohort) for name, one in started.items()}


def told(one: Contender, cohort: int) -> dict[str, Any]:
    """What is kept of a contender."""
    return {
        "users_a_second": cohort / statistics.median(one.seconds[1:]),
        "users_a_cpu_second": cohort / statistics.median(one.cpu[1:]),
        "round_seconds": [round(value, 3) for value in one.seconds],
        "round_cpu_seconds": [round(value, 2) for value in one.cpu],
        "start_seconds": round(one.start_seconds, 1),
        "start_cpu_seconds": round(one.start_cpu, 1),
        "peak_pss_mb": round(one.megabytes),
    }


def tell(found: dict[str, Any], kinds: list[str]) -> None:
    """The figures, for people."""
    for kind in kinds:
        for name, row in found[kind].items():
            print(
                f"{kind:8s} {name:13s} {row['users_a_second']:6.1f} users/s, "
                f"{row['users_a_cpu_second']:6.1f} a CPU second, {row['peak_pss_mb']} MB"
            )


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--sites", type=int, default=1000)
    parser.add_argument("--cohort", type=int, default=100)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--kinds", nargs="+", default=["plain", "private"])
    parser.add_argument("--only", nargs="+", choices=NAMES)
    parser.add_argument("--environment", type=Path, help="of the others; made if it is not there")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true", help="40 sites, and ours alone")
    parser.add_argument("--json", action="store_true", help="print one JSON object, on one line")
    found = parser.parse_args()
    if found.quick:
        found.sites, found.cohort, found.turns = 40, 10, 1
        found.kinds, found.only = ["plain"], list(NAMES[:2])
    return found


def main() -> None:
    options = parsed()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch).resolve()
        others = {"pfl", "flower"} & set(options.only or NAMES)
        own = options.environment or folder / "environment"
        python = environment(own) if others else Path(sys.executable)
        base, rounds = write_model(folder / "base"), options.turns + 2
        write_sites(folder, sites=options.sites, base=base, rounds=rounds, cohort=options.cohort)
        write_tokens(folder)
        facts = {"sites": options.sites, "cohort": options.cohort, "workers": options.workers}
        (folder / "facts.json").write_text(json.dumps({**facts, "rounds": rounds}))
        found: dict[str, Any] = {"scale": facts, "versions": list(PINNED)}
        for kind in options.kinds:
            found[kind] = measured(options, folder, kind=kind, python=python)
            if options.out:
                options.out.write_text(json.dumps(found, indent=2) + "\n")
    if options.json:
        print(json.dumps(found))
        return
    tell(found, options.kinds)


if __name__ == "__main__":
    main()
