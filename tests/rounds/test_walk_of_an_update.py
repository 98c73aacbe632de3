"""From the trainer to the sum: which modules an update passes, and how often it is turned into bytes."""

import sys
from collections.abc import Mapping
from dataclasses import fields, is_dataclass

import numpy as np
import pytest
from flwr.app import ArrayRecord, Message

from silotune.client.trainer import Trainer
from silotune.strategies.linear import LinearStrategy
from tests.federation import write_federation
from tests.whole_run import play

MOST_MODULES = 12
_DEPTH = 5


class Walk:
    """Follows the first update of a run, by its own bytes, through whatever takes it or gives it on."""

    def __init__(self):
        self.mark, self.modules, self.encoded, self.decoded = None, [], 0, 0
        self.arrived = False

    def holds(self, value, depth=_DEPTH):
        if isinstance(value, np.ndarray):
            return value.dtype != object and self.mark in value.tobytes()
        if isinstance(value, bytes | bytearray):
            return self.mark in value
        if depth == 0 or isinstance(value, str | int | float | type(None)):
            return False
        if isinstance(value, Message):
            value = value.content if value.has_content() else ()
        if isinstance(value, ArrayRecord):
            return any(self.mark in array.data for array in value.values())
        if isinstance(value, Mapping):
            value = value.values()
        elif is_dataclass(value) and not isinstance(value, type):
            value = [getattr(value, each.name, None) for each in fields(value)]
        if isinstance(value, list | tuple) or type(value).__name__.endswith("alues"):
            return any(self.holds(each, depth - 1) for each in value)
        return False

    def see(self, frame, event, given):
        name = frame.f_globals.get("__name__", "")
        if event != "return" or self.mark is None or self.arrived or name in self.modules:
            return
        if not name.startswith("silotune.") or frame.f_code.co_name == "<genexpr>":
            return
        names = frame.f_code.co_varnames[
            : frame.f_code.co_argcount + frame.f_code.co_kwonlyargcount
        ]
        if self.holds(given) or any(self.holds(frame.f_locals.get(n)) for n in names):
            self.modules.append(name)


@pytest.fixture
def walk(monkeypatch):
    walk, train, fold = Walk(), Trainer.round, LinearStrategy.fold
    save, load = np.save, np.load

    def training(self, *args, **options):
        update = train(self, *args, **options)
        if walk.mark is None:
            walk.mark = update.flat.tobytes()[:256]
        return update

    def folding(self, terms, update):
        if walk.mark is not None and walk.mark in update.tobytes():
            walk.arrived = True
        return fold(self, terms, update)

    def saving(file, array, **options):
        walk.encoded += walk.mark is not None and walk.holds(array)
        return save(file, array, **options)

    def loading(file, **options):
        found = load(file, **options)
        walk.decoded += walk.mark is not None and not walk.arrived and walk.holds(found)
        return found

    monkeypatch.setattr(Trainer, "round", training)
    monkeypatch.setattr(LinearStrategy, "fold", folding)
    monkeypatch.setattr(np, "save", saving)
    monkeypatch.setattr(np, "load", loading)
    return walk


def test_a_simulated_update_is_encoded_once_decoded_once_and_passes_few_modules(
    walk, tmp_path, bert_folder
):
    federation = write_federation(tmp_path, bert_folder)
    sys.setprofile(walk.see)
    try:
        play(federation, "walk", **{"rounds.number": 1, "optimizer.site.head_rounds": 0})
    finally:
        sys.setprofile(None)
    assert walk.arrived
    passed = [name for name in walk.modules if name != "silotune.client.trainer"]
    assert len(passed) <= MOST_MODULES, passed
    assert {"silotune.client.gate", "silotune.protocol.replies"} <= set(passed)
    assert (walk.encoded, walk.decoded) == (1, 1)
