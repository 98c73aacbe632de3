"""Unlike architectures, each held to one-by-one autograd; the catalogue has them all."""

import pytest

from tests.models.architectures import NAMED, write_model
from tests.models.catalogue import require_exact

# As unlike each other as architectures are: shared layers, relative positions, windows, transposed
# weights, no attention, experts, positions by distance.
UNLIKE = [
    ("DeBERTa v3", "text_classification"),
    ("ALBERT", "text_classification"),
    ("Longformer", "text_classification"),
    ("T5 encoder", "text_classification"),
    ("GPT-2", "causal_lm"),
    ("Mamba", "causal_lm"),
    ("Mixtral", "causal_lm"),
    ("BLOOM", "causal_lm"),
]


@pytest.mark.parametrize(("name", "task"), UNLIKE)
def test_the_clipped_sum_of_units_is_that_of_one_by_one_autograd(name, task, tmp_path):
    base = write_model(NAMED[name], tmp_path, task=task, padding_side="left")
    assert require_exact(base, task).layout.size > 0
