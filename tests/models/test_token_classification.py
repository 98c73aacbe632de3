"""Token classification: tags by characters, windows, losses, entities, and a unit's clipped sum."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from seqeval.metrics import f1_score, precision_score, recall_score

from silotune.errors import ModelError
from silotune.models.adapter import write_adapter
from silotune.models.base import load_model
from silotune.models.batching import batches, record_of, room_in, windows_of
from silotune.models.scores import of_entities
from silotune.models.spans import TextSpan, spans_in, written
from silotune.models.tasks.token_classification import TokenClassification, _entities, find_spans
from silotune.privacy.clipping import attach
from silotune.privacy.engine import ClipGroup, DpSgd
from tests.models.model_material import CORPUS, a_plan

TASK = TokenClassification()
KINDS = ["NAME", "DATE"]
LONG = " ".join(CORPUS * 3)


def plan_of(base, **more):
    return a_plan(base, "token_classification", model__labels=KINDS, data__max_length=16, **more)


@pytest.fixture(scope="module")
def model(bert_folder):
    model = load_model(plan_of(bert_folder), device="cpu", attention="eager", dtype="float32")
    flat = np.random.default_rng(2).normal(0, 0.5, model.layout.size)
    write_adapter(model, flat.astype(np.float32))
    return model


def example(text, *spans):
    return {"text": text, "spans": written(TextSpan(*span) for span in spans)}


def marked(text, **words):
    """Each word of these where it stands first, with its label."""
    places = {word: text.index(word) for word in words}
    return example(text, *((at, at + len(w), words[w]) for w, at in places.items()))


EXAMPLES = [
    marked("acute injury of the eye", acute="NAME", eye="DATE"),
    marked(LONG, acute="NAME", diabetes="DATE", neuropathy="DATE"),
    example(""),
    marked("diabetes", diabetes="NAME"),
    marked(LONG[6:], femur="NAME"),
]


def encoded(model, examples=EXAMPLES, **more):
    return TASK.encode(
        examples, model.tokenizer, plan=model.plan.override(more) if more else model.plan
    )


def collated(model, data, rows):
    return TASK.collate(data, rows, model.device)


@given(st.integers(0, 400), st.integers(4, 60))
def test_windows_own_every_token_once_and_have_context_on_both_sides(length, capacity):
    windows = windows_of(length, capacity)
    owned = [n for w in windows for n in range(w.own_start, w.own_end)]
    assert owned == list(range(length))
    for window in windows:
        assert window.start <= window.own_start <= window.own_end <= window.end
        assert window.end - window.start <= capacity
        if window.start > 0:
            assert window.own_start - window.start >= capacity // 8
    assert room_in(len(windows), capacity) >= length


def test_every_token_of_a_record_has_its_tag_once_whatever_window_it_is_in(model):
    data = encoded(model, **{"data.max_windows": 100})
    batch = collated(model, data, range(len(EXAMPLES)))
    assert batch["input_ids"].shape[1] <= 16
    own = batch["targets"] != -100
    row_of = record_of(batch, 5)[:, None].expand_as(own)[own]
    for row, one in enumerate(EXAMPLES):
        tags = batch["targets"][own][row_of == row].tolist()
        bare = model.tokenizer(one["text"], add_special_tokens=False, return_offsets_mapping=True)
        pairs = zip(bare["input_ids"], bare["offset_mapping"], strict=True)
        # What is nothing but spaces has no answer of its own.
        kept = [(token, place) for token, place in pairs if one["text"][slice(*place)].strip()]
        offsets = [place for _, place in kept]
        assert batch["input_ids"][own][row_of == row].tolist() == [token for token, _ in kept]
        marked = [
            (tag, one["text"][a:b].strip()) for tag, (a, b) in zip(tags, offsets, strict=True)
        ]
        expected = [(s.label, one["text"][s.start : s.end]) for s in spans_in(one["spans"])]
        found = [
            (KINDS[kind], one["text"][offsets[a][0] : offsets[b][1]].strip())
            for a, b, kind in _entities(tags)
        ]
        assert found == expected, marked


def test_a_text_beyond_the_windows_is_cut_in_training_and_read_whole_when_it_is_answered(model):
    short = encoded(model, **{"data.max_windows": 2})
    whole = encoded(model, **{"data.max_windows": 100})
    assert short.lengths[1] < whole.lengths[1]
    batch = collated(model, short, [1])
    assert len(batch["input_ids"]) == 2
    (found,) = find_spans(model, [LONG], threshold=1e-9)  # everything is something
    assert found[0].start == 0
    assert found[-1].end == len(LONG)


def test_a_loss_is_the_mean_over_a_records_own_tokens_and_its_own_alone(model):
    data = encoded(model)
    rows = list(range(len(EXAMPLES)))
    with torch.no_grad():
        together = TASK.losses(model.module, collated(model, data, rows))
        for row in rows:
            batch = collated(model, data, [row])
            alone = TASK.losses(model.module, batch)
            torch.testing.assert_close(alone[0], together[row], rtol=1e-4, atol=1e-5)
            own = batch["targets"] != -100
            logs = model.module(batch)[own].log_softmax(-1)
            each = -logs[range(len(logs)), batch["targets"][own]]
            expected = each.mean() if len(each) else torch.zeros(())
            torch.testing.assert_close(alone[0], expected, rtol=1e-4, atol=1e-5)
    assert together[2] == 0


UNITS = np.array([0, 0, 1, 2, 2])


def truth(model, data, clip):
    """Each unit's gradient by autograd, record by record and window by window, clipped, added."""
    plain = load_model(model.plan, device="cpu", attention="eager", dtype="float32")
    flat = np.random.default_rng(2).normal(0, 0.5, model.layout.size)
    write_adapter(plain, flat.astype(np.float32))
    parameters = plain.parameters()
    total = [torch.zeros_like(p, dtype=torch.float64) for p in parameters]
    for unit in np.unique(UNITS):
        sums = [torch.zeros_like(p, dtype=torch.float64) for p in parameters]
        for row in np.flatnonzero(unit == UNITS):
            batch = collated(model, data, [int(row)])
            number = int((batch["targets"] != -100).sum())
            for window in range(len(batch["input_ids"])):
                one = {k: batch[k][window : window + 1] for k in ("input_ids", "attention_mask")}
                own = batch["targets"][window] != -100
                if not own.any():
                    continue
                logs = plain.module(one)[0][own].log_softmax(-1)
                loss = -logs[range(len(logs)), batch["targets"][window][own]].sum() / number
                found = torch.autograd.grad(loss, parameters)
                sums = [a + b.double() for a, b in zip(sums, found, strict=True)]
        norm = torch.sqrt(sum((s**2).sum() for s in sums))
        factor = min(1.0, clip / float(norm)) if norm else 1.0
        total = [a + factor * b for a, b in zip(total, sums, strict=True)]
    return total


@pytest.mark.parametrize("clip", [0.05, 1e6])
@pytest.mark.parametrize("size", [4, 64])
def test_a_units_records_and_windows_are_clipped_as_one_as_by_autograd_one_by_one(
    bert_folder, clip, size
):
    plan = plan_of(
        bert_folder, privacy__mode="record", privacy__unit="patient", privacy__epsilon=8.0,
        privacy__delta=1e-5, privacy__clip=clip, privacy__max_records_per_unit=2,
    )  # fmt: skip
    model = load_model(plan, device="cpu", attention="eager", dtype="float32")
    write_adapter(
        model, np.random.default_rng(2).normal(0, 0.5, model.layout.size).astype(np.float32)
    )
    data = encoded(model)
    expected = truth(model, data, clip)
    attached = attach(model.module, private=True)
    group = ClipGroup(name="all", parameters=model.parameters(), clip=clip)
    engine = DpSgd(attached, [group], sigma=1.0, noise=None)
    for rows in batches(data, range(len(UNITS)), size=size, units=UNITS):
        batch = collated(model, data, rows)
        _, units = np.unique(UNITS[rows], return_inverse=True)
        losses = TASK.losses(model.module, batch)
        by_window = torch.from_numpy(units)[record_of(batch, len(rows))]
        engine.accumulate(losses, units=by_window, n_units=int(units.max()) + 1)
    for found, sure in zip(engine.release(), expected, strict=True):
        torch.testing.assert_close(found, sure, rtol=1e-4, atol=1e-4 * min(clip, 1.0))
    attached.detach()


def test_micro_batches_count_windows_and_never_part_a_unit(model):
    data = encoded(model)
    for size in (1, 6, 1000):
        packed = batches(data, range(5), size=size, units=UNITS)
        assert sorted(row for rows in packed for row in rows) == [0, 1, 2, 3, 4]
        for rows in packed:
            assert len({*UNITS[rows]}) == 1 or data.sequences[rows].sum() <= size
            assert not {*UNITS[rows]} & {*UNITS[[r for r in range(5) if r not in rows]]}


tags = st.lists(st.sampled_from(["O", "B-NAME", "I-NAME", "B-DATE", "I-DATE"]), max_size=12)
NUMBERS = {"O": 0, "B-NAME": 1, "I-NAME": 2, "B-DATE": 3, "I-DATE": 4}


@settings(max_examples=200)
@given(st.lists(st.tuples(tags, st.randoms()), min_size=1, max_size=4))
def test_entity_scores_are_those_of_seqeval(drawn):
    truths = [one for one, _ in drawn]
    found = [[r.choice(list(NUMBERS)) if r.random() < 0.4 else t for t in one] for one, r in drawn]
    counts = np.zeros(7)
    for there, said in zip(truths, found, strict=True):
        a, b = ({*_entities([NUMBERS[t] for t in some])} for some in (there, said))
        for place, entities in enumerate((a & b, b, a)):
            for *_, kind in entities:
                counts[2 * place + kind] += 1
        counts[-1] += 1
    scores = of_entities(counts)
    if not counts[4:6].sum():
        assert np.isnan(list(scores.values())).all()
        return
    by = {"entity_f1": f1_score, "entity_recall": recall_score, "entity_precision": precision_score}
    for name, score in by.items():
        assert scores[name] == pytest.approx(score(truths, found, zero_division=0))


def test_counts_add_up_over_batches_and_a_record_counts_with_a_bounded_norm(model):
    data = encoded(model)
    counted = [TASK.score(model.module, collated(model, data, [row])) for row in range(5)]
    together = TASK.score(model.module, collated(model, data, range(5)))
    np.testing.assert_allclose(np.sum(counted, axis=0), together)
    assert together[4:6].tolist() == [4, 3]
    assert together[-1] == 5
    for row in range(5):
        capped = TASK.score(model.module, collated(model, data, [row]), cap=1.0)
        assert np.linalg.norm(capped[:-1]) <= 1.0 + 1e-12
        assert capped[-1] == 1


def test_a_lower_threshold_finds_more_and_the_spans_are_within_and_apart(model):
    texts = [LONG, "", "   ", "acute injury\n\nof the eye"]
    sizes = []
    for threshold in (0.99, 0.5, 0.01):
        found = find_spans(model, texts, threshold=threshold)
        assert found[1] == found[2] == []
        for text, spans in zip(texts, found, strict=True):
            places = [0, *(p for s in spans for p in (s.start, s.end)), len(text)]
            assert places == sorted(places)
            assert all(text[s.start : s.end].strip() == text[s.start : s.end] for s in spans)
        sizes.append(sum(s.end - s.start for spans in found for s in spans))
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]


def test_predictions_are_json_and_no_answer_depends_on_its_neighbours(model):
    texts = [{"text": one["text"]} for one in EXAMPLES]
    together = [p.output for p in TASK.predict(model, texts)]
    assert json.loads(json.dumps(together)) == together
    assert together == [TASK.predict(model, [one])[0].output for one in texts]


def test_a_tokenizer_without_places_is_refused_by_name(model):
    class Slow:
        is_fast = False

    with pytest.raises(ModelError, match="a Slow does not say"):
        TASK.encode(EXAMPLES, Slow(), plan=model.plan)
