"""Architectures that people train, each as a tiny random model with a tokenizer made on the spot."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers as hf

from tests.models.model_material import trained_tokenizer

SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 130,
    "initializer_range": 0.2,
}
ENDS = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 1}
POSITIONS = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
GROUPED = {**SHAPE, **ENDS, "num_key_value_heads": 2, "head_dim": 8}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 130, "initializer_range": 0.2}
T5 = {"d_model": 32, "num_layers": 2, "num_heads": 4, "d_kv": 8, "d_ff": 48}


@dataclass(frozen=True)
class Architecture:
    """One line of docs/models.md.

    Attributes
    ----------
    name : str
        As people call it.
    config : str
        Transformers' configuration, without "Config".
    shape : dict
        Its arguments.
    generates : bool
        Whether it is a decoder, so that it can be asked to answer.
    settings : dict
        What a plan has to say beside the defaults.
    """

    name: str
    config: str
    shape: dict[str, Any]
    generates: bool = False
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def model_type(self) -> str:
        """Transformers' name of it, as ``config.json`` has it."""
        return str(getattr(hf, f"{self.config}Config").model_type)


def _encoder(name: str, config: str, **shape: Any) -> Architecture:
    return Architecture(name, config, {**SHAPE, **shape})


def _decoder(name: str, config: str, base: dict[str, Any], **shape: Any) -> Architecture:
    return Architecture(name, config, {**base, **shape}, generates=True)


ARCHITECTURES = (
    _encoder("BERT", "Bert"),
    Architecture(
        "DistilBERT", "DistilBert", {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}
    ),
    _encoder("RoBERTa", "Roberta", pad_token_id=1),
    _encoder("XLM-RoBERTa", "XLMRoberta", pad_token_id=1),
    _encoder("DeBERTa", "Deberta", **POSITIONS),
    _encoder("DeBERTa v2", "DebertaV2", **POSITIONS),
    _encoder(
        "DeBERTa v3",
        "DebertaV2",
        **POSITIONS,
        share_att_key=True,
        position_buckets=16,
        norm_rel_ebd="layer_norm",
    ),
    _encoder("ELECTRA", "Electra", embedding_size=16),
    _encoder("ALBERT", "Albert", embedding_size=16),
    _encoder("MPNet", "MPNet"),
    _encoder("ModernBERT", "ModernBert", pad_token_id=1, cls_token_id=0, sep_token_id=1),
    _encoder("Longformer", "Longformer", attention_window=8),
    _encoder("RemBERT", "RemBert", input_embedding_size=16),
    Architecture("T5 encoder", "T5", {**T5, "pad_token_id": 1, "decoder_start_token_id": 1}),
    Architecture(
        "XLM", "XLM", {"emb_dim": 32, "n_layers": 2, "n_heads": 4, "pad_index": 1, "n_langs": 1}
    ),
    Architecture("XLNet", "XLNet", {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}),
    Architecture(
        "BigBird",
        "BigBird",
        {**SHAPE, "block_size": 4, "num_random_blocks": 2},
        settings={"data__max_length": 64},  # on short texts it attends as BERT does
    ),
    _encoder("ConvBERT", "ConvBert", embedding_size=32),
    Architecture("FNet", "FNet", {k: v for k, v in SHAPE.items() if k != "num_attention_heads"}),
    _encoder(
        "SqueezeBERT",
        "SqueezeBert",
        **{f"{part}_groups": 1 for part in ("q", "k", "v", "post_attention", "intermediate", "output")},
        embedding_size=32,
    ),
    _decoder("GPT-2", "GPT2", GPT),
    _decoder("GPT-J", "GPTJ", GPT, rotary_dim=4),
    _decoder("GPT-NeoX", "GPTNeoX", SHAPE, **ENDS),
    _decoder("GPT-Neo", "GPTNeo", {}, hidden_size=32, num_layers=2, num_heads=4, window_size=8,
             attention_types=[[["global", "local"], 1]], max_position_embeddings=130),
    _decoder("Llama", "Llama", GROUPED),
    _decoder("Mistral", "Mistral", GROUPED, sliding_window=8),
    _decoder("Qwen2", "Qwen2", GROUPED),
    _decoder("Qwen3", "Qwen3", GROUPED),
    _decoder("Gemma 2", "Gemma2", GROUPED, sliding_window=8),
    _decoder("Gemma 3", "Gemma3Text", GROUPED, sliding_window=8),
    _decoder("Phi", "Phi", SHAPE, **ENDS),
    _decoder("Phi-3", "Phi3", SHAPE, **ENDS),
    _decoder("OPT", "OPT", ENDS, hidden_size=32, word_embed_proj_dim=32, ffn_dim=48,
             num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=130),
    _decoder("BLOOM", "Bloom", {}, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.2),
    _decoder("Falcon", "Falcon", {}, hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
    _decoder("Mamba", "Mamba", {}, hidden_size=32, num_hidden_layers=2, state_size=4),
    _decoder("Mixtral", "Mixtral", GROUPED, num_local_experts=4, num_experts_per_tok=2),
)  # fmt: skip
NAMED = {architecture.name: architecture for architecture in ARCHITECTURES}


def write_model(
    architecture: Architecture, folder: Path, *, task: str, padding_side: str = "right"
) -> Path:
    """Save a random model of an architecture, as Transformers does, with its tokenizer."""
    tokenizer = trained_tokenizer()
    tokenizer.pad_token, tokenizer.model_max_length = "</s>", 100_000
    tokenizer.padding_side = padding_side
    config = getattr(hf, f"{architecture.config}Config")(
        vocab_size=len(tokenizer) + 8, **architecture.shape
    )
    auto = hf.AutoModelForCausalLM if task == "causal_lm" else hf.AutoModel
    with torch.random.fork_rng():
        torch.manual_seed(3)
        auto.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
