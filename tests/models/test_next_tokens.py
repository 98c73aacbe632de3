"""Losses of next tokens: exact, and without the logits of a batch."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import Gemma2Config, Gemma2ForCausalLM

from silotune.models import next_tokens
from silotune.models.next_tokens import next_token_losses, passed_through, plain_output

WIDTH, VOCABULARY, POSITIONS = 8, 50, 23


@pytest.fixture
def output():
    torch.manual_seed(0)
    return nn.Linear(WIDTH, VOCABULARY).requires_grad_(False)


@pytest.fixture
def states():
    return (3 * torch.randn(POSITIONS, WIDTH)).requires_grad_()


def tokens():
    return torch.arange(POSITIONS) * 7 % VOCABULARY


@pytest.mark.parametrize("at_a_time", [1, 5, POSITIONS, 100])
def test_losses_and_their_gradients_are_those_of_whole_logits(
    output, states, at_a_time, monkeypatch
):
    monkeypatch.setattr(next_tokens, "_LOGITS", at_a_time * VOCABULARY)
    weights = torch.linspace(-1, 2, POSITIONS)
    found = next_token_losses(states, tokens(), output, vocabulary=VOCABULARY)
    (by_parts,) = torch.autograd.grad((found * weights).sum(), states)
    whole = cross_entropy(output(states), tokens(), reduction="none")
    (by_all,) = torch.autograd.grad((whole * weights).sum(), states)
    torch.testing.assert_close(found, whole)
    torch.testing.assert_close(by_parts, by_all)


def test_no_more_logits_are_made_at_a_time_than_fit(output, states, monkeypatch):
    monkeypatch.setattr(next_tokens, "_LOGITS", 4 * VOCABULARY)
    sizes = []
    output.register_forward_hook(lambda layer, args, given: sizes.append(len(given)))
    next_token_losses(states, tokens(), output, vocabulary=VOCABULARY).sum().backward()
    assert max(sizes) == 4
    assert sum(sizes) == POSITIONS


def test_logits_far_apart_lose_nothing(output, states):
    far = (states.detach() * 1e3).requires_grad_()
    found = next_token_losses(far, tokens(), output, vocabulary=VOCABULARY)
    assert found.isfinite().all()
    torch.testing.assert_close(found, cross_entropy(output(far), tokens(), reduction="none"))


def test_a_layer_that_is_passed_through_is_itself_again_afterwards(output, states):
    before = output(states)
    with passed_through(output):
        assert output(states) is states
    torch.testing.assert_close(output(states), before)


@pytest.mark.parametrize(("cap", "plain"), [(None, True), (5.0, False)])
def test_a_model_that_changes_its_logits_is_known_by_it(cap, plain):
    config = Gemma2Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        final_logit_softcapping=cap,
    )
    model = Gemma2ForCausalLM(config).eval()
    with torch.no_grad():
        layer = plain_output(model, lambda: model(torch.tensor([[1, 2]])).logits)
    assert (layer is not None) == plain
