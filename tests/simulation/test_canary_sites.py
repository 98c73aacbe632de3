"""The worker of an attacked run: canaries among the records, and what an adapter knows of them."""

import numpy as np
import pytest
import torch

from silotune.data.records import Split
from silotune.models.adapter import read_adapter
from silotune.models.layout import initial_adapter
from silotune.privacy.attacks.canaries import code, exposures, plant
from silotune.simulation.program import build_with_canaries, payload_for
from tests.federation import CHOICES, write_federation

LANGUAGE = {
    "model.task": "causal_lm",
    "model.labels": None,
    "optimizer.site.head_rounds": 0,
    "lora.r": 16,
    "data.max_length": 64,
}


@pytest.fixture
def program(tmp_path, llama_folder):
    federation = write_federation(tmp_path, llama_folder)
    for site in federation.sites:
        config = site.folder / "site.toml"
        text = config.read_text().replace('text = "note"', 'prompt = "note"')
        config.write_text(text.replace('label = "chronic"', 'response = "chronic"'))
    states = [tmp_path / "states" / site.name for site in federation.sites]
    for state in states:
        state.mkdir(parents=True, mode=0o700)
    payload = payload_for(
        federation.plan.override(LANGUAGE),
        run="r",
        sites=federation.sites,
        states=states,
        choices=CHOICES,
        shared=tmp_path,
    )
    planted = plant(4, labels=(), seed=1).examples
    return build_with_canaries({**payload, "planted": [planted[:1], planted[1:], []]}), planted


def test_canaries_are_units_of_their_own_to_train_on(program):
    sites, planted = program
    for index, (first, more) in enumerate([(60, 1), (80, 3), (100, 0)]):
        records = sites.training(index).records
        assert sites.site(index).training.records is records  # those that its rounds draw from
        assert len(records) == first + more
        assert set(records.split[first:]) <= {Split.TRAIN}
        assert len(set(records.unit_of[first:])) == more
    assert sites.training(1).records.examples[-3:] == planted[1:]


def test_a_secret_that_is_learnt_by_heart_is_exposed_and_completed(program):
    sites, planted = program
    model, secret = sites.site(0).training.trainable.model, planted[0]
    before = initial_adapter(model.layout, model.plan)
    encoded = model.task.encode([secret], model.tokenizer, plan=model.plan)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(150):
        loss = model.task.losses(model.module, model.task.collate(encoded, [0], model.device))
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
    after = read_adapter(model)
    rng = np.random.default_rng(0)
    others = [{**secret, "response": code(rng)} for _ in range(63)]

    def asked(adapter):
        request = {"op": "losses", "examples": [secret, *others]}
        _, arrays = sites.inspect(0, request, {"flat": adapter})
        losses = arrays["losses"]
        complete = {"op": "complete", "prompts": [secret["prompt"]]}
        answer, _ = sites.inspect(0, complete, {"flat": adapter})
        return exposures(losses[:1], losses[None, 1:])[0], answer["texts"][0]

    bits, text = asked(after)
    assert bits > 10
    assert text.split() == secret["response"].split()
    bits, text = asked(before)
    assert bits < 10
    assert text.split() != secret["response"].split()
