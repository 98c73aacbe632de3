"""What lies beside an adapter's weights: the settings it was made with, and how to load it.

Both are enough to use the adapter with Transformers and PEFT alone, without silotune.
"""

from __future__ import annotations

from typing import Any

from silotune.models.tokens import PROMPT_END
from silotune.plan import Plan

_POOLED = {
    "mean": "(hidden * mask).sum(1) / mask.sum(1)",
    "first": "hidden[:, 0]",
    "last": "hidden[torch.arange(len(hidden)), mask[..., 0].sum(1) - 1]",
}

_CLASSIFICATION = """\
import json
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

folder = Path(".")  # the folder of this file
settings = json.loads((folder / "silotune.json").read_text())
base = settings["base"]  # or where you keep this base model
head = load_file(folder / "head.safetensors")
tokenizer = AutoTokenizer.from_pretrained(base, padding_side="right")
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
encoder = AutoModel.from_pretrained(base, dtype=torch.float32)
model = PeftModel.from_pretrained(encoder, folder).eval()


@torch.no_grad()
def logits(texts):
    # What stands in a text is text: "[SEP]" or "</s>" in it is no control token.
    batch = tokenizer(
        texts,
        split_special_tokens=True,
        padding=True,
        truncation=True,
        max_length=settings["max_length"],
        return_tensors="pt",
    )
    ids, mask = batch["input_ids"], batch["attention_mask"]
    hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
    mask = mask.unsqueeze(-1)
    features = torch.nn.functional.normalize({pooled}, dim=-1)
    features = (features - head["centre"]) * settings["feature_scale"]
    return features @ head["head.weight"].T + head["head.bias"]


def predict(texts):
    return [settings["labels"][row] for row in logits(texts).argmax(1)]
"""

_CAUSAL_LM = """\
import json
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

folder = Path(".")  # the folder of this file
settings = json.loads((folder / "silotune.json").read_text())
base = settings["base"]  # or where you keep this base model
tokenizer = AutoTokenizer.from_pretrained(base)
decoder = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
decoder.generation_config = GenerationConfig()  # greedy, whatever the base model's own settings
model = PeftModel.from_pretrained(decoder, folder).eval()


def ids_of(prompt):
    # What stands in a prompt is text: "</s>" in it is no control token.
    text = tokenizer(
        prompt + settings["prompt_end"], add_special_tokens=False, split_special_tokens=True
    )["input_ids"]
    lead, room = settings["lead_ids"], settings["max_length"] // 2
    return lead + text if len(lead + text) <= room else lead + text[len(lead) - room :]


def answer(prompt, longest=settings["max_length"]):
    ids = torch.tensor([ids_of(prompt)])
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=longest - ids.shape[1],
        eos_token_id=settings["end_ids"],
        pad_token_id=settings["pad_id"],
    )
    made = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config
    )
    return tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
"""


def meaning(plan: Plan) -> dict[str, Any]:
    """Settings without which an adapter's numbers mean something else."""
    shared: dict[str, Any] = {"task": plan.model.task}
    if plan.model.task == "causal_lm":
        return shared | {"prompt_end": PROMPT_END}
    return shared | {
        "labels": list(plan.model.labels),
        "pooling": plan.model.pooling,
        "feature_scale": plan.model.feature_scale,
    }


def settings(plan: Plan, *, tokens: dict[str, Any]) -> dict[str, Any]:
    """Content of ``silotune.json``: `meaning`, `tokens`, where it came from, the longest input."""
    return (
        meaning(plan)
        | tokens
        | {
            "format": 1,
            "base": plan.model.base,
            "base_sha256": plan.model.sha256,
            "max_length": plan.data.max_length,
            "plan": plan.plan.name,
            "plan_sha256": plan.sha256,
        }
    )


def readme(plan: Plan, description: str) -> str:
    """The adapter card: what it is, how private its training was, and code that loads it."""
    generative = plan.model.task == "causal_lm"
    code = _CAUSAL_LM if generative else _CLASSIFICATION
    code = code.replace("{pooled}", _POOLED[plan.model.pooling])
    tag = "text-generation" if generative else "text-classification"
    head = "" if generative else "`head.safetensors` holds the head and the feature centre; "
    return f"""\
---
library_name: peft
base_model: {plan.model.base}
pipeline_tag: {tag}
tags: [lora, silotune]
---
# {plan.plan.name}

{plan.plan.purpose.strip()}

A LoRA adapter for `{plan.model.base}`, trained across several sites that kept their records.
{description}.

{_privacy(plan)} Plan: SHA-256 `{plan.sha256}`.

`adapter_model.safetensors` and `adapter_config.json` are in PEFT's own format; {head}\
`silotune.json` says with which settings it was trained. With Transformers and PEFT alone:

```python
{code}```
"""


def _privacy(plan: Plan) -> str:
    privacy = plan.privacy
    if plan.trusts_coordinator and plan.plan.seed is None:
        return (
            f"Trained under client-level differential privacy, ε = {privacy.epsilon:g} at "
            f"δ = {privacy.delta:g} for all records of a site together; the coordinator added the noise."
        )
    if not plan.private and not plan.trusts_coordinator:
        return "Trained without differential privacy."
    if plan.plan.seed is not None:
        return "Not private: the noise of this run came from a seed."
    unit = f"each {privacy.unit}" if plan.per_unit else "all records of a site together"
    return (
        f"Trained under differential privacy; the plan allows each site ε = {privacy.epsilon:g} at "
        f"δ = {privacy.delta:g} for {unit}. What was spent is in the sites' certificates."
    )
