"""Promise 1: once a site has agreed to a plan, nothing it shows depends on records uncharged.

Each attack is what a coordinator may send; what leaves two sites that differ in one record is compared:
codes, names, types and sizes of what is released, and the books whose heads the coordinator sees.
"""

import csv
import shutil

import numpy as np
import pytest

from silotune.client import model_cache
from silotune.client.errors import BroadcastRefused, RoundUnanswered
from silotune.client.model_cache import ModelCache
from silotune.client.site_run import SiteRun
from silotune.client.trainer import Trainer
from silotune.data.records import Split
from silotune.errors import RecordInvalid, SilotuneError
from silotune.models.layout import initial_adapter
from silotune.privacy.ledger import ReleaseKey
from tests.client.test_secure import Round
from tests.client.test_secure import federation as federation  # noqa: PLC0414 - a fixture
from tests.federation import CHOICES, PRIVATE, write_federation

ROUNDS = 20


@pytest.fixture(scope="module")
def models():
    return ModelCache(CHOICES)


class Pair:
    """A site, and its neighbour that lacks the last record."""

    def __init__(self, folder, bert_folder, models, *, labels=None, **settings):
        wanted = {key.replace(".", "__"): value for key, value in PRIVATE.items()}
        wanted |= {"rounds__number": ROUNDS, "privacy__rate": 0.5, **settings}
        made = write_federation(folder / "with", bert_folder, names=("alpha",), **wanted)
        self.plan, self.folder, self.models = made.plan, folder, models
        notes = folder / "with" / "alpha" / "notes.csv"
        rows = list(csv.reader(notes.open(newline="")))
        if labels is not None:
            rows[1:] = [[t, label, p] for (t, _, p), label in zip(rows[1:], labels, strict=True)]
            self.write(notes, rows)
        shutil.copytree(folder / "with", folder / "without")
        self.write(folder / "without" / "alpha" / "notes.csv", rows[:-1])

    @staticmethod
    def write(path, rows):
        with path.open("w", newline="") as file:
            csv.writer(file).writerows(rows)

    def run(self, which, state="state"):
        from silotune.data.site import SiteConfig

        return SiteRun(
            SiteConfig.load(self.folder / which / "alpha" / "site.toml"),
            state=self.folder / which / state,
            plan=self.plan,
            run="r",
            models=self.models,
        )

    def runs(self):
        return [self.run("with"), self.run("without")]


def shown(call):
    """What the coordinator sees of an answer: a code, or what there is and how large it is."""
    try:
        reply = call()
    except SilotuneError as exc:
        return exc.code
    arrays = [
        (name, key, array.dtype, tuple(array.shape), len(array.data))
        for name, record in sorted(reply.array_records.items())
        for key, array in record.items()
    ]
    others = {**reply.config_records, **reply.metric_records}
    return arrays, {name: dict(record) for name, record in others.items()}


def books(run):
    return [
        (r.entry.kind, r.entry.round, r.entry.release, r.entry.event) for r in run.ledger.rows()
    ]


def flat(run, value=0.0):
    return np.full(run.training.trainable.model.layout.size, value, dtype=np.float32)


def warm_start(run):
    """An adapter in which everything has a gradient."""
    layout = run.training.trainable.model.layout
    noise = np.random.default_rng(0).normal(0, 0.05, layout.size).astype(np.float32)
    return initial_adapter(layout, run.plan) + noise


def along_a_text(run, row):
    """A head with the largest weights there are, along the features of one record's text."""
    adapter, layout = flat(run), run.training.trainable.model.layout
    features = run.training.trainer.frozen.features[row].numpy()
    weight = np.stack([features, -features]) * np.float32(1e37)
    layout.unpack(adapter)["head.weight"][:] = weight
    return adapter


def test_a_weight_without_bound_tells_nobody_whether_a_text_is_there(tmp_path, bert_folder, models):
    """(a): before, half of the rounds failed with the person in the data, and none without."""
    pair = Pair(tmp_path, bert_folder, models, optimizer__site__head_rounds=ROUNDS)
    here, gone = pair.runs()
    for run in (here, gone):
        run.join()
    last = int(here.training.records.rows(Split.TRAIN)[-1])
    adapter = along_a_text(here, last)
    answers = [
        [shown(lambda r=r, n=n: r.train(adapter, n)) for n in range(1, 6)] for r in (here, gone)
    ]
    assert answers[0] == answers[1] == [BroadcastRefused.code] * 5
    assert [kind for kind, *_ in books(here)] == ["reserve"]  # no record was touched for it
    bounded = np.clip(adapter, -1e6, 1e6)
    answers = [
        [shown(lambda r=r, n=n: r.train(bounded, n)) for n in range(1, 6)] for r in (here, gone)
    ]
    assert answers[0] == answers[1]
    assert all(isinstance(answer, tuple) for answer in answers[0])
    assert books(here) == books(gone)


def test_a_saturated_head_tells_nobody_whether_a_label_is_there(tmp_path, bert_folder, models):
    """(b): before, the check for tensors without a gradient failed exactly without the label."""
    labels = ["yes"] * 59 + ["no"]
    pair = Pair(tmp_path, bert_folder, models, labels=labels, optimizer__site__head_rounds=0)
    answers, ledgers = [], []
    for run in pair.runs():
        run.join()
        adapter = warm_start(run)
        adapter[-2:] = (-1e5, 1e5)  # the head's bias: every text is "yes", beyond any gradient
        answers.append([shown(lambda r=run, a=adapter, n=n: r.train(a, n)) for n in range(1, 9)])
        ledgers.append(books(run))
    assert answers[0] == answers[1]
    assert all(isinstance(answer, tuple) for answer in answers[0])
    assert ledgers[0] == ledgers[1]


def hostile(run):
    """Instructions of every phase, honest and not, in an order of the coordinator's choice."""
    good = warm_start(run)
    for number, adapter in enumerate(
        [good, flat(run), flat(run, 1e6), flat(run, np.nan), flat(run, np.inf), flat(run, 3e38),
         good[:-1], np.zeros(0, np.float32)], start=1,
    ):  # fmt: skip
        yield lambda n=number, a=adapter: run.train(a, n)
        yield lambda n=number, a=adapter: run.train(a, n)  # again: the same answer, free
        yield lambda n=number, a=adapter: run.evaluate(a, n)
    for number in (0, -1, ROUNDS + 1):
        yield lambda n=number: run.train(good, n)
    yield lambda: run.train(good, 9, clip=1e-30)
    yield lambda: run.train(good, 12)
    yield lambda: run.train(good, 10)  # after a later one
    yield lambda: run.train(good, 13)


def out_of_memory(run, monkeypatch):
    """The last record can't be computed, alone or with others."""
    last, plain = len(run.training.records) - 1, Trainer._losses

    def losses(self, batch, phase):
        if last in batch.rows:
            raise MemoryError("a very long text")
        return plain(self, batch, phase)

    monkeypatch.setattr(Trainer, "_losses", losses)


def not_finite(run, monkeypatch):
    last, plain = len(run.training.records) - 1, Trainer._losses

    def losses(self, batch, phase):
        import torch

        bad = torch.tensor([np.nan if row == last else 1.0 for row in batch.rows])
        return plain(self, batch, phase) * bad.float()

    monkeypatch.setattr(Trainer, "_losses", losses)


CORRELATED = {
    "lora": {"target_modules": "none", "r": 1},
    "optimizer__site__head_rounds": ROUNDS,
    "optimizer__server": {"name": "sgd", "momentum": 0.5},
    "privacy__bands": 3,
    "privacy__rate": 0.3,
}


@pytest.mark.parametrize("fault", [None, out_of_memory, not_finite])
@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer__site__head_rounds": 0, "privacy__rate": 0.9},
        {"optimizer__site__head_rounds": ROUNDS, "privacy__rate": 0.9},
        CORRELATED,
    ],
    ids=["adapter", "head", "correlated noise"],
)
def test_neighbouring_sites_show_the_same_whatever_is_asked(
    tmp_path, bert_folder, models, monkeypatch, fault, settings
):
    """For what one record does, its unit's part is the only thing that changes."""
    pair = Pair(tmp_path, bert_folder, models, privacy__metrics_share=0.1, **settings)
    seen, ledgers = [], []
    for which in ("with", "without"):
        run = pair.run(which)
        with monkeypatch.context() as patch:
            if fault is not None and which == "with":
                fault(run, patch)
            seen.append([shown(run.join), *map(shown, hostile(run))])
        ledgers.append(books(run))
    assert seen[0] == seen[1]
    assert ledgers[0] == ledgers[1]
    assert not (pair.run("with").troubles.too_many)


def test_records_that_cannot_be_read_are_answered_with_noise_and_then_the_run_stops_here(
    tmp_path, bert_folder, models, monkeypatch
):
    pair = Pair(tmp_path, bert_folder, models)
    honest = pair.run("without")
    honest.join()
    want = [shown(lambda n=n: honest.train(warm_start(honest), n)) for n in (1, 2, 3)]
    run = pair.run("with")

    def unreadable(*args, **kwargs):
        raise RecordInvalid("row 7")

    monkeypatch.setattr(model_cache, "load_records", unreadable)
    assert shown(run.join) == shown(honest.join)
    adapter = warm_start(run)
    answers = [shown(lambda n=n: run.train(adapter, n)) for n in range(1, 6)]
    assert answers == want + [RoundUnanswered.code] * 2
    assert len(run.ledger.events("notes")) == 3  # charged, whatever came of them
    lines = (pair.folder / "with" / "state" / "troubles.jsonl").read_text()
    assert lines.count('"blank"') == 3 and "ST-205" in lines
    again = pair.run("with")  # a restart forgets nothing
    assert shown(lambda: again.train(adapter, 6)) == RoundUnanswered.code


def test_a_round_is_charged_before_any_record_is_touched(
    tmp_path, bert_folder, models, monkeypatch
):
    pair = Pair(tmp_path, bert_folder, models)
    run, charged = pair.run("with"), []
    run.join()
    plain = Trainer.round

    def noted(self, *args, **kwargs):
        charged.append(len(run.ledger.events("notes")))
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "round", noted)
    run.train(warm_start(run), 1)
    assert charged == [1]


def test_a_round_cut_short_is_done_again_once_under_one_charge(
    tmp_path, bert_folder, models, monkeypatch
):
    pair = Pair(tmp_path, bert_folder, models)

    class Killed(BaseException):
        pass

    def killed(self, *args, **kwargs):
        raise Killed

    def die(number):
        run = pair.run("with")  # a new process
        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "round", killed)
            with pytest.raises(Killed):
                run.train(adapter, number)
        run.ledger.close()

    first = pair.run("with")
    first.join()
    adapter = warm_start(first)
    first.ledger.close()
    die(1)
    run = pair.run("with")
    assert len(run.ledger.events("notes")) == 1  # charged when it began
    answer = run.train(adapter, 1)
    assert shown(lambda: run.train(adapter, 1)) == shown(lambda: answer)
    assert len(run.ledger.events("notes")) == 1
    assert run.ledger.payload_of(ReleaseKey("r", 1, "update")) is not None
    run.ledger.close()
    die(2)
    run = pair.run("with")
    assert shown(lambda: run.train(adapter, 2)) == RoundUnanswered.code
    assert shown(lambda: run.train(adapter, 3)) == RoundUnanswered.code
    assert len(run.ledger.events("notes")) == 2
    assert run.ledger.verify() == run.ledger.head


def test_under_secure_aggregation_no_site_fails_alone(federation, monkeypatch):
    """(c): before, a site whose step failed said so, where only sums should be seen."""
    played = Round(federation, "failing")
    honest = played.masked("beta")

    def broken(self, *args, **kwargs):
        raise MemoryError("a very long text")

    monkeypatch.setattr(Trainer, "_losses", broken)
    answer = played.masked("alpha")
    assert shown(lambda: answer)[0] == shown(lambda: honest)[0]
    assert len(played.parts["alpha"].ledger.events("notes")) == 1


@pytest.mark.parametrize(
    "changes", [{"aggregation.strategy": "fedsa"}, {"aggregation.head": "local"}]
)
def test_kept_parts_count_only_with_the_round_that_is_released(
    tmp_path, bert_folder, models, monkeypatch, changes
):
    """Before, rounds that died between the two were trained on, and never charged."""
    settings = {key.replace(".", "__"): value for key, value in changes.items()}
    pair = Pair(tmp_path, bert_folder, models, optimizer__site__head_rounds=0, **settings)
    run = pair.run("with")
    run.join()
    adapter = warm_start(run)
    with monkeypatch.context() as patch:
        patch.setattr(run.ledger, "bind", lambda *args: (_ for _ in ()).throw(OSError("full")))
        assert shown(lambda: run.train(adapter, 1)) == RoundUnanswered.code
    assert len(run.ledger.events("notes")) == 1
    for part in (run, pair.run("with")):  # neither in this process nor after a restart
        assert part.updates.personal(adapter, before=9) is adapter
    run.train(adapter, 1)
    own = pair.run("with").updates.personal(adapter, before=2)
    assert np.abs(own - adapter).max() > 0
    assert len(run.ledger.events("notes")) == 1
