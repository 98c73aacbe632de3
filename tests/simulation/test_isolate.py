"""`silotune simulate --isolate`: records in confined processes, and the same adapter to the last bit."""

import json

import pytest
from typer.testing import CliRunner

from silotune.cli import app
from tests.federation import PRIVATE, write_federation


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [{}, {**PRIVATE, "privacy.clip": 1.0, "rounds.local_steps": 2}]
)
def test_confined_processes_give_the_adapter_that_one_process_gives(
    tmp_path, bert_folder, settings
):
    dotted = {"rounds.number": 2, "optimizer.site.head_rounds": 1, **settings}
    changes = {key.replace(".", "__"): value for key, value in dotted.items()}
    made = write_federation(tmp_path / "sites", bert_folder, names=("alpha", "beta"), **changes)
    words = [f"{key}={json.dumps(value)}" for key, value in dotted.items() if "." in key]
    adapters = []
    for more in ([], ["--isolate"]):
        runs = tmp_path / f"runs{len(adapters)}"
        command = ["simulate", str(made.plan_path), "--runs", str(runs), "--device", "cpu", *more]
        ran = CliRunner().invoke(app, [*command, *(w for word in words for w in ("--set", word))])
        assert ran.exit_code == 0, ran.output
        assert ("would be confined without" in ran.output) == bool(more)
        (matrices,) = runs.rglob("adapter_model.safetensors")
        adapters.append(matrices.read_bytes())
        assert not [path for path in runs.rglob("scratch/*") if path.is_dir()]
    assert adapters[0] == adapters[1]
