"""Promise 5: one plan, one code path; only the transport differs."""

from silotune.simulation.run import Settings
from tests.federation import SITES
from tests.whole_run import final, play


def test_one_worker_gives_the_same_adapter_as_two_bit_for_bit(federation, whole):
    assert final(play(federation, "one", settings=Settings(workers=1))) == final(whole[0])


def test_flowers_ray_engine_gives_the_same_adapter_bit_for_bit(federation, whole):
    directory = play(federation, "ray", settings=Settings(engine="ray", workers=1))
    assert final(directory) == final(whole[0])
    assert directory.read_json("privacy.json")["sites"].keys() == set(SITES)
