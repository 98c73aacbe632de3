"""What the scale benchmark trains: a tiny causal model, and many sites of sixteen prompts each.

The shape is that of pfl-research's LLM benchmark (its configs/alpaca.yaml), made small: LoRA of rank 8
on a Llama's attention, users of 16 records, one local pass of SGD in batches of 4, 100 users a round,
Adam at the server.
"""

from __future__ import annotations

import csv
import random
from pathlib import Path

RECORDS, BATCH, STEPS, RANK, MAX_LENGTH = 16, 4, 4, 8, 48
LOCAL_LR, SERVER_LR = 0.01, 0.01
CLIP, EPSILON, DELTA = 0.1, 2.0, 1e-6

_SUBJECTS = ("fever", "fracture", "asthma", "gout", "migraine", "eczema", "anaemia", "sprain")
_PLACES = ("left arm", "right knee", "lower back", "upper lip", "inner ear", "small bowel")
_TIMES = ("initial encounter", "subsequent encounter", "sequela", "first seen at night")


def write_model(folder: Path) -> Path:
    """Two random layers of Llama with a small vocabulary, and its tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(
        (" ".join(pair) for pair in pairs(random.Random(0), 2000)), trainer
    )
    config = LlamaConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        vocab_size=tokenizer.get_vocab_size(), max_position_embeddings=128, bos_token_id=0,
        eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    ).save_pretrained(folder)
    return folder


def pairs(drawn: random.Random, number: int) -> list[tuple[str, str]]:
    """Prompts and responses."""
    found = []
    for _ in range(number):
        what, where, when = map(drawn.choice, (_SUBJECTS, _PLACES, _TIMES))
        asked = f"What is written about case {drawn.randrange(10_000)}?"
        found.append((asked, f"{what} of the {where}, {when}, code {drawn.randrange(1000)}"))
    return found


def write_sites(folder: Path, *, sites: int, base: Path, rounds: int, cohort: int) -> Path:
    """The sites' folders and the plan beside them; the plan's path."""
    for number in range(sites):
        place = folder / f"site-{number:05d}"
        place.mkdir(parents=True)
        with (place / "records.csv").open("w", newline="") as file:
            csv.writer(file).writerows(
                [("prompt", "response"), *pairs(random.Random(number), RECORDS)]
            )
        (place / "site.toml").write_text(
            f'name = "{place.name}"\n[datasets.cases]\nformat = "csv"\npath = "records.csv"\n'
            f'unit = "record"\ndeclared_units = {RECORDS}\n[datasets.cases.columns]\n'
            'prompt = "prompt"\nresponse = "response"\n'
            "[datasets.cases.budget]\nepsilon = 9.0\ndelta = 1e-3\n"
        )
    plan = folder / "plan.toml"
    plan.write_text(
        f"""[plan]
name = "scale"
purpose = "How fast many sites are simulated."
[model]
base = "{base}"
task = "causal_lm"
dtype = "float32"
[lora]
r = {RANK}
[data]
dataset = "cases"
max_length = {MAX_LENGTH}
test_share = 0.0
validation_share = 0.0
[rounds]
number = {rounds}
sites = {cohort}
min_sites = {cohort}
local_steps = {STEPS}
[optimizer.site]
adapter_lr = {LOCAL_LR}
schedule = "constant"
warmup_share = 0.0
local = "sgd"
[optimizer.server]
name = "adam"
lr = {SERVER_LR}
[privacy]
mode = "none"
batch = {BATCH}
[aggregation]
weights = "equal"
"""
    )
    return plan


def private() -> dict[str, object]:
    """Plan settings of central client-level privacy, as the other's benchmark has it."""
    return {
        "privacy.mode": "site",
        "privacy.epsilon": EPSILON,
        "privacy.delta": DELTA,
        "privacy.clip": CLIP,
        "privacy.site.noise": "coordinator",
    }
