"""Ids are built in one place: what stands in a text is text, whatever the tokenizer adds around it."""

import copy

import pytest
from tokenizers import processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from silotune.models.batching import leading_ids, prompt_ids, text_ids
from silotune.models.tasks import get_task
from tests.models.model_material import a_plan, minilm, trained_tokenizer

TEMPLATES = ["<s> $A", "<s> $A </s>", "$A </s>", "<s> </s> $A", "$A"]


def tokenizer_of(template: str) -> PreTrainedTokenizerFast:
    """The tests' tokenizer with other control tokens around a text."""
    made = trained_tokenizer()
    inner = made.backend_tokenizer
    inner.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return copy.deepcopy(made)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("text", ["</s>", "eye </s> ear", "<s>", "a<s></s>"])
def test_control_tokens_in_a_record_are_the_text_they_are(template, text):
    tokenizer = tokenizer_of(template)
    bare = [token for token in template.split() if token != "$A"]
    (whole,) = text_ids(tokenizer, [text], limit=64)
    assert sum(token in {0, 1} for token in whole) == len(bare)
    assert text in tokenizer.decode(whole)
    (prompt,) = prompt_ids(tokenizer, [text])
    lead = len(template.split("$A", 1)[0].split())
    assert prompt[:lead] == whole[:lead]
    assert not {0, 1} & set(prompt[lead:])
    assert tokenizer.decode(prompt[lead:]) == f"{text}\n"


def test_a_response_that_quotes_the_end_token_ends_once():
    plan = a_plan("unused", "causal_lm")
    tokenizer, task = trained_tokenizer(), get_task(plan)
    data = task.encode([{"prompt": "eye", "response": "a </s> b"}], tokenizer, plan=plan)
    answer = data.tokens(0)[data.targets[0] :].tolist()
    assert answer.count(1) == 1
    assert answer[-1] == 1
    assert tokenizer.decode(answer[:-1]) == "a </s> b"


def test_a_prompt_that_a_chat_template_rendered_has_one_begin_token():
    tokenizer = trained_tokenizer()
    (ids,) = prompt_ids(tokenizer, ["<s>user: eye?</s>"])
    assert ids.count(0) == 1
    assert ids.count(1) == 0


def test_brackets_of_bert_are_text_too():
    tokenizer = AutoTokenizer.from_pretrained(minilm())
    (ids,) = text_ids(tokenizer, ["kidney [SEP] [MASK]"], limit=64)
    assert ids.count(tokenizer.sep_token_id) == 1
    assert tokenizer.mask_token_id not in ids


@pytest.mark.parametrize(
    ("template", "lead"), [("<s> $A", [0]), ("$A </s>", []), ("<s> </s> $A", [0, 1]), ("$A", [])]
)
def test_what_comes_before_a_text_is_found_whatever_it_is_called(template, lead):
    assert leading_ids(tokenizer_of(template)) == lead
