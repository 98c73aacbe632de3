"""Models for the tests: tiny random ones with a tokenizer trained on the spot."""

from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from tests.models.model_material import trained_tokenizer

torch.set_num_threads(1)  # the models are too small to share out


def write_llama(folder: Path, tokenizer) -> Path:
    """Two random layers with grouped heads, and the tokenizer, whose longest text it has room for."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        LlamaForCausalLM(
            LlamaConfig(
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                intermediate_size=48,
                vocab_size=len(tokenizer),
                max_position_embeddings=tokenizer.model_max_length,
                bos_token_id=0,
                eos_token_id=1,
                initializer_range=0.2,
            )
        ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory) -> Path:
    """Two random layers of Llama, saved with its tokenizer."""
    return write_llama(tmp_path_factory.mktemp("llama"), trained_tokenizer())


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory) -> Path:
    """Three random layers of BERT with dropout in its configuration, as real ones have."""
    folder = tmp_path_factory.mktemp("bert")
    tokenizer = trained_tokenizer()
    tokenizer.pad_token = "</s>"
    with torch.random.fork_rng():
        torch.manual_seed(4)
        BertModel(
            BertConfig(
                hidden_size=32,
                num_hidden_layers=3,
                num_attention_heads=4,
                intermediate_size=48,
                vocab_size=len(tokenizer),
                max_position_embeddings=64,
                initializer_range=0.2,
                hidden_dropout_prob=0.3,
                attention_probs_dropout_prob=0.3,
            )
        ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
