"""What one private training step costs, beside PEFT without privacy and Opacus with it.

    python benchmarks/dp_step.py            # all cases; about 30 minutes on two quiet cores
    python benchmarks/dp_step.py --quick    # MiniLM, q and v, batch 16: under 50 s
    python benchmarks/dp_step.py --json     # the last line is one JSON object
    python benchmarks/dp_step.py --only causal_lm.smollm2   # one case, or several

Numbers are named ``task.model.targets_batchxlength.precision.what``.

All contenders of a case train copies of one model on one batch, in one process, taking turns in an
order that reverses every time. Each turn is a whole step: forward, per-sequence losses, backward,
clipping, noise (ours: cryptographic), AdamW. Ratios are medians over turns of the ratio within a
turn, with quartiles. CPU time is that of the process with one thread; wall time, with two threads, means
little while other programs run. Memory is the highest resident size during three steps over that
before them, each contender in a process of its own: once with the allocator as it is, and once
("live") with every large block returned to the system at once, so that fragments of the heap don't
count.
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from dp_step_contenders import CONTENDERS, Step
from dp_step_models import Setting

from silotune.privacy.noise import SecureNoise

PEERS = ("torch", "transformers", "peft", "opacus")


@dataclass(frozen=True)
class Case:
    """One setting, who is measured in it, how often, and whose memory is."""

    setting: Setting
    contenders: tuple[str, ...]
    turns: int = 12
    memory: tuple[str, ...] = ()
    targets: tuple[tuple[str, float], ...] = ()

    def key(self, what: str) -> str:
        """Name of a number: task, model, targets and batch, precision, and what it is."""
        reduced = "bf16" in what or "autocast" in what
        return f"{self.setting.name}.{'bfloat16' if reduced else 'float32'}.{what}"

    def target(self, what: str, usual: float | None) -> float | None:
        """The ratio to reach here."""
        return dict(self.targets).get(what, usual)


BASIC = ("peft", "ours", "ours_twin", "opacus_hooks", "opacus_ghost")
REDUCED = ("peft_autocast", "peft_bf16", "ours_bf16", "ours_bf16_twin")
VARIANTS = ("peft_ffa", "ours_ffa", "ours_units", "peft_micro", "ours_micro")
MEMORY = ("peft", "ours", "opacus_hooks", "ours_bf16")
WALL = ("peft", "ours", "ours_twin", "opacus_hooks")
# (ours, peers, the ratio to reach); of several peers the fastest counts.
RATIOS = (
    ("ours", ("peft",), 1.00),
    ("ours", ("ours_twin",), 1.03),
    ("ours", ("opacus_hooks",), 0.95),
    ("ours", ("opacus_ghost",), 0.65),
    ("ours_bf16", ("peft_autocast", "peft_bf16"), 0.90),
    ("ours_bf16", ("ours_bf16_twin",), 1.03),
    ("ours_bf16", ("opacus_hooks",), 0.60),
    ("ours_bf16", ("ours",), None),
    ("ours_ffa", ("peft_ffa",), None),
    ("ours_units", ("peft",), None),
    ("ours_micro", ("peft_micro",), None),
)
MEMORY_TARGET = 0.80
NOISE_TARGET = 0.05
LM_TARGETS = (
    ("ours_over_peft", 0.95),
    ("ours_over_opacus_ghost", 0.60),
    ("ours_memory_over_peft", 0.75),
)
ENCODER_TARGETS = (("ours_over_peft", 0.95),)
CASES = (
    Case(
        Setting("smollm2_135m", "qv", 16, task="causal_lm"),
        ("peft", "ours", "opacus_ghost"),
        turns=8,
        memory=("peft", "ours"),
        targets=LM_TARGETS,
    ),
    Case(
        Setting("minilm", "qv", 16, task="pair_classification"),
        BASIC,
        targets=ENCODER_TARGETS,
    ),
    Case(
        Setting("minilm", "qv", 16, task="token_classification"),
        BASIC,
        targets=ENCODER_TARGETS,
    ),
    Case(Setting("minilm", "qv", 16), BASIC + REDUCED + VARIANTS, memory=MEMORY),
    Case(Setting("minilm", "qv", 64), BASIC + REDUCED, turns=8, memory=MEMORY),
    Case(Setting("minilm", "all", 16), BASIC + REDUCED + VARIANTS),
    Case(Setting("minilm", "all", 64), BASIC + REDUCED, turns=8, memory=MEMORY),
    Case(Setting("llama", "qv", 8, 128, task="causal_lm"), BASIC + REDUCED, memory=MEMORY),
    Case(Setting("llama", "all", 8, 128, task="causal_lm"), BASIC + REDUCED, turns=8),
    Case(
        Setting("vit", "qv", 32, task="image_classification"),
        BASIC + REDUCED,
        memory=MEMORY,
    ),
    Case(Setting("vit", "all", 32, task="image_classification"), BASIC + REDUCED),
)
QUICK = (replace(CASES[3], contenders=BASIC, turns=6, memory=("peft", "ours")),)


def take_turns(
    steps: dict[str, Step], turns: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds of each contender in each turn, after one step to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    order = list(steps)
    for turn in range(turns):
        for name in order if turn % 2 == 0 else reversed(order):
            start = clock()
            steps[name]()
            seconds[name].append(clock() - start)
    return seconds


def paired(ours: Sequence[float], peers: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """Median and quartiles of ours over the peer that is fastest by its median."""
    peer = min(peers, key=statistics.median)
    ratios = [a / b for a, b in zip(ours, peer, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return middle, low, high


def measure_times(case: Case) -> dict[str, float]:
    """Print a case's table; return its named numbers."""
    steps = {name: CONTENDERS[name](case.setting) for name in case.contenders}
    numbers: dict[str, float] = {}
    torch.set_num_threads(1)
    tables = {"": take_turns(steps, case.turns, time.process_time)}
    torch.set_num_threads(2)
    walled = {name: step for name, step in steps.items() if name in WALL}
    tables["_wall"] = take_turns(walled, max(2, case.turns // 2), time.perf_counter)
    print(f"\n{case.setting.name}")
    for name in case.contenders:
        medians = {suffix: statistics.median(t[name]) for suffix, t in tables.items() if name in t}
        numbers[case.key(f"{name}_cpu_ms")] = round(medians[""] * 1e3, 2)
        wall = f"{medians['_wall'] * 1e3:8.1f} ms wall, 2 threads" if "_wall" in medians else ""
        print(f"  {name:16s} {medians[''] * 1e3:8.1f} ms CPU, 1 thread {wall}")
    for ours, peers, target in RATIOS:
        label = f"{ours}_over_{peers[0] if len(peers) == 1 else 'best_peft_bf16'}"
        for suffix, table in tables.items():
            present = [table[peer] for peer in peers if peer in table]
            if ours not in table or not present:
                continue
            middle, low, high = paired(table[ours], present)
            numbers[case.key(f"{label}{suffix}")] = round(middle, 4)
            note = "" if suffix else verdict(middle, case.target(label, target))
            print(f"  {label + suffix:42s} {middle:.3f} [{low:.3f} to {high:.3f}] {note}")
    return numbers


def verdict(value: float, target: float | None) -> str:
    """The ratio beside what it should be."""
    if target is None:
        return ""
    return f"target {target:.2f}: {'holds' if value <= target else 'MISSED'}"


def peak_extra_memory(step: Step) -> float:
    """Highest resident size of later steps over that before them, in MiB (Linux)."""
    step()
    gc.collect()
    trim_heap()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    for _ in range(3):
        step()
    return resident("VmHWM") - before


def measure_noise(numbers: dict[str, float]) -> dict[str, float]:
    """Noise for a million parameters, beside our cheapest step (which trains far fewer)."""
    source, sums, times = SecureNoise(), torch.zeros(1_000_000), list[float]()
    for _ in range(9):
        start = time.process_time()
        source.add(sums, 1.0)
        times.append(time.process_time() - start)
    noise = statistics.median(times) * 1e3
    step = min(value for key, value in numbers.items() if key.endswith(".ours_cpu_ms"))
    share = noise / step
    print(
        f"\nsecure noise for 1,000,000 parameters: {noise:.1f} ms CPU, {share:.3f} of a step of "
        f"{step:.0f} ms {verdict(share, NOISE_TARGET)}"
    )
    return {
        "noise_1m.ours_cpu_ms": round(noise, 2),
        "noise_1m.ours_over_step": round(share, 4),
    }


def trim_heap() -> None:
    """Give freed memory back, so that a step pays for all it needs."""
    import ctypes

    ctypes.CDLL("libc.so.6").malloc_trim(0)


def resident(field: str) -> float:
    """One of the sizes of /proc/self/status, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def memory_of(case: Case, *, live: bool) -> dict[str, float]:
    """Peak extra memory of a step of each contender, MiB, each in a fresh process."""
    argument = json.dumps(case.setting.__dict__)
    # glibc: blocks from 64 KiB on come from the system, and go back to it when freed.
    environment = os.environ | ({"MALLOC_MMAP_THRESHOLD_": "65536"} if live else {})
    children = {
        name: subprocess.Popen(
            [sys.executable, __file__, "--memory-of", name, "--setting", argument],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for name in case.memory
    }
    return {name: float(child.communicate()[0].split()[-1]) for name, child in children.items()}


def measure_memory(case: Case, *, live: bool) -> dict[str, float]:
    """Print a case's memory; return its named numbers."""
    kind = "live_memory" if live else "memory"
    sizes = memory_of(case, live=live)
    numbers = {case.key(f"{name}_{kind}_mib"): round(size, 1) for name, size in sizes.items()}
    shown = ", ".join(f"{name} {size:.0f}" for name, size in sizes.items())
    print(f"{case.setting.name}: peak extra {kind.replace('_', ' ')} of a step, MiB: {shown}")
    for name, peer in (
        ("ours", "peft"),
        ("ours", "opacus_hooks"),
        ("ours_bf16", "peft"),
    ):
        if name in sizes and peer in sizes:
            ratio, label = sizes[name] / sizes[peer], f"{name}_{kind}_over_{peer}"
            numbers[case.key(label)] = round(ratio, 4)
            wanted = case.target(label, MEMORY_TARGET)
            note = "" if live or peer != "peft" else verdict(ratio, wanted)
            print(f"  {label:42s} {ratio:.3f} {note}")
    return numbers


def memory_child(name: str, setting: str) -> None:
    """The work of one memory process: print MiB."""
    torch.set_num_threads(1)
    print(peak_extra_memory(CONTENDERS[name](Setting(**json.loads(setting)))))


def summary(numbers: dict[str, float]) -> None:
    """Each ratio over all cases."""
    print("\nover all cases (CPU time, one thread): lowest, median, highest")
    for label in sorted({key.rsplit(".", 1)[1] for key in numbers if "_over_" in key}):
        if label.endswith("_wall"):
            continue
        values = sorted(v for key, v in numbers.items() if key.rsplit(".", 1)[1] == label)
        middle = statistics.median(values)
        print(f"  {label:36s} {values[0]:.3f}  {middle:.3f}  {values[-1]:.3f}  n={len(values)}")


def main() -> None:
    """Run the cases and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="MiniLM at batch 16, under 50 s")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    parser.add_argument("--only", help="cases whose name contains this")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--setting", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        memory_child(options.memory_of, options.setting)
        return
    assert isinstance(sys.stdout, io.TextIOWrapper)
    sys.stdout.reconfigure(line_buffering=True)
    peers = ", ".join(f"{name} {version(name)}" for name in PEERS)
    print(f"{peers}; {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores")
    numbers: dict[str, float] = {}
    for case in QUICK if options.quick else CASES:
        if options.only is None or options.only in case.setting.name:
            numbers |= measure_times(case)
            gc.collect()
            for live in (False, True)[: 0 if not case.memory else 1 if options.quick else 2]:
                numbers |= measure_memory(case, live=live)
    if numbers:
        numbers |= measure_noise(numbers)
    summary(numbers)
    if options.json:
        print(json.dumps({"versions": {n: version(n) for n in PEERS}} | numbers))


if __name__ == "__main__":
    main()
