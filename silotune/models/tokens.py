"""The special tokens that tasks need, for tokenizers that lack some of them."""

from __future__ import annotations

from typing import Any

from silotune.errors import ModelError


def padding_id(tokenizer: Any) -> int:
    """Token to fill a batch with. Padding is masked, so without one any token serves."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def end_id(tokenizer: Any) -> int:
    """Token that ends a response. Raises `ModelError` where there is none."""
    if tokenizer.eos_token_id is None:
        raise ModelError(
            "the tokenizer has no end-of-sequence token, so the model can't learn where to stop",
            remedy="Set eos_token in the base model's tokenizer_config.json.",
        )
    return int(tokenizer.eos_token_id)


def leading_ids(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before every text: the begin-of-sequence token, or nothing."""
    begin = tokenizer.bos_token_id
    adds = begin is not None and tokenizer("")["input_ids"][:1] == [begin]
    return [int(begin)] if adds else []
