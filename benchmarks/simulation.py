"""What a simulation costs, beside the obvious Flower recipe on Flower's Ray engine.

    python benchmarks/simulation.py            # seven hospitals, 1 and 8 steps a round; minutes
    python benchmarks/simulation.py --quick    # two small hospitals, 1 step: under 50 s
    python benchmarks/simulation.py --json     # the last line is one JSON object

rounds_*: federated LoRA of MiniLM's last three layers on the demonstration's hospitals. Both
contenders train the same shape of adapter at the same sites on batches of the same (expected) size
for the same number of steps, without differential privacy. Ours is the whole of `silotune simulate`:
ServerApp, gate, event log, checkpoint. The peer is `simulation_flower.py`. Both are started, one
after the other, and then take turns round by round. ``.ours_over_flower_ray`` compares rounds, and
``.run_ours_over_flower_ray`` all rounds and the start.

messages_*: a ClientApp that does nothing but read an array and send one of the same size, at 100
sites; again the two take turns.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

os.environ.update(
    HF_HUB_OFFLINE="1",
    FLWR_TELEMETRY_ENABLED="0",
    FLWR_DISABLE_UPDATE_CHECK="1",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_worker_niceness="0",  # as ours; by default Ray's actors yield to everything else
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",
)

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from silotune.data.demo import write_hospitals
from silotune.flower import messages as wire
from silotune.plan.plan import Plan
from silotune.simulation.baselines import IN_THE_CLEAR
from silotune.simulation.grid import WorkerGrid
from silotune.simulation.pool import SiteSlot
from silotune.simulation.run import Settings, simulate

PATIENCE = 600.0  # seconds for the other contender, before the benchmark gives up
RANK, LAYERS, BATCH, MAX_LENGTH = 4, [3, 4, 5], 32, 48
SLOTS = 100
SIZES = {"300k": 300_000, "20k": 20_000}
LEAST_PER_SECOND, MOST_MS = 300.0, 3.0


@dataclass(frozen=True)
class Scale:
    """A case: how much is measured."""

    sites: int
    rows: int | None
    rounds: int
    steps: int
    turns: int = 0
    workers: int = 2

    @property
    def name(self) -> str:
        return f"rounds_{self.steps}_step{'s' if self.steps > 1 else ''}"


FULL = (
    Scale(sites=7, rows=None, rounds=12, steps=1, turns=9),
    Scale(sites=7, rows=None, rounds=5, steps=8),
)
QUICK = (Scale(sites=2, rows=400, rounds=3, steps=1, turns=3),)


@dataclass
class Turns:
    """Two contenders, of whom one works while the other waits."""

    whose: str = ""
    seconds: dict[str, list[float]] = field(default_factory=dict)
    failed: list[BaseException] = field(default_factory=list)
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _began: float = 0.0

    def pass_to(self, name: str) -> None:
        with self._changed:
            self.whose = name
            self._changed.notify_all()

    def begin(self, name: str) -> None:
        with self._changed:
            in_time = self._changed.wait_for(lambda: self.whose == name or self.failed, PATIENCE)
            if self.failed or not in_time:
                raise RuntimeError("the other contender did not finish")
        self._began = time.perf_counter()

    def end(self, name: str, other: str) -> None:
        self.seconds.setdefault(name, []).append(time.perf_counter() - self._began)
        self.pass_to(other)

    def fail(self, exc: BaseException) -> None:
        with self._changed:
            self.failed.append(exc)
            self._changed.notify_all()


def hospitals(folder: Path, scale: Scale) -> tuple[Path, list[Path]]:
    """The demonstration, reduced to some sites and to a plan without privacy."""
    demo = write_hospitals(folder, rows_per_site=scale.rows)
    kept = list(demo.sites[: scale.sites])
    for site in demo.sites[scale.sites :]:
        (site / "site.toml").unlink()
    return demo.plan, kept


def overrides(scale: Scale) -> dict[str, object]:
    """The peer's settings, in the words of a plan."""
    return {
        **IN_THE_CLEAR,
        "privacy.mode": "none",
        "privacy.epsilon": None,
        "privacy.delta": None,
        "privacy.clip": None,
        "privacy.rate": None,
        "privacy.batch": BATCH,
        "lora.r": RANK,
        "lora.alpha": 2.0 * RANK,
        "lora.last_layers": len(LAYERS),
        "model.dtype": "float32",
        "data.max_length": MAX_LENGTH,
        "data.validation_share": 0.0,
        "data.test_share": 0.05,
        "rounds.number": scale.rounds,
        "rounds.min_sites": scale.sites,
        "rounds.local_steps": scale.steps,
        "rounds.evaluate_every": 0,
        "optimizer.site.head_rounds": 0,
        "optimizer.site.local": "adam",
        "optimizer.server.name": "adam" if scale.steps == 1 else "none",
    }


def run_ours(plan: Path, runs: Path, scale: Scale, turns: Turns, started: threading.Event) -> None:
    """`silotune simulate`, held up at the start of each round until it is its turn."""

    def listen(event) -> None:
        if event["event"] == "round_started":
            started.set()
            turns.begin("ours")
        elif event["event"] == "round_finished":
            turns.end("ours", "flower_ray")

    try:
        settings = Settings(workers=scale.workers)
        simulate(plan, runs=runs, settings=settings, listener=listen, overrides=overrides(scale))
    except BaseException as exc:
        turns.fail(exc)
        started.set()


def messages(nodes: list[int], size: int) -> list[Message]:
    """The same new adapter for every node."""
    values = np.random.default_rng().normal(size=size).astype(np.float32)
    content = RecordDict({"arrays": ArrayRecord({"flat": Array(values)})})
    return [Message(content, node, "train.nothing") for node in nodes]


def exchange(grid: Grid, nodes: list[int], size: int) -> float:
    """Seconds until every node has answered and every answer is read."""
    wire.identify(grid.run.run_id)  # Flower has one run a process in mind
    sent = messages(nodes, size)
    started = time.perf_counter()
    total = np.zeros(size, np.float32)
    for reply in grid.send_and_receive(sent, timeout=PATIENCE):
        total += reply.content["arrays"].to_numpy_ndarrays()[0]
    seconds = time.perf_counter() - started
    expected = sent[0].content["arrays"]["flat"].numpy() * len(nodes)
    np.testing.assert_allclose(total, expected, rtol=1e-3, atol=1e-3)
    return seconds


def measure_messages(grid: Grid, nodes: list[int], scale: Scale) -> dict[str, list[list[float]]]:
    """Seconds of ours and of the peer in each turn, by size."""
    slots = [SiteSlot(f"site-{number}") for number in range(SLOTS)]
    found = {}
    with WorkerGrid("simulation_noop:build", {}, slots, workers=scale.workers) as own:
        own.wait_until_ready()
        for name, size in SIZES.items():
            sides: list[tuple[Grid, list[int]]] = [(own, own.get_node_ids()), (grid, nodes)]
            taken: list[list[float]] = [[], []]
            for turn in range(scale.turns + 1):
                order = (0, 1) if turn % 2 else (1, 0)
                for side in order:
                    taken[side].append(exchange(*sides[side], size))
            found[name] = [seconds[1:] for seconds in taken]  # the first turn warms up
    return found


def settings_of_peer(plan: Path, sites: list[Path], scale: Scale) -> ConfigRecord:
    return ConfigRecord(
        {
            "folders": [str(site) for site in sites],
            "base": Plan.load(plan).model.base,
            "r": RANK,
            "layers": LAYERS,
            "batch": BATCH,
            "max-length": MAX_LENGTH,
            "steps": scale.steps,
        }
    )


def peer_app(
    config: ConfigRecord, scale: Scale, turns: Turns, found: dict, began: float
) -> ServerApp:
    """The peer's server; it also lets our no-op grid take turns with Flower's."""
    import simulation_flower

    app = ServerApp()

    def hook(server_round: int) -> None:
        if server_round:
            turns.end("flower_ray", "ours")
        else:
            turns.pass_to("ours")
        if server_round < scale.rounds:
            turns.begin("flower_ray")

    @app.main()
    def main(grid: Grid, context) -> None:
        try:
            by_site = partitions(grid)
            found["start"] = time.perf_counter() - began
            nodes = [by_site[number] for number in range(scale.sites)]
            simulation_flower.start_fedavg(
                grid, nodes=nodes, config=config, rounds=scale.rounds, hook=hook
            )
            if scale.turns:
                found["messages"] = measure_messages(grid, sorted(by_site.values()), scale)
        except BaseException as exc:
            turns.fail(exc)
            raise

    return app


def partitions(grid: Grid) -> dict[int, int]:
    """Node of each partition, once all nodes are there and their actors have answered."""
    nodes: list[int] = []
    while len(nodes) < SLOTS:
        nodes = list(grid.get_node_ids())
        time.sleep(0.05)
    asked = [Message(RecordDict(), node, "query.partition") for node in nodes]
    replies = grid.send_and_receive(asked, timeout=PATIENCE)
    return {
        int(reply.content["partition"]["number"]): reply.metadata.src_node_id for reply in replies
    }


def compete(folder: Path, scale: Scale) -> tuple[Turns, dict[str, float], dict]:
    """Run both; seconds by round, seconds of each start, and seconds of the messages."""
    plan, sites = hospitals(folder / "hospitals", scale)
    turns, started, found = Turns(), threading.Event(), {}
    began = time.perf_counter()
    ours = threading.Thread(
        target=run_ours, args=(plan, folder / "runs", scale, turns, started), daemon=True
    )
    ours.start()
    started.wait(PATIENCE)
    starts = {"ours": time.perf_counter() - began}
    if turns.failed:
        raise turns.failed[0]

    began = time.perf_counter()
    import simulation_flower
    from flwr.simulation import run_simulation

    app = peer_app(settings_of_peer(plan, sites, scale), scale, turns, found, began)
    run_simulation(
        app,
        simulation_flower.client_app,
        num_supernodes=SLOTS,
        backend_config={
            "init_args": {"num_cpus": scale.workers, "log_to_driver": False},
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        },
    )
    ours.join(PATIENCE)
    if turns.failed:
        raise turns.failed[0]
    starts["flower_ray"] = found["start"]
    return turns, starts, found.get("messages", {})


def paired(ours: list[float], peer: list[float]) -> tuple[float, float, float]:
    """Median, lowest and highest ratio of ours to the peer's time in the same turn."""
    ratios = [a / b for a, b in zip(ours, peer, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def show(label: str, seconds: list[float]) -> None:
    middle = statistics.median(seconds)
    print(f"  {label:34s} {middle:8.3f} s [{min(seconds):.3f} to {max(seconds):.3f}]")


def report_rounds(turns: Turns, starts: dict[str, float], scale: Scale) -> dict[str, float]:
    ours, peer = turns.seconds["ours"], turns.seconds["flower_ray"]
    case, rows = scale.name, scale.rows or "all"
    print(f"\n{case}: MiniLM, {scale.sites} sites of {rows} rows, {scale.steps} steps of {BATCH}")
    show("ours, a round", ours)
    show("flower_ray, a round", peer)
    print(f"  start: ours {starts['ours']:.1f} s, flower_ray {starts['flower_ray']:.1f} s")
    middle, low, high = paired(ours, peer)
    run = (starts["ours"] + sum(ours)) / (starts["flower_ray"] + sum(peer))
    print(f"  {case}.ours_over_flower_ray {middle:.3f} [{low:.3f} to {high:.3f}]")
    print(f"  {case}.run_ours_over_flower_ray {run:.3f}: start and {scale.rounds} rounds, once")
    return {
        f"{case}.ours_seconds": round(statistics.median(ours), 3),
        f"{case}.flower_ray_seconds": round(statistics.median(peer), 3),
        f"{case}.ours_over_flower_ray": round(middle, 4),
        f"{case}.ours_start_seconds": round(starts["ours"], 2),
        f"{case}.flower_ray_start_seconds": round(starts["flower_ray"], 2),
        f"{case}.run_ours_over_flower_ray": round(run, 4),
    }


def report_messages(found: dict[str, list[list[float]]]) -> dict[str, float]:
    numbers: dict[str, float] = {}
    for name, (ours, peer) in found.items():
        print(f"\nmessages_{name}: {SLOTS} sites, {SIZES[name]:,} float32 down and up, no training")
        for side, seconds in (("ours", ours), ("flower_ray", peer)):
            show(f"{side}, a round", seconds)
            middle = statistics.median(seconds)
            print(f"  {side:10s} {SLOTS / middle:.0f} a second, {middle / SLOTS * 1e3:.2f} ms each")
            numbers[f"messages_{name}.{side}_per_second"] = round(SLOTS / middle, 1)
        middle, low, high = paired(ours, peer)
        numbers[f"messages_{name}.ours_over_flower_ray"] = round(middle, 4)
        print(f"  messages_{name}.ours_over_flower_ray {middle:.3f} [{low:.3f} to {high:.3f}]")
    rate = numbers["messages_300k.ours_per_second"]
    each = 1e3 / numbers["messages_20k.ours_per_second"]
    print(f"\ntarget {LEAST_PER_SECOND:.0f} a second at 300k: {verdict(rate >= LEAST_PER_SECOND)}")
    print(f"target {MOST_MS:.0f} ms a message at 20k: {verdict(each <= MOST_MS)}")
    return numbers


def verdict(holds: bool) -> str:
    return "holds" if holds else "MISSED"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="less of everything, under 50 s")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    options = parser.parse_args()
    versions = {name: version(name) for name in ("flwr", "ray", "torch", "transformers", "peft")}
    logging.getLogger("flwr").setLevel(logging.ERROR)
    load = os.getloadavg()[0]
    print(
        f"peer: Flower {versions['flwr']} on Ray {versions['ray']}; "
        f"{os.cpu_count()} cores, load before {load:.1f}"
    )
    numbers: dict[str, float] = {}
    for scale in QUICK if options.quick else FULL:
        with tempfile.TemporaryDirectory() as folder:
            turns, starts, found = compete(Path(folder), scale)
        numbers |= report_rounds(turns, starts, scale)
        if found:
            numbers |= report_messages(found)
    if options.json:
        print(json.dumps({"versions": versions, **numbers}))


if __name__ == "__main__":
    sys.exit(main())
