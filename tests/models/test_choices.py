"""Device, matrix products and attention: measured once, or by rule where a seed asks for it."""

import json
from dataclasses import asdict

import pytest
import torch
import transformers as hf

from silotune.errors import EnvironmentFault
from silotune.models import choices
from silotune.models.base import load_model
from silotune.models.choices import Choices, choose, resolve_device
from tests.models.model_material import a_plan, minilm

AUTO = {"plan__seed": None, "model__dtype": "auto"}


@pytest.fixture
def timed(monkeypatch):
    """Replaces the stop-watch: seconds by name, and a list of what was asked."""
    seconds = {"float32": 1.0, "bfloat16": 1.0, "eager": 1.0, "sdpa": 1.0}
    asked = []

    def fake(work, place):
        for run in work.values():
            run()
        asked.append(set(work))
        return {name: seconds[name] for name in work}

    monkeypatch.setattr(choices, "_time", fake)
    return seconds, asked


def test_a_seeded_plan_is_not_measured(timed):
    _, asked = timed
    found = {choose(a_plan(minilm(), model__dtype="auto")) for _ in range(3)}
    assert asked == []
    assert len(found) == 1
    assert found.pop().attention == "eager"


def test_long_texts_of_a_seeded_plan_get_the_attention_that_saves_memory():
    assert choose(a_plan(minilm(), data__max_length=512)).attention == "sdpa"


@pytest.mark.parametrize(("faster", "slower"), [("eager", "sdpa"), ("sdpa", "eager")])
def test_the_attention_that_measured_faster_is_taken_and_named(timed, bert_folder, faster, slower):
    timed[0][faster] = 0.625
    found = choose(a_plan(bert_folder, plan__seed=None))
    assert found.attention == faster
    assert f"{faster} attention measured 1.60x as fast as {slower}" in str(found)


@pytest.mark.parametrize(
    ("seconds", "dtype"), [(1.0, "float32"), (0.8, "float32"), (0.75, "bfloat16")]
)
def test_bfloat16_must_be_well_faster_to_be_taken(timed, bert_folder, seconds, dtype):
    timed[0]["bfloat16"] = seconds
    assert choose(a_plan(bert_folder, **AUTO)).dtype == dtype


def test_the_plans_own_type_is_not_second_guessed(timed, bert_folder):
    found = choose(a_plan(bert_folder, plan__seed=None, model__dtype="bfloat16"))
    assert found.dtype == "bfloat16"
    assert timed[1] == [{"eager", "sdpa"}]


def test_measuring_really_works_and_leaves_threads_and_random_state_alone(bert_folder):
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    found = choose(a_plan(bert_folder, **AUTO))
    assert found.attention in {"eager", "sdpa"}
    assert found.dtype in {"float32", "bfloat16"}
    assert found.device == "cpu"
    assert "measured" in found.reason
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "kind",
    [
        "Bert",
        "Roberta",
        "DistilBert",
        "ModernBert",
        "Electra",
        "DebertaV2",
        "Llama",
        "Mistral",
        "Qwen3",
        "Gemma2",
        "Gemma3Text",
        "Phi3",
        "GPT2",
        "GPTNeoX",
        "OPT",
    ],
)
def test_attention_of_any_family_can_be_chosen(kind, timed):
    config = getattr(hf, f"{kind}Config")()
    config.hidden_size = config.intermediate_size = config.word_embed_proj_dim = 64
    config.num_attention_heads = config.num_key_value_heads = 4
    plan = a_plan("unused", plan__seed=None)
    found, reason = choices._choose_attention(plan, config, torch.device("cpu"), measure=True)
    measured = kind not in {"DebertaV2", "Gemma2"}  # those have no other than eager
    assert timed[1] == [{"eager", "sdpa"}] * measured
    assert measured or (found, reason) == ("eager", "the model has no other attention")


def test_a_model_with_one_attention_only_gets_that(bert_folder, tmp_path, timed):
    for path in bert_folder.iterdir():
        if path.name != "config.json":
            (tmp_path / path.name).symlink_to(path)
    hf.DebertaV2Config(num_hidden_layers=1).save_pretrained(tmp_path)
    assert choose(a_plan(tmp_path, plan__seed=None)).attention == "eager"
    assert timed[1] == []


def test_workers_that_are_told_do_not_measure(bert_folder, timed):
    plan = a_plan(bert_folder, **AUTO)
    told = Choices(**json.loads(json.dumps(asdict(choose(plan)))))
    del timed[1][:]
    model = load_model(plan, device=told.device, attention=told.attention, dtype=told.dtype)
    assert timed[1] == []
    assert (model.attention, str(model.dtype)) == (told.attention, f"torch.{told.dtype}")
    assert model.module.peft.config._attn_implementation == told.attention


def test_what_is_not_told_goes_by_a_rule_in_every_process(bert_folder, timed):
    """No stop-watch: plan check, predict and each site of a federation come to the same."""
    timed[0].update(sdpa=0.1, bfloat16=0.1)
    model = load_model(a_plan(bert_folder, **AUTO))
    assert timed[1] == []
    assert model.attention == "eager"
    assert "attention by a fixed rule" in model.description
    seeded = load_model(a_plan(bert_folder, model__dtype="auto"))
    assert (model.dtype, model.attention) == (seeded.dtype, seeded.attention)
    assert load_model(a_plan(bert_folder, **AUTO), attention="sdpa").attention == "sdpa"


def test_what_can_not_be_measured_goes_by_the_rule(bert_folder, monkeypatch):
    def fail(*args, **kwargs):
        raise KeyError("layer")

    monkeypatch.setattr(choices, "_time_attention", fail)
    found = choose(a_plan(bert_folder, plan__seed=None))
    assert found.attention == "eager"
    assert "could not be measured" in found.reason


@pytest.mark.parametrize("name", ["cuda:63", "tpu", "", "cpu:x", "mps"])
def test_a_device_that_is_not_there_is_refused(name):
    with pytest.raises(EnvironmentFault):
        resolve_device(name)


def test_auto_takes_cuda_where_there_is_one(monkeypatch):
    assert resolve_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto") == torch.device("cuda:0")
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    assert resolve_device("cuda") == torch.device("cuda:0")
    with pytest.raises(EnvironmentFault, match="2 CUDA devices"):
        resolve_device("cuda:2")
