#!/usr/bin/env bash
# An attention mask does not hide padding in three encoders of Transformers, and one keeps a memory of it.
#
# Guess:     with its attention mask a text comes out of an encoder the same, alone or padded beside a longer
#            one, and a model in eval mode gives a text the same answer whatever it was given before.
# Behaviour: ConvBERT's convolutions run over the hidden states of padding. FNet's Fourier transform mixes all
#            positions, and its forward takes no mask. BigBird attends in full or in sparse blocks by the
#            padded length, so neighbours in a batch decide; and its first short text switches that very model
#            object to full attention for good, so that the next long text comes out differently, too.
#            An embedding, a loss and a gradient of one record thus depend on the records beside or before
#            it, which per-record clipping does not bound. BERT moves by rounding only.
# Versions:  transformers 5.23.0, torch 2.13.0 (CPU), numpy 2.4.6; random weights, seed 0.
# Output:    BERT      a text alone, and padded beside a longer one: 2.0e-07; a long text before and after a short one: 0.0e+00
#            ConvBERT  a text alone, and padded beside a longer one: 3.0e-01; a long text before and after a short one: 0.0e+00
#            FNet      a text alone, and padded beside a longer one: 3.0e-01; a long text before and after a short one: 0.0e+00
#            BigBird   a text alone, and padded beside a longer one: 7.9e-02; a long text before and after a short one: 1.5e-01
#            (distance of the first hidden state, in parts of its length)
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 numpy==2.4.6 2>/dev/null
cat > "$folder/show.py" <<'PY'
from copy import deepcopy

import torch
from transformers import (
    BertConfig, BertModel, BigBirdConfig, BigBirdModel, ConvBertConfig, ConvBertModel, FNetConfig, FNetModel,
)

WIDE = dict(initializer_range=0.3)  # weights of the size that training leaves
SIZE = dict(vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
MODELS = {
    "BERT": (BertModel, BertConfig(**SIZE, **WIDE)),
    "ConvBERT": (ConvBertModel, ConvBertConfig(**SIZE, **WIDE, embedding_size=32)),
    "FNet": (FNetModel, FNetConfig(**{k: v for k, v in SIZE.items() if k != "num_attention_heads"}, **WIDE)),
    "BigBird": (BigBirdModel, BigBirdConfig(**SIZE, **WIDE, block_size=4, num_random_blocks=1)),
}
short = torch.arange(5, 25).unsqueeze(0)
long = torch.arange(5, 95).unsqueeze(0)
padded = torch.cat([torch.cat([short, torch.zeros(1, 70, dtype=torch.long)], 1), long])
mask = torch.ones_like(padded)
mask[0, 20:] = 0


def first(encoder, ids, mask):
    masks = {} if isinstance(encoder, FNetModel) else {"attention_mask": mask}
    with torch.no_grad():
        return encoder(input_ids=ids, **masks).last_hidden_state[:, 0]


def moved(a, b):
    return float((a - b).norm() / a.norm())


beside, later = {}, {}
for name, (model, config) in MODELS.items():
    torch.manual_seed(0)
    fresh = model(config).eval()
    alone = first(deepcopy(fresh), short, torch.ones_like(short))[0]
    beside[name] = moved(alone, first(deepcopy(fresh), padded, mask)[0])
    used = deepcopy(fresh)
    before = first(used, long, torch.ones_like(long))
    assert torch.equal(before, first(used, long, torch.ones_like(long)))  # nothing random in it
    first(used, short, torch.ones_like(short))
    later[name] = moved(before, first(used, long, torch.ones_like(long)))
    print(f"{name:9s} a text alone, and padded beside a longer one: {beside[name]:.1e}; "
          f"a long text before and after a short one: {later[name]:.1e}")
assert beside["BERT"] < 1e-5 and later["BERT"] == 0.0
assert all(beside[name] > 1e-2 for name in ("ConvBERT", "FNet", "BigBird")), beside
assert later["BigBird"] > 1e-2 and later["ConvBERT"] == later["FNet"] == 0.0, later
PY
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/show.py" 2>/dev/null
