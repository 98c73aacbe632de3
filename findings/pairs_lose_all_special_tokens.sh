#!/usr/bin/env bash
# A tokenizer whose template is only for one text gives a pair of texts no special token at all.
#
# Guess:     where a post-processor has a template for single texts ("<s> $A </s>") and none for pairs, a pair
#            gets that template around each of its texts, or around both together, or is refused.
# Behaviour: the pair's ids are those of the two bare texts, one behind the other: no begin, no separator and
#            no end, though special tokens are asked for; only the type ids (0 and 1) tell where the second
#            text begins, and models without token types never see those. The same tokenizer says that it
#            adds 2 special tokens to a text and 0 to a pair. Nothing warns. A model of pairs then trains
#            on texts whose border is gone: here ("a b", "c") and ("a", "b c") have equal ids.
# Versions:  tokenizers 0.23.3, transformers 5.23.0
# Output:    one text:  <s> a b </s>; adds 2
#            a pair:    a b c; adds 0
#            ids of ("a b", "c") and ("a", "b c"): equal
#            by PreTrainedTokenizerFast, special tokens asked for: a b c
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check tokenizers==0.23.3 transformers==5.23.0 2>/dev/null
cat > "$folder/show.py" <<'PY'
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

words = {"<s>": 0, "</s>": 1, "a": 2, "b": 3, "c": 4, "<unk>": 5}
made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
made.pre_tokenizer = pre_tokenizers.Whitespace()
made.post_processor = processors.TemplateProcessing(
    single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
)
one, pair, other = made.encode("a b"), made.encode("a b", "c"), made.encode("a", "b c")
adds = [made.num_special_tokens_to_add(is_pair) for is_pair in (False, True)]
fast = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")
whole = fast.convert_ids_to_tokens(fast("a b", "c", add_special_tokens=True)["input_ids"])
print(f"one text:  {' '.join(one.tokens)}; adds {adds[0]}")
print(f"a pair:    {' '.join(pair.tokens)}; adds {adds[1]}")
print(f"ids of (\"a b\", \"c\") and (\"a\", \"b c\"): {'equal' if pair.ids == other.ids else 'unlike'}")
print(f"by PreTrainedTokenizerFast, special tokens asked for: {' '.join(whole)}")
assert one.tokens == ["<s>", "a", "b", "</s>"] and adds == [2, 0]
assert pair.tokens == whole == ["a", "b", "c"] and pair.ids == other.ids
assert pair.type_ids == [0, 0, 1]
PY
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/show.py" 2>/dev/null
