"""Memory of a simulation: freed memory is used again, and scoring takes no more than training."""

import subprocess
import sys
from pathlib import Path

import pytest

from silotune.data.records import Split
from silotune.models.layout import initial_adapter
from silotune.simulation.program import score
from tests.federation import write_federation

CYCLES, BLOCKS, SIZE, PAGE = 4, 12, 4 << 20, 4096

_SCRIPT = f"""
import resource, sys
from silotune.simulation.workers import keep_freed_memory
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


@pytest.mark.slow
def test_a_causal_model_takes_little_more_memory_than_a_plain_loop(tmp_path):
    """Training and scoring; a vocabulary of 40,000 makes logits of anything more show."""

    def ran(how):
        found = subprocess.run(
            [sys.executable, "-m", "tests.simulation.causal_memory", str(tmp_path), how],
            check=True, capture_output=True, text=True, cwd=Path(__file__).parents[2],
        )  # fmt: skip
        return int(found.stdout.split()[-1]) if how != "write" else 0

    ran("write")
    plain, site = ran("plain"), ran("site")
    print(f"plain loop {plain / 1e6:.0f} MB, simulated site {site / 1e6:.0f} MB")
    assert plain > 100e6  # else there is nothing to compare
    assert site <= 1.3 * plain


@pytest.mark.parametrize("most", [4, 13])
def test_nothing_is_scored_with_more_records_at_once_than_the_plan_allows(
    tmp_path, bert_folder, monkeypatch, most
):
    settings = {"privacy__max_physical_batch": most, "rounds__evaluate_every": 1}
    run = write_federation(tmp_path, bert_folder, **settings).runs()[0]
    task, sizes = type(run.training.trainable.model.task), []
    plain = task.score

    def noted(self, model, batch, **options):
        sizes.append(len(batch["input_ids"]))
        return plain(self, model, batch, **options)

    monkeypatch.setattr(task, "score", noted)
    adapter = initial_adapter(run.training.trainer.layout, run.plan)
    score(run.training, adapter, split=Split.TRAIN, frozen=False)
    trained = len(sizes)
    run.evaluate(adapter, 1)
    assert 0 < trained < len(sizes)
    assert max(sizes) <= most
