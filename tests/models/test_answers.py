"""What heads answer: several labels, weighed classes, numbers, pairs; their losses, counts and cards."""

import math
import re
import warnings
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from sklearn.metrics import f1_score, mean_absolute_error, r2_score
from transformers import AutoTokenizer

from silotune.errors import PlanInvalid, RecordInvalid
from silotune.models.adapter import read_adapter, save_adapter, write_adapter
from silotune.models.answers import OneLabel, OneNumber, SeveralLabels, answer_of
from silotune.models.base import load_model
from silotune.models.batching import batches, pair_ids
from silotune.models.scores import every_label, mean_logit, metrics_of, of_cells, of_errors
from silotune.plan.sections import TargetSection
from silotune.privacy.clipping import attach
from silotune.privacy.engine import ClipGroup, DpSgd
from tests.models.model_material import CORPUS, a_plan, minilm, trained_tokenizer

WEIGHTS = {"yes": 3.0, "perhaps": 0.5}
KINDS = {
    "weighed": ("text_classification", {"model__class_weights": WEIGHTS}),
    "several": ("text_classification", {"model__multi_label": True}),
    "several weighed": (
        "text_classification",
        {"model__multi_label": True, "model__class_weights": WEIGHTS},
    ),
    "number": ("text_regression", {}),
    "pair": ("pair_classification", {}),
    "pair several": ("pair_classification", {"model__multi_label": True}),
}
RECORDS = [
    {"text": text, "text_b": CORPUS[(3 * row + 1) % len(CORPUS)], **target}
    for row, (text, target) in enumerate(
        zip(
            CORPUS,
            [
                {"label": label, "labels": labels, "value": value}
                for label, labels, value in [
                    ("no", "[]", "0"),
                    ("yes", '["no","yes"]', "10"),
                    ("perhaps", '["perhaps"]', "2.5"),
                    ("yes", '["no","perhaps","yes"]', "1e1"),
                    ("no", '["yes"]', "7"),
                    ("no", '["no"]', "3.25"),
                ]
            ],
            strict=True,
        )
    )
]
UNITS = np.array([0, 0, 1, 2, 2, 3])


def plan_of(base, kind, **more):
    task, settings = KINDS[kind]
    return a_plan(base, task, **settings, **more)


def moved(plan):
    """A model whose adapter and head are somewhere."""
    model = load_model(plan, device="cpu", attention="eager", dtype="float32")
    flat = np.random.default_rng(2).normal(0, 0.5, model.layout.size)
    write_adapter(model, flat.astype(np.float32))
    return model


def encoded(model):
    return model.task.encode(RECORDS, model.tokenizer, plan=model.plan)


def batch_of(model, rows):
    return model.task.collate(encoded(model), list(rows), model.device)


@pytest.mark.parametrize("clip", [0.05, 1e6])
@pytest.mark.parametrize("kind", KINDS)
def test_a_units_records_are_clipped_as_one_as_by_autograd_one_by_one(bert_folder, kind, clip):
    plan = plan_of(
        bert_folder, kind, privacy__mode="record", privacy__unit="patient", privacy__epsilon=8.0,
        privacy__delta=1e-5, privacy__clip=clip, privacy__max_records_per_unit=2,
    )  # fmt: skip
    plain, model = moved(plan), moved(plan)
    expected = [torch.zeros_like(p, dtype=torch.float64) for p in plain.parameters()]
    for unit in np.unique(UNITS):
        sums = [torch.zeros_like(total) for total in expected]
        for row in np.flatnonzero(unit == UNITS):
            (loss,) = plain.task.losses(plain.module, batch_of(plain, [int(row)]))
            found = torch.autograd.grad(loss, plain.parameters())
            sums = [a + b.double() for a, b in zip(sums, found, strict=True)]
        norm = float(torch.sqrt(sum((s**2).sum() for s in sums)))
        expected = [a + min(1.0, clip / norm) * b for a, b in zip(expected, sums, strict=True)]
    attached = attach(model.module, private=True)
    group = ClipGroup(name="all", parameters=model.parameters(), clip=clip)
    engine = DpSgd(attached, [group], sigma=1.0, noise=None)
    for rows in batches(encoded(model), range(len(UNITS)), size=3, units=UNITS):
        _, units = np.unique(UNITS[rows], return_inverse=True)
        losses = model.task.losses(model.module, batch_of(model, rows))
        engine.accumulate(losses, units=torch.from_numpy(units), n_units=int(units.max()) + 1)
    for found, sure in zip(engine.release(), expected, strict=True):
        torch.testing.assert_close(found, sure, rtol=1e-4, atol=1e-4 * min(clip, 1.0))
    attached.detach()


@pytest.mark.parametrize("kind", KINDS)
def test_a_records_loss_is_the_stated_one_whatever_stands_beside_it(bert_folder, kind):
    model = moved(plan_of(bert_folder, kind))
    weight = {"no": 1.0, "yes": 1.0, "perhaps": 1.0}
    weight |= dict(model.plan.model.class_weights)
    with torch.no_grad():
        together = model.task.losses(model.module, batch_of(model, range(6)))
        for row, record in enumerate(RECORDS):
            batch = batch_of(model, [row])
            logits = model.module(batch)[0].double().tolist()
            alone = float(model.task.losses(model.module, batch)[0])
            assert alone == pytest.approx(float(together[row]), rel=1e-4, abs=1e-5)
            shares = [1 / (1 + math.exp(-logit)) for logit in logits]
            if "several" in kind:
                holds = [label in record["labels"] for label in weight]
                expected = sum(
                    -w * math.log(p) if yes else -math.log(1 - p)
                    for w, p, yes in zip(weight.values(), shares, holds, strict=True)
                )
            elif kind == "number":
                place = float(record["value"]) / 10.0
                expected = -place * math.log(shares[0]) - (1 - place) * math.log(1 - shares[0])
            else:
                total = sum(map(math.exp, logits))
                index = list(weight).index(record["label"])
                expected = -weight[record["label"]] * math.log(math.exp(logits[index]) / total)
            assert alone == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_counts_add_up_and_no_record_adds_more_than_the_stated_norm(bert_folder, kind):
    model = moved(plan_of(bert_folder, kind))
    facts = model.plan.task
    each = [model.task.score(model.module, batch_of(model, [row])) for row in range(6)]
    np.testing.assert_allclose(
        np.sum(each, axis=0), model.task.score(model.module, batch_of(model, range(6)))
    )
    for counts in each:
        assert counts.shape == facts.shape(model.plan.model)
        assert np.linalg.norm(counts) <= facts.sensitivity(model.plan.model) + 1e-12
    assert {*metrics_of(model.plan, np.sum(each, axis=0))} == {m.key for m in facts.metrics}


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.1, 50.0))
def test_no_answer_of_a_number_or_of_labels_adds_more_than_the_stated_norm(seed, scale):
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.normal(0, scale, (1, 1)))
    number = OneNumber(TargetSection(lower=-3.0, upper=5.0))
    place = torch.tensor([[rng.choice([0.0, 1.0, rng.random()])]])
    counts = number.counts(logits, place)
    assert np.linalg.norm(counts) <= math.sqrt(6.0)
    labels = SeveralLabels(("a", "b", "c"), (1.0, 1.0, 1.0))
    drawn = torch.from_numpy(rng.normal(0, scale, (1, 3)))
    truth = torch.from_numpy(rng.integers(0, 2, (1, 3)).astype(np.float32))
    assert np.linalg.norm(labels.counts(drawn, truth)) <= 2.0


@pytest.mark.parametrize("logit", [math.nan, math.inf, -math.inf])
def test_counts_are_finite_whatever_a_model_gives(logit):
    number = OneNumber(TargetSection(lower=0.0, upper=1.0))
    counts = number.counts(torch.tensor([[logit]]), torch.tensor([[0.3]]))
    assert np.isfinite(counts).all()
    labels = SeveralLabels(("a",), (1.0,)).counts(torch.tensor([[logit]]), torch.tensor([[1.0]]))
    assert np.isfinite(labels).all()


@cache
def some_numbers(size=400):
    rng = np.random.default_rng(8)
    true = rng.beta(2, 5, size)
    logits = 2.0 * (true - 0.3) + rng.normal(0, 0.4, size)
    return true.astype(np.float32), logits


def test_scores_of_numbers_are_those_of_scikit_learn_and_scipy():
    target = TargetSection(lower=-20.0, upper=60.0)
    true, logits = some_numbers()
    answer = OneNumber(target)
    columns = torch.from_numpy(logits)[:, None], torch.from_numpy(true)[:, None]
    scores = of_errors(answer.counts(*columns), target)
    said = -20.0 + 80.0 / (1.0 + np.exp(-logits))
    asked = -20.0 + 80.0 * true.astype(np.float64)
    assert scores["mae"] == pytest.approx(mean_absolute_error(asked, said))
    assert scores["r2"] == pytest.approx(r2_score(asked, said))
    binned = [np.digitize(values, target.inner_edges) for values in (asked, said)]
    assert scores["spearman"] == pytest.approx(spearmanr(*binned).statistic)
    # Ten bins are close to the correlation of the numbers themselves.
    assert scores["spearman"] == pytest.approx(spearmanr(asked, said).statistic, abs=0.05)


def test_the_mean_of_the_tested_numbers_has_an_r2_of_zero():
    target = TargetSection(lower=0.0, upper=2.0)
    true, logits = some_numbers()
    answer, places = OneNumber(target), torch.from_numpy(true)[:, None]
    counts = answer.counts(torch.from_numpy(logits)[:, None], places)
    always = torch.full((len(true), 1), mean_logit(counts), dtype=torch.float64)
    found = of_errors(answer.counts(always, places), target)
    assert found["r2"] == pytest.approx(0.0, abs=1e-6)
    assert math.isnan(found["spearman"])  # one bin has no order


def test_edges_of_the_plan_are_the_bins():
    target = TargetSection(lower=0.0, upper=100.0, edges=(1.0, 5.0))
    counts = OneNumber(target).counts(torch.tensor([[0.0]]), torch.tensor([[0.02]]))
    assert counts[5:].reshape(3, 3)[1, 2] == 1  # 2 is in the second bin, 50 in the third


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_f1_of_several_labels_is_that_of_scikit_learn(seed):
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 2, (9, 4))
    said = rng.integers(0, 2, (9, 4))
    labels = SeveralLabels(tuple("abcd"), (1.0,) * 4)
    counts = labels.counts(torch.from_numpy(said * 4.0 - 2), torch.from_numpy(truth).float())
    seen = truth.any(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        macro = f1_score(truth[:, seen], said[:, seen], average="macro", zero_division=0)
        micro = f1_score(truth, said, average="micro", zero_division=0)
        everything = f1_score(truth, np.ones_like(truth), average="micro", zero_division=0)
    assert of_cells(counts)["macro_f1"] == pytest.approx(macro)
    assert of_cells(counts)["micro_f1"] == pytest.approx(micro)
    assert of_cells(every_label(counts))["micro_f1"] == pytest.approx(everything)


@pytest.mark.parametrize("kind", KINDS)
def test_the_card_answers_as_predict_does(bert_folder, tmp_path, monkeypatch, kind):
    model = moved(plan_of(bert_folder, kind, plan__seed=None))
    save_adapter(model, read_adapter(model), tmp_path, plan=model.plan)
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "README.md").read_text(), re.S)
    monkeypatch.chdir(tmp_path)
    namespace = {}
    exec(code, namespace)
    reads = [[record[role] for record in RECORDS] for role in model.plan.task.reads]
    found = namespace["predict"](*reads)
    expected = [one.output for one in model.task.predict(model, RECORDS)]
    assert found == (pytest.approx(expected, rel=1e-5) if kind == "number" else expected)


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_does_not_depend_on_those_beside_it(bert_folder, kind):
    model = moved(plan_of(bert_folder, kind))
    together = model.task.predict(model, RECORDS)
    for record, beside in zip(RECORDS, together, strict=True):
        (alone,) = model.task.predict(model, [record])
        if kind == "number":
            assert alone.output == pytest.approx(beside.output, rel=1e-5)
            assert 0.0 <= alone.output <= 10.0
            assert alone.probabilities == {}
        else:
            assert alone.output == beside.output
            assert alone.probabilities == pytest.approx(beside.probabilities, rel=1e-4)
    assert model.task.predict(model, []) == []


@pytest.mark.parametrize(
    "answer",
    [
        OneLabel(("a", "b"), (1.0, 1.0)),
        SeveralLabels(("a", "b"), (1.0, 1.0)),
        OneNumber(TargetSection(lower=0.0, upper=1.0)),
    ],
)
def test_targets_that_the_plan_lacks_are_counted_and_not_quoted(answer):
    unfit = {"label": "SECRET", "labels": '["a","SECRET"]', "value": "7"}
    with pytest.raises(RecordInvalid) as caught:
        answer.targets([unfit, {"label": "a", "labels": "[]", "value": "0.5"}])
    assert "1 of 2 examples" in str(caught.value)
    assert "SECRET" not in str(caught.value)


# --- pairs ---


def test_a_pair_is_the_models_own_with_its_token_types():
    tokenizer = AutoTokenizer.from_pretrained(minilm(), local_files_only=True)
    ids, types = pair_ids(tokenizer, [("acute injury", "an eye")], limit=32)
    assert tokenizer.decode(ids[0]) == "[CLS] acute injury [SEP] an eye [SEP]"
    assert types == [[0, 0, 0, 0, 1, 1, 1]]


def test_what_stands_in_a_text_of_a_pair_is_text():
    tokenizer = AutoTokenizer.from_pretrained(minilm(), local_files_only=True)
    ids, _ = pair_ids(tokenizer, [("a [SEP] b", "c [CLS]")], limit=32)
    control = [tokenizer.sep_token_id, tokenizer.cls_token_id]
    assert sum(token in control for token in ids[0]) == 3


def test_the_longer_text_of_a_pair_is_cut_first():
    tokenizer = AutoTokenizer.from_pretrained(minilm(), local_files_only=True)
    long, short = "eye " * 50, "left right"
    for pair in ((long, short), (short, long)):
        ids, types = pair_ids(tokenizer, [pair], limit=16)
        assert len(ids[0]) == 16
        second = sum(types[0])
        assert second == (3 if pair[1] == short else 12)  # a control token ends it
    (ids,), (types,) = pair_ids(tokenizer, [(long, long)], limit=17)
    assert sum(types) - 1 == 7
    assert ids.count(tokenizer.convert_tokens_to_ids("eye")) == 14


def test_two_texts_that_the_tokenizer_would_join_are_told_apart():
    tokenizer = trained_tokenizer()
    (joined,), types = pair_ids(tokenizer, [("eye", "ball")], limit=32)
    assert types is None or not any(map(any, types))
    assert "eye\nball" in tokenizer.decode(joined)


def test_token_types_change_what_a_model_makes_of_a_pair(bert_folder):
    model = moved(plan_of(bert_folder, "pair"))
    batch = batch_of(model, range(6))
    batch["token_type_ids"] = torch.ones_like(batch["input_ids"])
    typed = batch | {"token_type_ids": torch.zeros_like(batch["input_ids"])}
    with torch.no_grad():
        assert not torch.allclose(model.module(batch), model.module(typed))


# --- plans ---


@pytest.mark.parametrize(
    ("kind", "settings", "told"),
    [
        ("number", {"model__target": None}, "model.target: needed for text_regression"),
        ("number", {"model__target__upper": -1.0}, "model.target.upper: must be above lower"),
        ("number", {"model__target__edges": [4.0, 3.0]}, "model.target.edges: must rise"),
        ("number", {"model__target__edges": [11.0]}, "must lie between lower and upper"),
        ("number", {"model__labels": ["a"]}, "model.labels: text_regression has no labels"),
        ("number", {"model__multi_label": True}, "model.multi_label: not with text_regression"),
        ("number", {"model__class_weights": {"a": 2.0}}, "text_regression has no classes to weigh"),
        ("pair", {"model__target": {"lower": 0.0, "upper": 1.0}}, "learns no number; remove it"),
        ("pair", {"model__class_weights": {"maybe": 2.0}}, "not in model.labels: maybe"),
        ("pair", {"model__class_weights": {"yes": 0.0}}, "model.class_weights.yes: expected"),
    ],
)
def test_what_a_task_does_not_have_is_refused_by_its_key(kind, settings, told):
    with pytest.raises(PlanInvalid) as caught:
        plan_of("base", kind, **settings)
    assert told in str(caught.value)


def test_an_unweighed_plan_has_the_loss_that_it_had():
    plain = answer_of(a_plan("base"))
    logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    targets = torch.tensor([0, 1, 2, 1, 0])
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    assert torch.equal(plain.losses(logits, targets), expected)
