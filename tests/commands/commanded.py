"""A small federation and what a person would type to simulate it."""

import json

from silotune.rounds.run_directory import RunDirectory
from tests.federation import PRIVATE, write_federation

SECURE = {"aggregation.secure": True, "aggregation.cohort": 3, "aggregation.threshold": 2}
SECURED = {
    "none": PRIVATE,
    "local": {**PRIVATE, **SECURE},
    "shared": {**PRIVATE, **SECURE, "privacy.noise": "shared"},
}
"""Settings of a private plan, by how its sum is secured."""

MODELS = {
    "head": {"rounds.number": 3, "optimizer.site.head_rounds": 3},
    "lora": {"rounds.number": 3, "optimizer.site.head_rounds": 1},
    "causal": {"rounds.number": 3, "privacy.clip": 1.0},
}
"""Settings by what is trained."""


def causal_federation(folder, base):
    """The notes of `write_federation` as prompts, whose kinds are the responses."""
    made = write_federation(folder, base)
    for path in folder.glob("*/site.toml"):
        text = path.read_text().replace('text = "note"', 'prompt = "note"')
        path.write_text(text.replace('label = "chronic"', 'response = "chronic"'))
    text = made.plan_path.read_text().replace("text_classification", "causal_lm")
    lines = [line for line in text.splitlines() if not line.startswith(("labels", "head_"))]
    made.plan_path.write_text("\n".join(lines))
    return made


def words(federation, **settings):
    """``silotune simulate`` with one worker and these settings."""
    sets = [f"--set={key}={_toml(value)}" for key, value in settings.items()]
    return ["simulate", str(federation.plan_path), f"--runs={_runs(federation)}", *sets]


def newest(federation):
    """The run directory that the last command left."""
    return RunDirectory.open(
        max(_runs(federation).iterdir(), key=lambda path: path.stat().st_ctime)
    )


def _runs(federation):
    return federation.folder / "runs"


def _toml(value):
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + "}"
    return "" if value is None else json.dumps(value)
