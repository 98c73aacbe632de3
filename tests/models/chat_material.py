"""A tiny decoder with control tokens for chats, and templates as real models have them."""

import json
from pathlib import Path

from tests.models.model_material import a_plan, trained_tokenizer
from tests.small_models import write_llama

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% endif %}"
)
# Llama 3: a begin token of its own, trimmed texts, and a date in the system's turn.
DATED = (
    "{{ bos_token }}{% if messages[0]['role'] != 'system' %}"
    "<|im_start|>system\n{{ strftime_now('%d %b %Y') }}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] | trim }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Mistral: no generation prompt, roles must take turns, and only an answer has an end.
STRICT = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must take turns') }}{% endif %}"
    "{% if message['role'] == 'user' %}<|im_start|>{{ message['content'] }}<|im_start|>"
    "{% else %}{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}{% endif %}"
    "{% endfor %}"
)
# Qwen 3: the last answer begins with an empty thought, which is not in the generation prompt.
THINKING = CHATML.replace(
    "message['content'] +",
    "('<think>\n\n' if loop.last and message['role'] == 'assistant' else '') + message['content'] +",
)
REAL = {"chatml": CHATML, "dated": DATED, "strict": STRICT, "thinking": THINKING}
TURNS = {
    "user": "### Question: {content}\n",
    "assistant": "### Answer: {content}\n\n",
    "system": "{content}\n\n",
}


def chat_tokenizer(template: str | None = CHATML):
    tokenizer = trained_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.model_max_length = 256
    tokenizer.chat_template = template
    return tokenizer


def write_chat_model(folder: Path, template: str | None = CHATML) -> Path:
    return write_llama(folder, chat_tokenizer(template))


def chat_plan(base, *, chat=None, **settings):
    settings = {"data__max_length": 128, "model__chat": chat or {"template": "base"}} | settings
    return a_plan(base, "causal_lm", **settings)


def chat_site(name: str, source: str) -> str:
    """A site's file that offers the chats of a source, whose format its name says."""
    return f"""
name = "{name}"
[datasets.chats]
format = "{source.rpartition(".")[2]}"
path = "{source}"
unit = "record"
declared_units = 50
[datasets.chats.columns]
messages = "chat"
[datasets.chats.budget]
epsilon = 9.0
delta = 1e-3
"""


def messages(*contents: str, system: str | None = None) -> str:
    """Turns of a user and an assistant, as a record has them."""
    turns = [
        {"role": ("user", "assistant")[number % 2], "content": content}
        for number, content in enumerate(contents)
    ]
    if system is not None:
        turns.insert(0, {"role": "system", "content": system})
    return json.dumps(turns)
