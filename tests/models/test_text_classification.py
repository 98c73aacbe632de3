"""Text classification: labels, losses, confusion, metrics, predictions."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

from silotune.errors import RecordInvalid
from silotune.models.adapter import write_adapter
from silotune.models.base import load_model
from silotune.models.scores import constant, of_confusion, recall_of
from silotune.models.tasks import get_task
from tests.models.model_material import CORPUS, TEXTS, a_plan

TASK = get_task(a_plan("unused"))
LABELS = ["no", "yes", "perhaps"]


@pytest.fixture(scope="module")
def model(bert_folder):
    model = load_model(a_plan(bert_folder))
    flat = np.random.default_rng(2).normal(0, 0.5, model.layout.size)
    write_adapter(model, flat.astype(np.float32))
    return model


def encoded(model, texts, labels):
    examples = [{"text": t, "label": label} for t, label in zip(texts, labels, strict=True)]
    return TASK.encode(examples, model.tokenizer, plan=model.plan)


def test_encoding_is_the_tokenizers_own_cut_at_the_plans_length(model):
    texts = [*CORPUS, "eye " * 100]
    data = encoded(model, texts, ["yes"] * len(texts))
    for row, text in enumerate(texts):
        assert data.tokens(row).tolist() == model.tokenizer(text)["input_ids"][:32]
    assert data.targets.tolist() == [1] * len(texts)
    assert data.lengths.max() == 32


def test_an_unknown_label_is_refused_without_quoting_anything(model):
    with pytest.raises(RecordInvalid, match="1 of 2") as caught:
        encoded(model, ["secret text", "other"], ["no", "secret label"])
    assert "secret" not in str(caught.value)


def test_a_loss_is_minus_the_log_of_the_labels_probability(model):
    data = encoded(model, TEXTS, ["no", "yes", "perhaps", "no"])
    with torch.no_grad():
        losses = TASK.losses(model.module, TASK.collate(data, range(4), model.device))
    for text, loss, target in zip(TEXTS, losses, data.targets, strict=True):
        (prediction,) = TASK.predict(model, [{"text": text}])
        assert loss.item() == pytest.approx(
            -math.log(prediction.probabilities[LABELS[target]]), rel=1e-4
        )


def test_neighbours_in_a_batch_do_not_change_a_loss(model):
    data = encoded(model, CORPUS, ["yes"] * len(CORPUS))
    with torch.no_grad():
        together = TASK.losses(model.module, TASK.collate(data, range(len(CORPUS)), model.device))
        for row, loss in enumerate(together):
            alone = TASK.losses(model.module, TASK.collate(data, [row], model.device))
            torch.testing.assert_close(alone[0], loss, rtol=1e-4, atol=1e-5)


def test_counts_add_up_over_batches_and_match_the_predictions(model):
    labels = ["no", "yes", "perhaps", "no", "yes", "no"]
    data = encoded(model, CORPUS, labels)
    total = sum(
        TASK.score(model.module, TASK.collate(data, rows, model.device))
        for rows in ([0, 1], [2], [3, 4, 5])
    )
    predicted = [p.output for p in TASK.predict(model, [{"text": text} for text in CORPUS])]
    assert np.array_equal(total, confusion_matrix(labels, predicted, labels=LABELS))


def test_predictions_come_in_the_order_asked_and_sum_to_one(model):
    texts = [CORPUS[i % 6] + " eye" * (i % 5) for i in range(150)]
    found = TASK.predict(model, [{"text": text} for text in texts])
    assert TASK.predict(model, []) == []
    for text, prediction in list(zip(texts, found, strict=True))[::37]:
        (alone,) = TASK.predict(model, [{"text": text}])
        assert prediction.output == alone.output
        assert prediction.probabilities == pytest.approx(alone.probabilities, rel=1e-3)
        assert sum(prediction.probabilities.values()) == pytest.approx(1, rel=1e-5)
        best = max(prediction.probabilities, key=prediction.probabilities.__getitem__)
        assert prediction.output == best


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=60))
def test_metrics_are_scikit_learns(pairs):
    true, predicted = zip(*pairs, strict=True)
    metrics = of_confusion(confusion_matrix(true, predicted, labels=range(5)))
    assert metrics["accuracy"] == pytest.approx(accuracy_score(true, predicted))
    occurring = sorted(set(true))  # of the truth: the same for every model scored on these records
    expected = f1_score(true, predicted, labels=occurring, average="macro", zero_division=0)
    assert metrics["macro_f1"] == pytest.approx(expected)


def test_a_label_that_is_only_predicted_does_not_change_what_is_averaged_over():
    """Two models of .75 accuracy, one of whose mistakes goes to a label that never occurs."""
    within = np.array([[4, 0, 0], [2, 2, 0], [0, 0, 0]])
    beyond = np.array([[4, 0, 0], [0, 2, 2], [0, 0, 0]])
    assert of_confusion(within)["macro_f1"] == pytest.approx((8 / 10 + 4 / 6) / 2)
    assert of_confusion(beyond)["macro_f1"] == pytest.approx((8 / 8 + 4 / 6) / 2)


def test_the_trivial_answer_is_scored_on_the_same_records():
    counts = np.array([[5, 1], [2, 12]])
    assert constant(counts, 1).tolist() == [[0, 6], [0, 14]]
    assert recall_of(counts) == [5 / 6, 12 / 14]
    assert recall_of(np.array([[3, 0], [0, 0]])) == [1.0, None]


def test_metrics_of_nothing_are_not_numbers_and_noise_below_zero_is_none():
    assert all(math.isnan(v) for v in of_confusion(np.zeros((3, 3))).values())
    noisy = np.array([[5.0, -0.7], [-0.2, 5.0]])
    assert of_confusion(noisy) == {"accuracy": 1.0, "macro_f1": 1.0}


def test_a_text_without_any_token_still_has_a_row(llama_folder):
    model = load_model(a_plan(llama_folder, model__pooling="last"))
    model.tokenizer.backend_tokenizer.post_processor = None
    data = encoded(model, ["", "eye"], ["no", "no"])
    assert data.lengths.min() == 1
    assert len(TASK.predict(model, [{"text": ""}, {"text": "eye"}])) == 2
