"""Each task of text at real sites: enrolled, approved and run by the real commands, as simulated."""

import pytest

from tests.federation import underscored
from tests.task_sites import CASES, mark_spans, retell, settings_of

SPANS = {
    "model.task": "token_classification", "model.labels": ["ILL", "SIDE"], "data.max_length": 16,
}  # fmt: skip
FEW = {"rounds.number": 2, "optimizer.site.head_rounds": 1}


def learned(made, task, tmp_path):
    """Allow the task at every site, run the plan, hold its adapter to the simulation's."""
    made.allow(task)
    made.up()
    run = made.propose()
    made.coordinator.wait_finished(run)
    assert made.as_simulated(run, tmp_path / "adapter")
    assert made.charges(run) == {name: [1, 2] for name in made.sites}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_labels_numbers_and_pairs_are_learned_at_real_sites(federation, tmp_path, name):
    settings = settings_of(CASES[name])
    made = federation(**underscored({**FEW, **settings}))
    retell(made.folder / "sites", CASES[name])
    learned(made, settings["model.task"], tmp_path)


@pytest.mark.slow
def test_spans_are_learned_at_real_sites(federation, tmp_path):
    made = federation(**underscored({**FEW, **SPANS}))
    mark_spans(made.folder / "sites")
    learned(made, "token_classification", tmp_path)
