"""Causal language models: only the response counts, and each sequence for itself."""

import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from silotune.errors import ModelError
from silotune.models.adapter import save_adapter, write_adapter
from silotune.models.base import load_model
from silotune.models.scores import of_losses
from silotune.models.tasks import causal_lm, get_task
from tests.models.model_material import a_plan

TASK = get_task(a_plan("unused", "causal_lm"))
EXAMPLES = [
    {"prompt": "what is the capital of france?", "response": "paris."},
    {"prompt": "eye", "response": "unspecified injury of the right eye"},
    {"prompt": "stage", "response": "4"},
    {"prompt": "fracture of the left femur", "response": "acute"},
]
PROMPTS = [example["prompt"] for example in EXAMPLES]


@pytest.fixture(scope="module")
def model(llama_folder):
    model = load_model(a_plan(llama_folder, "causal_lm"))
    flat = np.random.default_rng(5).normal(0, 0.3, model.layout.size)
    write_adapter(model, flat.astype(np.float32))
    return model


@pytest.fixture(scope="module")
def plain(model, llama_folder, tmp_path_factory):
    """The same adapter in Transformers and PEFT alone."""
    from peft import PeftModel

    from silotune.models.adapter import read_adapter

    folder = tmp_path_factory.mktemp("adapter")
    save_adapter(model, read_adapter(model), folder, plan=model.plan)
    base = AutoModelForCausalLM.from_pretrained(llama_folder)
    return PeftModel.from_pretrained(base, folder).eval()


@pytest.fixture(scope="module")
def data(model):
    return TASK.encode(EXAMPLES, model.tokenizer, plan=model.plan)


def losses(model, data, rows):
    with torch.no_grad():
        return TASK.losses(model.module, TASK.collate(data, rows, model.device))


def test_a_sequence_is_begin_prompt_newline_response_end(model, data):
    for row, example in enumerate(EXAMPLES):
        ids = data.tokens(row)
        prompt, response = np.split(ids, [data.targets[row]])
        assert prompt[0] == model.tokenizer.bos_token_id
        assert model.tokenizer.decode(prompt[1:]) == example["prompt"] + "\n"
        assert response[-1] == model.tokenizer.eos_token_id
        assert model.tokenizer.decode(response[:-1]) == example["response"]


def test_a_loss_is_the_mean_over_the_response_and_end_tokens_one_by_one(model, plain, data):
    for row, loss in enumerate(losses(model, data, range(len(EXAMPLES)))):
        ids, start = data.tokens(row).tolist(), int(data.targets[row])
        each = []
        for position in range(start, len(ids)):
            with torch.no_grad():
                logits = plain(input_ids=torch.tensor([ids[:position]])).logits[0, -1]
            each.append(-logits.log_softmax(0)[ids[position]].item())
        assert loss.item() == pytest.approx(sum(each) / len(each), rel=1e-4)


def test_neighbours_in_a_batch_do_not_change_a_loss(model, data):
    together = losses(model, data, [2, 1, 0, 3])
    for place, row in enumerate([2, 1, 0, 3]):
        torch.testing.assert_close(
            losses(model, data, [row])[0], together[place], rtol=1e-4, atol=1e-5
        )


def test_neighbours_in_a_batch_do_not_change_a_gradient(model, data):
    def gradient(rows, kept):
        model.module.zero_grad()
        TASK.losses(model.module, TASK.collate(data, rows, model.device))[kept].backward()
        return torch.cat([p.grad.ravel() for p in model.parameters()])

    torch.testing.assert_close(gradient([0, 1], 0), gradient([0], 0), rtol=1e-3, atol=1e-5)


def test_the_prompts_words_have_no_loss_of_their_own(model, data):
    batch = TASK.collate(data, range(len(EXAMPLES)), model.device)
    for row in range(len(EXAMPLES)):
        learned = batch["labels"][row][batch["labels"][row] != -100]
        assert learned.tolist() == data.tokens(row)[data.targets[row] :].tolist()
        kept = batch["kept"][batch["labels"][row] != -100]
        assert kept.tolist() == list(range(data.targets[row] - 1, data.lengths[row] - 1))


def test_only_logits_that_some_row_needs_are_computed(model, data):
    batch = TASK.collate(data, [0], model.device)
    with torch.no_grad():
        logits = model.module(batch)
    assert logits.shape[1] == data.lengths[0] - data.targets[0]


def test_a_model_that_computes_all_logits_gives_the_same(model, data, monkeypatch):
    fast = losses(model, data, range(4))
    monkeypatch.setattr(model.module, "_keeps", False)
    torch.testing.assert_close(losses(model, data, range(4)), fast)


@pytest.mark.parametrize(
    ("prompt", "response"), [(40, 5), (5, 40), (40, 40), (28, 3), (27, 3), (31, 0), (0, 31)]
)
def test_too_long_examples_keep_the_responses_start_and_the_prompts_end(model, prompt, response):
    words = ["eye", "acute", "left"]
    example = {
        "prompt": "".join(words[i % 3] for i in range(prompt)),
        "response": "".join(words[(i + 1) % 3] for i in range(response)),
    }
    whole = model.tokenizer(example["prompt"] + "\n", add_special_tokens=False)["input_ids"]
    answer = model.tokenizer(example["response"], add_special_tokens=False)["input_ids"]
    data = TASK.encode([example], model.tokenizer, plan=model.plan)
    ids, start = data.tokens(0).tolist(), int(data.targets[0])
    assert len(ids) <= 32
    assert ids[0] == model.tokenizer.bos_token_id
    assert ids[start:] == [*answer, 1][:31]
    assert whole[len(whole) - (start - 1) :] == ids[1:start]
    assert len(ids) == min(32, 1 + len(whole) + len(answer) + 1)


def test_scores_add_up_and_give_loss_and_perplexity(model, data):
    each = losses(model, data, range(4)).double()
    counts = sum(
        TASK.score(model.module, TASK.collate(data, rows, model.device))
        for rows in ([0, 2], [1, 3])
    )
    assert counts == pytest.approx([each.sum().item(), 4], rel=1e-5)
    metrics = of_losses(counts)
    assert metrics["loss"] == pytest.approx(each.mean().item(), rel=1e-5)
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["loss"]))


def test_metrics_of_nothing_are_not_numbers_and_huge_losses_do_not_overflow():
    assert all(math.isnan(v) for v in of_losses(np.zeros(2)).values())
    assert math.isfinite(of_losses(np.array([1e6, 1.0]))["perplexity"])


def test_a_score_makes_the_logits_of_a_few_texts_at_a_time(model, data, monkeypatch):
    batch = TASK.collate(data, range(len(EXAMPLES)), model.device)
    whole, sizes = TASK.score(model.module, batch), []
    plain = TASK.losses
    monkeypatch.setattr(
        type(TASK), "losses", lambda _, m, b: (sizes.append(len(b["labels"])), plain(m, b))[1]
    )
    vocabulary = model.module.peft.get_base_model().config.vocab_size
    monkeypatch.setattr(causal_lm, "_LOGITS", 2 * len(batch["kept"]) * vocabulary)
    np.testing.assert_allclose(TASK.score(model.module, batch), whole, rtol=1e-6)
    assert max(sizes) == 2 and sum(sizes) == len(EXAMPLES)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_with_a_cap_every_text_counts_finitely(model, data, monkeypatch, bad):
    batch = TASK.collate(data, [0, 1], model.device)
    monkeypatch.setattr(type(TASK), "losses", lambda *_: torch.tensor([bad, 2.0]))
    total, texts = TASK.score(model.module, batch, cap=10.0)
    assert texts == 2 and total in {2.0, 12.0}


def answers(model, prompts):
    return [p.output for p in TASK.predict(model, [{"prompt": prompt} for prompt in prompts])]


def test_predictions_are_the_greedy_ones_whatever_the_neighbours(model, plain):
    found = answers(model, PROMPTS)
    assert [answers(model, [prompt])[0] for prompt in PROMPTS] == found
    starts = [model.tokenizer(p + "\n")["input_ids"] for p in PROMPTS]
    starts = [ids if len(ids) <= 16 else ids[:1] + ids[-15:] for ids in starts]
    for ids, text in zip(starts, found, strict=True):
        made: list[int] = []
        for _ in range(32 - len(ids)):
            with torch.no_grad():
                logits = plain(input_ids=torch.tensor([ids + made])).logits[0, -1]
            made.append(int(logits.argmax()))
            if made[-1] == model.tokenizer.eos_token_id:
                break
        assert text == model.tokenizer.decode(made, skip_special_tokens=True)


def test_a_model_taught_one_answer_gives_it_and_stops(llama_folder):
    model = load_model(
        a_plan(llama_folder, "causal_lm", lora__r=8, lora__target_modules="all-linear")
    )
    data = TASK.encode(EXAMPLES[:1], model.tokenizer, plan=model.plan)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        TASK.losses(model.module, TASK.collate(data, [0], model.device)).sum().backward()
        optimizer.step()
    assert answers(model, PROMPTS[:1]) == ["paris."]


def test_a_tokenizer_without_an_end_token_is_refused(model):
    class Endless:
        eos_token_id = None

    with pytest.raises(ModelError, match="end-of-sequence"):
        TASK.encode(EXAMPLES, Endless(), plan=model.plan)


def test_there_is_no_head_to_train_alone(model, data):
    assert model.module.head is None
    assert model.layout.spans({"head"}) == ()
    for call in (TASK.head_losses, TASK.head_score):
        with pytest.raises(ModelError):
            call(model.module, torch.zeros(1, 32), data, [0])
