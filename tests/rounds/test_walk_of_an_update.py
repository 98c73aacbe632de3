"""From the trainer to the sum: which modules an update passes, and how often it is turned into bytes.

The trainer gives sums without noise. What is released is made of them beside the ledger: of whoever has
them until then each is named here. From there on the update keeps its bytes.
"""

import sys
from collections.abc import Mapping
from dataclasses import fields, is_dataclass

import numpy as np
import pytest
from flwr.app import ArrayRecord, Message

from silotune.client import updates
from silotune.client.trainer import Trainer
from silotune.client.updates import Updates
from silotune.strategies.linear import LinearStrategy
from tests.federation import write_federation
from tests.whole_run import play

MOST_MODULES = 12  # between what is released and the sum
MAKERS = {
    "silotune.client.trainer",
    "silotune.client.training.base",
    "silotune.client.model_cache",
    "silotune.client.updates",
    "silotune.client.terms",
    "silotune.privacy.noise",
    "silotune.strategies.base",
    "silotune.strategies.site_privacy",
}
_DEPTH = 5


class Walk:
    """Follows the first update of a run, by its own bytes, through whatever takes it or gives it on.

    Attributes
    ----------
    marks : list of bytes
        How its sums begin as the trainer gave them; then also how they begin with their noise.
    makers : list of str
        Modules that had it before it was what is released.
    modules : list of str
        Those that had it since, up to the sum.
    """

    def __init__(self):
        self.marks, self.makers, self.modules, self.encoded, self.decoded = [], [], [], 0, 0
        self.made = self.arrived = False

    def mark(self, flat):
        self.marks.append(flat.tobytes()[:256])

    def marked(self, data):
        return any(mark in data for mark in self.marks)

    def holds(self, value, depth=_DEPTH):
        if isinstance(value, np.ndarray):
            return value.dtype != object and self.marked(value.tobytes())
        if isinstance(value, bytes | bytearray):
            return self.marked(value)
        if depth == 0 or isinstance(value, str | int | float | type(None)):
            return False
        if isinstance(value, Message):
            value = value.content if value.has_content() else ()
        if isinstance(value, ArrayRecord):
            return any(self.marked(array.data) for array in value.values())
        if isinstance(value, Mapping):
            value = value.values()
        elif is_dataclass(value) and not isinstance(value, type):
            value = [getattr(value, each.name, None) for each in fields(value)]
        if isinstance(value, list | tuple) or type(value).__name__.endswith("alues"):
            return any(self.holds(each, depth - 1) for each in value)
        return False

    def see(self, frame, event, given):
        name = frame.f_globals.get("__name__", "")
        if event != "return" or not self.marks or self.arrived or name in self.passed:
            return
        if not name.startswith("silotune.") or frame.f_code.co_name == "<genexpr>":
            return
        names = frame.f_code.co_varnames[
            : frame.f_code.co_argcount + frame.f_code.co_kwonlyargcount
        ]
        if self.holds(given) or any(self.holds(frame.f_locals.get(n)) for n in names):
            self.passed.append(name)

    @property
    def passed(self):
        return self.modules if self.made else self.makers


@pytest.fixture
def walk(monkeypatch):
    walk, train, make, fold = Walk(), Trainer.round, Updates.of_round, LinearStrategy.fold
    add_noise, save, load = updates.noised, np.save, np.load

    def training(self, *args, **options):
        update = train(self, *args, **options)
        if not walk.marks:
            walk.mark(update.flat)
        return update

    def noising(sums, *args, **options):
        made = add_noise(sums, *args, **options)
        if len(walk.marks) == 1 and walk.holds(sums):
            walk.mark(made)
        return made

    def making(self, *args, **options):
        update = make(self, *args, **options)
        walk.made |= bool(walk.marks) and walk.holds(update)
        return update

    def folding(self, terms, update):
        if walk.marks and update.tobytes().startswith(walk.marks[-1]):
            walk.arrived = True
        return fold(self, terms, update)

    def saving(file, array, **options):
        walk.encoded += walk.holds(array)
        return save(file, array, **options)

    def loading(file, **options):
        found = load(file, **options)
        walk.decoded += not walk.arrived and walk.holds(found)
        return found

    monkeypatch.setattr(Trainer, "round", training)
    monkeypatch.setattr(updates, "noised", noising)
    monkeypatch.setattr(Updates, "of_round", making)
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
    assert walk.arrived and len(walk.marks) == 2
    assert {"silotune.client.updates", "silotune.privacy.noise"} <= set(walk.makers) <= MAKERS
    assert len(walk.modules) <= MOST_MODULES, walk.modules
    assert {"silotune.client.gate", "silotune.protocol.replies"} <= set(walk.modules)
    assert (walk.encoded, walk.decoded) == (1, 1)
