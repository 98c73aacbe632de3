"""A small federation on disk: three sites of synthetic notes, a tiny model, a plan and policies."""

import csv
import json
import random
from dataclasses import dataclass
from pathlib import Path

from silotune.client.model_cache import ModelCache
from silotune.client.site_run import SiteRun
from silotune.data.site import SiteConfig, load_sites
from silotune.models.choices import Choices
from silotune.models.pretrained import weights_sha256
from silotune.plan.plan import Plan

CHOICES = Choices(device="cpu", dtype="float32", attention="eager")
SITES = ("alpha", "beta", "gamma")
PRIVATE = {
    "privacy.mode": "record",
    "privacy.epsilon": 8.0,
    "privacy.delta": 1e-4,
    "privacy.clip": {"head": 1.0, "adapter": 1.0},
}


def underscored(settings):
    """Dotted plan keys as `write_federation` takes them, with ``__`` for the dot."""
    return {key.replace(".", "__"): value for key, value in settings.items()}


def banded(rounds, **settings):
    """Dotted plan keys of a private head whose noise is correlated over three rounds."""
    return {
        **PRIVATE,
        "rounds.number": rounds,
        "rounds.evaluate_every": 0,
        "lora": {"target_modules": "none", "r": 1},
        "optimizer.site.head_rounds": rounds,
        "optimizer.server": {"name": "sgd", "momentum": 0.5},
        "privacy.rate": 0.3,
        "privacy.bands": 3,
        **settings,
    }


POLICY = {
    "approval": "manual",
    "max_epsilon": 8.0,
    "max_total_epsilon": 9.0,
    "max_delta": 1e-3,
    "allow_seeded_noise": True,
    "require_secure_aggregation": False,
    "min_cohort": 1,
    "tasks": ["text_classification"],
    "target_modules": ["auto"],
    "strategies": ["fedavg"],
    "max_rounds": 10,
    "max_upload_mb": 1.0,
    "hours": ["Mon-Sun 00:00-24:00"],
}
"""Clauses that let a private plan of `write_federation` pass."""


@dataclass(frozen=True)
class Federation:
    folder: Path
    plan: Plan
    plan_path: Path

    @property
    def sites(self) -> list[SiteConfig]:
        return list(load_sites(self.folder))

    def runs(
        self,
        plan: Plan | None = None,
        *,
        run: str = "r",
        state: str = "s",
        models: ModelCache | None = None,
    ) -> list[SiteRun]:
        """The sites' parts in a run, in one process."""
        models = models or ModelCache(CHOICES)
        return [
            SiteRun(
                site,
                state=self.folder / state / site.name,
                plan=plan or self.plan,
                run=run,
                models=models,
            )
            for site in self.sites
        ]


def write_federation(
    folder: Path,
    base: Path,
    *,
    patients: bool = False,
    names: tuple[str, ...] = SITES,
    **settings,
) -> Federation:
    """Make one; `settings` are dotted plan keys with ``__`` for the dot."""
    rng = random.Random(5)
    words = {"no": ["cough", "sprain", "fever", "cut"], "yes": ["asthma", "gout", "copd", "lupus"]}
    for number, name in enumerate(names):
        place = folder / name
        place.mkdir(parents=True)
        rows = []
        for i in range(60 + 20 * number):
            label = rng.choice(["no", "yes"])
            text = f"{rng.choice(words[label])} of the {rng.choice(['left', 'right'])} side {i}"
            rows.append([text, label, f"{name}-{i // 2}"])
        with (place / "notes.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["note", "chronic", "patient"], *rows])
        unit = 'unit = "patient"\nmax_records_per_unit = 2' if patients else 'unit = "record"'
        column = 'unit = "patient"' if patients else ""
        declared = len(rows) // 2 if patients else len(rows)
        (place / "site.toml").write_text(f"""
name = "{name}"
[datasets.notes]
format = "csv"
path = "notes.csv"
{unit}
declared_units = {declared // 10 * 10}
[datasets.notes.columns]
text = "note"
label = "chronic"
{column}
[datasets.notes.budget]
epsilon = 9.0
delta = 1e-3
""")
    path = folder / "plan.toml"
    path.write_text(f"""
[plan]
name = "small"
purpose = "tests"
seed = 11
[model]
base = "{base}"
task = "text_classification"
labels = ["no", "yes"]
dtype = "float32"
[lora]
r = 2
alpha = 4.0
last_layers = 2
[data]
dataset = "notes"
max_length = 24
[rounds]
number = 5
min_sites = 2
deadline = 600.0
evaluate_every = 2
[optimizer.site]
head_rounds = 2
adapter_lr = 0.01
head_lr = 0.1
[privacy]
mode = "none"
rate = 0.2
""")
    changes = {key.replace("__", "."): value for key, value in settings.items()}
    if patients:
        changes |= {"privacy.unit": "patient", "privacy.max_records_per_unit": 2}
    plan = Plan.load(path).override(changes)
    return Federation(folder, plan, path)


def write_policy(config: Path, base: Path, **clauses) -> str:
    """Add `POLICY`, with other or more `clauses`, to a site.toml; the hash of the one base allowed."""
    sha256 = weights_sha256(base)
    lines = [f"{name} = {json.dumps(value)}" for name, value in {**POLICY, **clauses}.items()]
    tables = [
        "[policy]",
        *lines,
        "[policy.base_models]",
        f'"{sha256}" = "{base}"',
        '[resources]\nthreads = 1\ndevice = "cpu"\n',
    ]
    config.write_text(config.read_text() + "\n".join(tables))
    config.chmod(0o600)
    return sha256


def trainer_of(run):
    """A site's trainer as comparisons use it: the noise of a round is in its update."""
    if "trainer" not in vars(run):
        run.trainer = run.training.alone()
    return run.trainer
