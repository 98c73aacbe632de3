"""Adapters: flat and live, saved and loaded, with silotune and without."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tokenizers import processors
from transformers import AutoModel, AutoModelForCausalLM

from silotune.errors import AdapterMismatch
from silotune.models.adapter import load_adapter, read_adapter, save_adapter, write_adapter
from silotune.models.base import load_model
from silotune.models.batching import keep_end, leading_ids, prompt_ids
from silotune.models.layout import ArrayEntry, Layout, gathered, initial_adapter
from tests.models.model_material import TEXTS, a_plan, minilm, trained_tokenizer

names = st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=6)
shapes = st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple)


@st.composite
def layouts(draw):
    chosen = draw(st.lists(st.tuples(names, shapes), min_size=1, unique_by=lambda e: e[0]))
    cut = draw(st.integers(0, len(chosen)))
    groups = ["adapter"] * cut + ["head"] * (len(chosen) - cut)
    return Layout(tuple(ArrayEntry(n, s, g) for (n, s), g in zip(chosen, groups, strict=True)))


def random_flat(layout: Layout, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.3, layout.size).astype(np.float32)


# --- layout ---


@settings(max_examples=50, deadline=None)
@given(layouts())
def test_packing_undoes_unpacking(layout):
    flat = random_flat(layout)
    views = layout.unpack(flat)
    assert list(views) == [entry.name for entry in layout.entries]
    assert np.array_equal(layout.pack(views), flat)
    tensors = {name: torch.tensor(view, dtype=torch.float64) for name, view in views.items()}
    assert np.array_equal(layout.pack(tensors), flat)
    assert all(np.shares_memory(view, flat) for view in views.values())
    assert layout.nbytes == flat.nbytes


@settings(max_examples=50, deadline=None)
@given(layouts())
def test_groups_part_the_vector_adapter_first(layout):
    adapter, head = layout.spans({"A", "B"}), layout.spans({"head"})
    values = np.arange(layout.size)
    assert np.array_equal(gathered(values, (*adapter, *head)), values)
    for group, spans in (("adapter", adapter), ("head", head)):
        sizes = [entry.size for entry in layout.entries if entry.group == group]
        assert [span.size for span in spans] == sizes


@settings(max_examples=50, deadline=None)
@given(layouts())
def test_a_layout_survives_json_and_the_fingerprint_tells_layouts_apart(layout):
    again = Layout.from_json(layout.to_json())
    assert again == layout
    assert again.fingerprint == layout.fingerprint
    first = layout.entries[0]
    for other in (
        ArrayEntry(first.name + "x", first.shape, first.group),
        ArrayEntry(first.name, (*first.shape, 1), first.group),
    ):
        assert Layout((other, *layout.entries[1:])).fingerprint != layout.fingerprint


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[1]",
        '[{"name": 1, "shape": [1], "group": "head"}]',
        '[{"name": "a", "shape": [-1], "group": "head"}]',
        '[{"name": "a", "shape": [1], "group": "tail"}]',
        '[{"name": "a", "shape": [1], "group": "head"}, '
        '{"name": "b", "shape": [1], "group": "adapter"}]',
        '[{"name": "a", "shape": [1], "group": "head"}, '
        '{"name": "a", "shape": [1], "group": "head"}]',
    ],
)
def test_text_that_is_no_layout_is_refused(text):
    if text == "{}":
        assert Layout.from_json(text).size == 0
        return
    with pytest.raises(AdapterMismatch):
        Layout.from_json(text)


def test_arrays_that_do_not_fit_are_refused():
    layout = Layout((ArrayEntry("a", (2, 3), "adapter"), ArrayEntry("b", (4,), "head")))
    a, b = np.zeros((2, 3)), np.zeros(4)
    for arrays in ({"a": a}, {"a": a, "b": b, "c": b}, {"a": a.T, "b": b}):
        with pytest.raises(AdapterMismatch):
            layout.pack(arrays)
    for flat in (np.zeros(9, np.float32), np.zeros(10), np.zeros((10, 1), np.float32)):
        with pytest.raises(AdapterMismatch):
            layout.unpack(flat)


# --- live ---


@pytest.fixture(scope="module")
def model(bert_folder):
    return load_model(a_plan(bert_folder, model__centre_texts=["eye", "injury"]))


def test_the_layout_has_pefts_saved_names_in_module_order_then_the_head(model):
    names = [entry.name for entry in model.layout.entries]
    assert names[:-2] == list(get_peft_model_state_dict(model.module.peft))
    assert names[-2:] == ["head.weight", "head.bias"]
    assert names[0].endswith("layer.0.attention.self.query.lora_A.weight")
    assert names[1].endswith("layer.0.attention.self.query.lora_B.weight")


def test_the_flat_vector_lists_the_parameters_in_the_order_of_the_module(model):
    flat = random_flat(model.layout)
    write_adapter(model, flat)
    live = [p for p in model.module.parameters() if p.requires_grad]
    assert np.array_equal(torch.cat([p.detach().ravel() for p in live]).numpy(), flat)
    assert [id(p) for p in model.parameters()] == [id(p) for p in live]
    assert [id(p) for p in model.parameters("head")] == [id(p) for p in live[-2:]]
    assert [id(p) for p in model.parameters("adapter")] == [id(p) for p in live[:-2]]


def test_writing_then_reading_gives_the_same_bits_and_a_copy(model):
    flat = random_flat(model.layout)
    flat.flags.writeable = False
    write_adapter(model, flat)
    read = read_adapter(model)
    assert np.array_equal(read, flat)
    read += 1
    assert np.array_equal(read_adapter(model), flat)


def test_a_vector_of_another_length_is_not_written(model):
    write_adapter(model, random_flat(model.layout, 1))
    with pytest.raises(AdapterMismatch):
        write_adapter(model, np.zeros(model.layout.size + 1, np.float32))
    assert np.array_equal(read_adapter(model), random_flat(model.layout, 1))


def test_the_coordinator_knows_the_start_without_a_model(bert_folder, llama_folder):
    for plan in (
        a_plan(bert_folder, plan__seed=None),
        a_plan(bert_folder, aggregation__strategy="ffa"),
        a_plan(llama_folder, "causal_lm"),
    ):
        fresh = load_model(plan)
        layout = Layout.from_json(fresh.layout.to_json())
        assert np.array_equal(initial_adapter(layout, plan), read_adapter(fresh))


# --- folders ---


def logits_of(model) -> torch.Tensor:
    examples = [{"text": text, "label": "no"} for text in TEXTS]
    encoded = model.task.encode(examples, model.tokenizer, plan=model.plan)
    with model.module.inference():
        return model.module(model.task.collate(encoded, range(len(TEXTS)), model.device))


def predicted(model, role: str, texts):
    return model.task.predict(model, [{role: text} for text in texts])


def run_card(folder, monkeypatch) -> dict:
    """The names that the code in the adapter's card defines."""
    monkeypatch.chdir(folder)
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    namespace: dict = {}
    exec(code, namespace)
    return namespace


CASES = {
    "minilm": ("minilm", {"model__centre_texts": ["disease", "heart"], "lora__last_layers": 3}),
    "first": ("bert", {"model__pooling": "first", "lora__target_modules": "all-linear"}),
    "frozen": ("bert", {"aggregation__strategy": "ffa", "model__feature_scale": 2.5}),
    "last": ("llama", {"model__pooling": "last", "model__centre_texts": ["eye"]}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_cards_own_code_gives_our_logits(
    case, bert_folder, llama_folder, tmp_path, monkeypatch
):
    where, settings = CASES[case]
    base = {"minilm": minilm(), "bert": bert_folder, "llama": llama_folder}[where]
    model = load_model(a_plan(base, **settings))
    flat = random_flat(model.layout)
    save_adapter(model, flat, tmp_path / "a", plan=model.plan)
    write_adapter(model, flat)
    ours = logits_of(model)
    assert ours.std() > 0.1
    theirs = run_card(tmp_path / "a", monkeypatch)
    torch.testing.assert_close(theirs["logits"](TEXTS), ours, rtol=1e-4, atol=1e-4)
    labels = [p.output for p in predicted(model, "text", TEXTS)]
    assert theirs["predict"](TEXTS) == labels


def test_peft_and_transformers_alone_give_our_features_without_padding(bert_folder, tmp_path):
    model = load_model(a_plan(bert_folder, model__centre_texts=["eye"]))
    flat = random_flat(model.layout)
    save_adapter(model, flat, tmp_path, plan=model.plan)
    write_adapter(model, flat)
    plain = PeftModel.from_pretrained(AutoModel.from_pretrained(bert_folder), tmp_path).eval()
    head = load_file(tmp_path / "head.safetensors")
    for text, ours in zip(TEXTS, logits_of(model), strict=True):
        ids = torch.tensor([model.tokenizer(text)["input_ids"]])
        with torch.no_grad():
            mean = plain(input_ids=ids).last_hidden_state[0].mean(0)
        features = (mean / mean.norm() - head["centre"]) * 4.0
        theirs = head["head.weight"] @ features + head["head.bias"]
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)


def test_a_saved_causal_lm_gives_our_logits_with_peft_alone(llama_folder, tmp_path, monkeypatch):
    model = load_model(a_plan(llama_folder, "causal_lm"))
    flat = random_flat(model.layout)
    save_adapter(model, flat, tmp_path, plan=model.plan)
    write_adapter(model, flat)
    assert not (tmp_path / "head.safetensors").exists()
    decoder = AutoModelForCausalLM.from_pretrained(llama_folder)
    plain = PeftModel.from_pretrained(decoder, tmp_path).eval()
    examples = [{"prompt": text, "response": "chronic"} for text in TEXTS]
    encoded = model.task.encode(examples, model.tokenizer, plan=model.plan)
    batch = model.task.collate(encoded, range(len(TEXTS)), model.device)
    with model.module.inference():
        ours = model.module(batch)
    with torch.no_grad():
        theirs = plain(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    real = batch["attention_mask"][:, batch["kept"]].bool()
    torch.testing.assert_close(theirs[:, batch["kept"]][real], ours[real], rtol=1e-4, atol=1e-4)
    card = run_card(tmp_path, monkeypatch)
    assert [card["answer"](text) for text in TEXTS] == [
        p.output for p in predicted(model, "prompt", TEXTS)
    ]


@pytest.mark.parametrize("template", ["<s> $A </s>", "$A </s>", "<s> </s> $A", "$A"])
@pytest.mark.parametrize("task", ["causal_lm", "text_classification"])
def test_the_cards_code_builds_the_ids_of_predict(
    task, template, llama_folder, tmp_path, monkeypatch
):
    """Whatever the tokenizer puts around a text, and whatever control tokens a text quotes."""
    base = tmp_path / "base"
    shutil.copytree(llama_folder, base)
    tokenizer = trained_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer.save_pretrained(base)
    texts = [*TEXTS, "eye </s> ear", "chronic kidney disease " * 20]
    model = load_model(a_plan(base, task, model__pooling="last"))
    flat = random_flat(model.layout)
    save_adapter(model, flat, tmp_path / "a", plan=model.plan)
    write_adapter(model, flat)
    card = run_card(tmp_path / "a", monkeypatch)
    if task == "causal_lm":
        assert [card["answer"](text) for text in texts] == [
            p.output for p in predicted(model, "prompt", texts)
        ]
        ids = [card["ids_of"](text) for text in texts]
        lead = len(leading_ids(model.tokenizer))
        assert ids == [keep_end(p, 16, lead=lead) for p in prompt_ids(model.tokenizer, texts)]
    else:
        found = predicted(model, "text", texts)
        shares = torch.tensor([list(p.probabilities.values()) for p in found])
        torch.testing.assert_close(card["logits"](texts).softmax(1), shares, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frozen", [True, False])
def test_loading_gives_back_what_was_saved(bert_folder, tmp_path, frozen):
    plan = a_plan(
        bert_folder,
        aggregation__strategy="ffa" if frozen else "fedavg",
        model__centre_texts=["eye"],
    )
    model = load_model(plan)
    flat = random_flat(model.layout)
    before = read_adapter(model)
    save_adapter(model, flat, tmp_path, plan=plan)
    assert np.array_equal(load_adapter(model, tmp_path), flat)
    assert np.array_equal(read_adapter(model), before)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(bert_folder)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(".lora_A." in name for name in saved) == len(saved) / 2 == 6


def test_saving_twice_writes_the_same_bytes(model, tmp_path):
    for folder in ("a", "b"):
        save_adapter(model, random_flat(model.layout), tmp_path / folder, plan=model.plan)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "head.safetensors",
        "plan.json",
        "silotune.json",
    ]
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_an_adapter_made_otherwise_is_refused(bert_folder, tmp_path):
    plan = a_plan(bert_folder, model__centre_texts=["eye"], aggregation__strategy="ffa")
    model = load_model(plan)
    save_adapter(model, random_flat(model.layout), tmp_path, plan=plan)
    for changes, named in (
        ({"model.labels": ["yes", "no", "perhaps"]}, "labels"),
        ({"model.pooling": "first"}, "pooling"),
        ({"model.feature_scale": 1.0}, "feature_scale"),
        ({"lora.alpha": 8.0}, "lora_alpha"),
        ({"lora.r": 3}, "r is 2"),
        ({"model.centre_texts": ["chronic"]}, "centre"),
        ({"plan.seed": 8}, "lora_A"),
        ({"lora.target_modules": ["key"]}, "lora_A"),
        ({"lora.last_layers": 2}, "unknown"),
    ):
        other = load_model(plan.override(changes))
        with pytest.raises(AdapterMismatch, match=named):
            load_adapter(other, tmp_path)


@pytest.mark.parametrize(
    "name",
    ["adapter_model.safetensors", "adapter_config.json", "head.safetensors", "silotune.json"],
)
def test_a_missing_or_damaged_file_is_refused(model, tmp_path, name):
    save_adapter(model, random_flat(model.layout), tmp_path, plan=model.plan)
    (tmp_path / name).write_bytes(b"\0nonsense")
    with pytest.raises(AdapterMismatch, match=name):
        load_adapter(model, tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(AdapterMismatch, match=name):
        load_adapter(model, tmp_path)


def test_extra_arrays_in_a_file_are_refused(model, tmp_path):
    save_adapter(model, random_flat(model.layout), tmp_path, plan=model.plan)
    path = tmp_path / "adapter_model.safetensors"
    save_file(load_file(path) | {"more": torch.zeros(1)}, path)
    with pytest.raises(AdapterMismatch, match="unknown"):
        load_adapter(model, tmp_path)


def test_the_card_tells_how_private_the_training_was(bert_folder, tmp_path):
    private = {
        "privacy": {"mode": "record", "epsilon": 8.0, "delta": 1e-5, "clip": 1.0, "batch": 4}
    }
    plan = a_plan(bert_folder)
    texts = {}
    for key, changed in {
        "none": plan,
        "seeded": plan.override(private),
        "private": plan.override(private | {"plan.seed": None}),
    }.items():
        model = load_model(changed, attention="eager", dtype="float32")
        save_adapter(model, read_adapter(model), tmp_path / key, plan=changed)
        texts[key] = (tmp_path / key / "README.md").read_text()
        assert (
            json.loads((tmp_path / key / "silotune.json").read_text())["plan_sha256"] in texts[key]
        )
    assert "without differential privacy" in texts["none"]
    assert "Not private" in texts["seeded"]
    assert "ε = 8" in texts["private"]
