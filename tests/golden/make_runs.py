"""Wrote the golden files of simulations: a run to its end, one that was stopped, and an adapter."""

import json
import os
import shutil
import tempfile
from contextlib import chdir, suppress
from pathlib import Path
from unittest.mock import patch

import torch
from transformers import BertConfig, BertModel

from silotune.plan.written import plan_toml
from silotune.simulation import run
from silotune.simulation.run import Settings
from tests.federation import write_federation
from tests.golden.read_runs import HERE
from tests.golden.registry import GOLDEN, makes
from tests.models.model_material import trained_tokenizer
from tests.statistics_sites import SECURE, write_wards
from tests.vote_sites import write_voters
from tests.whole_run import in_this_process, play

OVERRIDES = {
    "rounds.number": 3,
    "rounds.evaluate_every": 1,
    "optimizer.site.head_rounds": 1,
    "data.max_length": 16,
}
BASE = GOLDEN / "adapter" / "base"
_UNREAD = ("logs", "scratch", "outbox", "timings.json", "README.md", "run.lock")


@makes("adapter")
def adapter(folder):
    """A base model of two tiny layers, and an adapter that a run of it left."""
    write_base(folder / "base")
    with tempfile.TemporaryDirectory() as scratch:
        made = simulated(Path(scratch) / "run", folder / "base", None)
        for path in (made / "adapters" / "final").iterdir():
            shutil.copyfile(path, folder / path.name)
        plan = json.loads((made / "resolved.json").read_text())["plan"]
    (folder / "plan.json").write_text(json.dumps(plan, sort_keys=True, separators=(",", ":")))


def write_base(folder):
    tokenizer = trained_tokenizer()
    tokenizer.pad_token = "</s>"
    with torch.random.fork_rng():
        torch.manual_seed(4)
        BertModel(
            BertConfig(
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=16,
                vocab_size=len(tokenizer),
                max_position_embeddings=32,
                initializer_range=0.2,
            )
        ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@makes("run_finished")
def run_finished(folder):
    made = simulated(folder, BASE, Settings(workers=1, baselines=True))
    shutil.rmtree(made / "adapters" / "final")  # see `adapter`
    for site in ("alpha", "beta"):
        shutil.rmtree(folder / site)
        for name in ("split.secret.sealed", "vault.json", "vault.key"):
            (made / "sites" / site / name).unlink()


@makes("statistics.json")
def statistics(path):
    """What a run of statistics found at four small sites."""
    with tempfile.TemporaryDirectory() as scratch:
        wards = write_wards(Path(scratch) / "sites")
        with patch.object(run, "WorkerGrid", in_this_process):
            made = run.simulate(
                wards.plan_path,
                runs=Path(scratch) / "runs",
                settings=Settings(workers=1),
                listener=lambda event: None,
                overrides=SECURE,
            )
        shutil.copyfile(made.root / "statistics.json", path)


@makes("votes.json")
def votes(path):
    """What a vote at three small sites came to."""
    with tempfile.TemporaryDirectory() as scratch:
        _, _, plan = write_voters(Path(scratch) / "sites", BASE)
        plan_path = Path(scratch) / "sites" / "vote.toml"
        plan_path.write_text(plan_toml(plan))
        shutil.copyfile(simulated_here(plan_path, scratch).root / "votes.json", path)


def simulated_here(path, scratch):
    with patch.object(run, "WorkerGrid", in_this_process):
        return run.simulate(
            path,
            runs=Path(scratch) / "runs",
            settings=Settings(workers=1),
            listener=lambda event: None,
        )


@makes("run_stopped")
def run_stopped(folder):
    """Stopped by Control-C behind its second round."""

    def listener(event):
        if event["event"] == "round_finished" and event["round"] == 2:
            raise KeyboardInterrupt

    simulated(folder, BASE, None, listener=listener)


def simulated(folder, base, settings, *, listener=lambda event: None):
    """The sites' folders and the run directory; as plan and paths have them, wherever they lie."""
    folder.mkdir(exist_ok=True)
    with chdir(folder):
        Path("base").symlink_to(base.resolve())
        federation = write_federation(Path(), Path("base"), names=("alpha", "beta"))
        with suppress(KeyboardInterrupt):
            play(federation, "made", settings=settings, listener=listener, **OVERRIDES)
        for name in ("base", "plan.toml"):
            Path(name).unlink()
    (made,) = (folder / "made").iterdir()
    resolved = made / "resolved.json"
    resolved.write_text(resolved.read_text().replace(os.fspath(folder.resolve()), HERE))
    for path in sorted(made.rglob("*")):
        if path.name in _UNREAD:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return made
