"""Each task of text at real sites: enrolled, approved and run by the real commands, as simulated."""

import pytest

from tests.e2e.harness import same
from tests.task_sites import CASES, mark_spans, retell, settings_of

SPANS = {
    "model.task": "token_classification", "model.labels": ["ILL", "SIDE"], "data.max_length": 16,
}  # fmt: skip
FEW = {"rounds.number": 2, "optimizer.site.head_rounds": 1}


def learned(made, task, tmp_path):
    """Allow the task at every site, run the plan, hold its adapter to the simulation's."""
    for path in (made.folder / "sites").glob("*/site.toml"):
        path.write_text(path.read_text().replace('["text_classification"]', f'["{task}"]'))
        path.chmod(0o600)
    made.up()
    run = made.propose()
    row = made.coordinator.wait_over(run)
    assert row["state"] == "finished", row
    deployed = made.coordinator.adapter(run, tmp_path / "adapter")
    for site in made.sites.values():
        site.terminate()
    assert same(deployed, made.simulated())
    assert made.charges(run) == {name: [1, 2] for name in made.sites}


def underscored(settings):
    return {key.replace(".", "__"): value for key, value in settings.items()}


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
