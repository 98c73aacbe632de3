"""Every planted fault is caught, by a catcher that is content without it."""

import pytest

from tests.planted.catchers import World
from tests.planted.faults import FAULTS

CATCHERS = list(dict.fromkeys(fault.catcher for fault in FAULTS))


@pytest.fixture(scope="module")
def world(tmp_path_factory, bert_folder, llama_folder):
    return World(tmp_path_factory.mktemp("planted"), bert_folder, llama_folder)


@pytest.mark.parametrize("catcher", CATCHERS, ids=lambda catcher: catcher.__name__)
def test_a_catcher_is_content_with_the_code_as_it_is(world, catcher):
    catcher(world)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.what)
def test_a_planted_fault_is_caught(world, monkeypatch, fault):
    fault.plant(monkeypatch)
    with pytest.raises(fault.raises):
        fault.catcher(world)


def test_no_fault_is_listed_twice():
    assert len({fault.what for fault in FAULTS}) == len(FAULTS) >= 20
