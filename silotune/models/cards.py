"""Cards of exported models: the adapter's own card, with code for the form that lies beside it."""

from __future__ import annotations

import re
from string import Template

from silotune.models.adapter import card_code, readme
from silotune.plan.plan import Plan

_FENCE = re.compile(r"^[^\n]*\n\n```python\n.*?```", re.MULTILINE | re.DOTALL)

_GRAPH = Template("""import json
from pathlib import Path

import onnxruntime
from transformers import AutoTokenizer

folder = Path(".")  # the folder of this file
settings = json.loads((folder / "silotune.json").read_text())
tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="right")
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
session = onnxruntime.InferenceSession(folder / "model.onnx")


def logits($arguments):
    # What stands in a text is text: "[SEP]" or "</s>" in it is no control token.
    batch = tokenizer(
        $given,
        split_special_tokens=True,
        padding=True,
        truncation=True,
        max_length=settings["max_length"],
        return_tensors="np",
    )
    return session.run(None, {one.name: batch[one.name] for one in session.get_inputs()})[0]
""")


def merged_card(plan: Plan, description: str, *, auto: str) -> str:
    """Of a folder with the adapter folded into the weights: the adapter's code, without PEFT."""
    card = readme(plan, description, auto=auto).replace(
        "library_name: peft", "library_name: transformers"
    )
    found = _FENCE.search(card)
    assert found is not None
    code = found[0].partition("```python\n")[2]
    code = code.replace("from peft import PeftModel\n", "")
    code = re.sub(r'base = settings\["base"\][^\n]*', "base = folder", code)
    code = re.sub(r"PeftModel\.from_pretrained\((\w+), folder\)", r"\1", code)
    head = "the head is no part of a Transformers model: `head.safetensors` has it; "
    words = (
        "Here the adapter is folded into the weights, so the folder loads with Transformers alone: "
        f"{head if plan.task.has_head else ''}`silotune.json` has the settings, `export.json` how close "
        "its answers are to the adapter's."
    )
    return card.replace(found[0], f"{words}\n\n```python\n{code}")


def graph_card(plan: Plan, description: str, *, auto: str) -> str:
    """Of a folder with an ONNX graph."""
    card = readme(plan, description, auto=auto).replace("library_name: peft", "library_name: onnx")
    found = _FENCE.search(card)
    assert found is not None
    gives = (
        "a score for each of `labels` in `silotune.json`"
        if plan.task.has_labels
        else "what the model's forward pass gives"
    )
    code = _GRAPH.substitute(card_code(plan))
    words = (
        f"Here `model.onnx` is the whole forward pass, adapter and head included, and gives {gives}; "
        "`export.json` has how close its answers are to the adapter's."
    )
    return card.replace(found[0], f"{words}\n\n```python\n{code}```")
