"""Peak memory of one simulated site of a causal model, or of a plain loop: run as a process.

``python causal_memory.py FOLDER site|plain`` prints the peak of resident memory, in bytes, above what
the loaded model and libraries take. Both train with a batch of 16 texts and score 64.
"""

import csv
import resource
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from silotune.client.model_cache import ModelCache
from silotune.client.site_run import SiteRun
from silotune.data.records import Split
from silotune.data.site import SiteConfig
from silotune.models.layout import initial_adapter
from silotune.plan.plan import Plan
from silotune.simulation.program import score
from tests.federation import CHOICES
from tests.models.model_material import a_plan, trained_tokenizer

VOCABULARY, BATCH, RECORDS, STEPS = 40_000, 16, 300, 4


def write(folder: Path) -> None:
    """A model with a large vocabulary, and one site's records."""
    config = LlamaConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        vocab_size=VOCABULARY, max_position_embeddings=64, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    trained_tokenizer().save_pretrained(folder / "base")
    with (folder / "notes.csv").open("w", newline="") as file:
        answer = "unspecified injury of the right eye, initial encounter " * 2
        rows = [[f"chronic {i}", answer] for i in range(RECORDS)]
        csv.writer(file).writerows([["question", "answer"], *rows])
    (folder / "site.toml").write_text(f"""
name = "alpha"
[datasets.d]
format = "csv"
path = "notes.csv"
unit = "record"
declared_units = {RECORDS}
[datasets.d.columns]
prompt = "question"
response = "answer"
[datasets.d.budget]
epsilon = 9.0
delta = 1e-3
""")


def the_plan(folder: Path) -> Plan:
    return a_plan(
        folder / "base", "causal_lm", lora__target_modules="all-linear",
        rounds__number=STEPS, data__max_length=48, privacy__mode="record", privacy__epsilon=8.0,
        privacy__delta=1e-4, privacy__clip=1.0, privacy__batch=BATCH,
        privacy__max_physical_batch=BATCH,
    )  # fmt: skip


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def site(folder: Path) -> int:
    plan = the_plan(folder)
    run = SiteRun(
        SiteConfig.load(folder / "site.toml"),
        state=folder / "state",
        plan=plan,
        run="r",
        models=ModelCache(CHOICES),
        to_disk=False,
    )
    run.join()
    before, adapter = peak(), initial_adapter(run.training.trainer.layout, plan) + np.float32(0.01)
    for number in range(1, STEPS + 1):
        run.train(adapter, number)
    score(run.training, adapter, split=Split.TRAIN, frozen=False)
    return peak() - before


def plain(folder: Path) -> int:
    from peft import LoraConfig, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(folder / "base", attn_implementation="eager")
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    optimizer = torch.optim.Adam([p for p in wrapped.parameters() if p.requires_grad])
    generator = torch.Generator().manual_seed(0)
    before = peak()
    for _ in range(STEPS):
        ids = torch.randint(3, 300, (BATCH, 48), generator=generator)
        wrapped(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        for _ in range(4):
            wrapped(input_ids=ids, labels=ids)
    return peak() - before


if __name__ == "__main__":
    torch.set_num_threads(1)
    place = Path(sys.argv[1])
    if sys.argv[2] == "write":
        write(place)
    else:
        print({"site": site, "plain": plain}[sys.argv[2]](place))
