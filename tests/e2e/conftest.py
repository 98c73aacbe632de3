"""Federations of real processes for the tests of this folder."""

import pytest

from tests.e2e.harness import Federation


@pytest.fixture
def federation(tmp_path, bert_folder):
    """Make federations; all their processes are ended when the test is over."""
    made = []

    def make(**settings):
        made.append(Federation(tmp_path / f"federation{len(made)}", bert_folder, **settings))
        return made[-1]

    yield make
    for each in made:
        each.close()
