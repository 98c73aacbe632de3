"""Of PEFT's methods only LoRA is trained; every other one, a later version's too, is refused by name."""

import pytest
import torch
from peft import LoraConfig, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn

from silotune.errors import LayerUnsupported
from silotune.privacy.clipping import attach


class OneLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(x)


def lora(**settings):
    return get_peft_model(OneLayer(), LoraConfig(r=2, target_modules=["layer"], **settings))


@pytest.mark.parametrize("private", [True, False])
@pytest.mark.parametrize("kind", list(PeftType))
def test_a_method_other_than_lora_is_refused_by_name(kind, private):
    model = lora()
    if kind == PeftType.LORA:
        attach(model, private=private).detach()
        return
    # Whatever layers it would have made: what it is, PEFT says itself.
    model.peft_config["default"].peft_type = kind
    with pytest.raises(LayerUnsupported, match=kind.value):
        attach(model, private=private)


@pytest.mark.parametrize("kind", sorted(PEFT_TYPE_TO_CONFIG_MAPPING, key=str))
def test_every_method_says_what_it_is(kind):
    """What the refusal rests on."""
    needed = {PeftType.ADALORA: {"total_step": 5}, PeftType.CPT: {"task_type": "CAUSAL_LM"}}
    found = PEFT_TYPE_TO_CONFIG_MAPPING[kind](**needed.get(kind, {}))
    assert found.peft_type == kind


def test_dora_is_refused_by_name():
    with pytest.raises(LayerUnsupported, match="Dora"):
        attach(lora(use_dora=True), private=True)


@pytest.mark.parametrize("rslora", [False, True])
def test_rslora_is_a_factor_and_its_gradients_of_single_records_are_exact(rslora):
    torch.manual_seed(0)
    model, x = lora(use_rslora=rslora, lora_alpha=3), torch.randn(5, 4)
    nn.init.normal_(model.base_model.model.layer.lora_B["default"].weight)
    parameters = [p for p in model.parameters() if p.requires_grad]
    expected = [torch.autograd.grad(model(row[None]).square().sum(), parameters) for row in x]
    attached = attach(model, private=True)
    model(x).square().sum().backward()
    for place, parameter in enumerate(parameters):
        torch.testing.assert_close(
            parameter.grad_sample, torch.stack([own[place] for own in expected])
        )
    attached.detach()
