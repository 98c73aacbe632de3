"""docs/models.md says what is so: every architecture with every task, taken all the way."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.models.architectures import NAMED, write_model
from tests.models.catalogue import HEAD, PAIRS, examined, require_exact

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
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


def test_experts_that_balance_their_load_or_draw_noise_couple_no_records(tmp_path):
    """The loss that balances them over a batch is none of ours, and a router's noise is off."""
    shape = {**NAMED["Mixtral"].shape, "output_router_logits": True, "router_jitter_noise": 0.3}
    base = write_model(replace(NAMED["Mixtral"], shape=shape), tmp_path, task="causal_lm")
    assert require_exact(base, "causal_lm").layout.size > 0


def test_the_page_has_a_line_for_each_architecture_and_task():
    page = PAGE.read_text()
    assert page.startswith(HEAD)
    cells = [line.split(" | ") for line in page.removeprefix(HEAD).splitlines()]
    assert [(line[0].removeprefix("| "), line[2]) for line in cells] == [
        (architecture.name, task) for architecture, task in PAIRS
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "task"), PAIRS, ids=[f"{pair[0].name}-{pair[1]}" for pair in PAIRS]
)
def test_a_line_of_the_page_is_what_happens(architecture, task, tmp_path):
    assert examined(architecture, task, tmp_path).line in PAGE.read_text().splitlines()
