"""Clipped and noisy sums against a slow loop over units, and the checks that stop a bad step."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_truth import Shape, alone, clipped_sum, relative_error, rows, sequences, toy, toy_losses
from torch import nn

from silotune.errors import SelfCheckFailed
from silotune.privacy.clipping import attach
from silotune.privacy.engine import ClipGroup, DpSgd, PlainSgd
from silotune.privacy.layers import row_norms
from silotune.privacy.noise import SeededNoise, noise_is_plausible

TOLERANCE = 1e-5


class Noise:
    """Gaussian noise that remembers what it added, or does something wrong on request."""

    secure = False

    def __init__(self, *, factor=1.0, seed=0):
        self.factor, self.added, self.asked = factor, [], []
        self.generator = torch.Generator().manual_seed(seed)

    def add(self, sums, std):
        noise = torch.randn(sums.shape, generator=self.generator) * std * self.factor
        self.added.append(noise)
        self.asked.append(std)
        return sums + noise

    def normal(self, shape, std):
        raise AssertionError("a value is protected with add")

    def uniform(self, n):
        raise AssertionError("the engine samples nothing")


def split_groups(attached, *, head_clip, adapter_clip, head_share):
    head = tuple(p for n, p in attached.parameters.items() if "head" in n)
    adapter = tuple(p for n, p in attached.parameters.items() if "head" not in n)
    return [
        ClipGroup("head", head, head_clip, head_share),
        ClipGroup("adapter", adapter, adapter_clip, 1.0 - head_share),
    ]


def indices(attached, group):
    order = {id(p): i for i, p in enumerate(attached.parameters.values())}
    return [order[id(p)] for p in group.parameters]


def one_group(attached, clip=1.0):
    return [ClipGroup("all", tuple(attached.parameters.values()), clip)]


def clean_sum(attached, engine):
    """The step's clipped sum before noise, in the model's order."""
    sums = [p.summed_grad.clone() for p in attached.parameters.values()]
    engine.release()
    return sums


@st.composite
def cases(draw):
    shape = Shape(
        width=draw(st.integers(4, 14)),
        rank=draw(st.integers(1, 6)),
        rslora=draw(st.booleans()),
        twice=draw(st.booleans()),
        checkpointing=draw(st.sampled_from(["none", "reentrant", "saved"])),
        freeze=draw(st.sampled_from(["none", "a"])),
    )
    n_units = draw(st.integers(1, 5))
    units = draw(st.lists(st.integers(0, n_units - 1), min_size=1, max_size=8))
    return {
        "shape": shape,
        "n_units": n_units,
        "units": units,
        "parts": draw(st.integers(1, 3)),
        "groups": draw(st.booleans()),
        "clips": (draw(st.floats(0.02, 3.0)), draw(st.floats(0.02, 3.0))),
        "seed": draw(st.integers(0, 999)),
    }


@settings(max_examples=80, deadline=None)
@given(case=cases())
def test_the_clipped_sum_is_that_of_a_loop_over_units(case):
    model = toy(case["shape"], seed=case["seed"])
    batch, units = sequences(len(case["units"]), seed=case["seed"]), case["units"]
    truth = alone(model, batch)
    attached = attach(model)
    head_clip, adapter_clip = case["clips"]
    groups = (
        split_groups(attached, head_clip=head_clip, adapter_clip=adapter_clip, head_share=0.3)
        if case["groups"]
        else one_group(attached, head_clip)
    )
    expected = clipped_sum(
        truth, units, case["n_units"], [(indices(attached, g), g.clip) for g in groups]
    )
    engine = DpSgd(attached, groups, sigma=1.0, noise=Noise())
    # A unit's sequences stay in one call; the units are dealt to several physical batches.
    for part in range(case["parts"]):
        chosen = [row for row, unit in enumerate(units) if unit % case["parts"] == part]
        if chosen:
            engine.accumulate(
                toy_losses(model, rows(batch, chosen)),
                units=torch.tensor(units)[chosen],
                n_units=case["n_units"],
            )
    assert relative_error(clean_sum(attached, engine), expected) < TOLERANCE


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 9), clip=st.floats(0.01, 5.0), cut=st.integers(0, 9))
def test_records_are_units_of_their_own_by_default(n, clip, cut):
    model, batch = toy(), sequences(n)
    truth = alone(model, batch)
    attached = attach(model)
    engine = DpSgd(attached, one_group(attached, clip), sigma=1.0, noise=Noise())
    for part in (slice(0, cut), slice(cut, n)):
        engine.accumulate(toy_losses(model, rows(batch, part)))
    expected = clipped_sum(truth, range(n), n, [(range(len(attached.parameters)), clip)])
    assert relative_error(clean_sum(attached, engine), expected) < TOLERANCE


def test_the_release_is_the_sum_plus_the_noise_in_group_order():
    model, batch = toy(), sequences(5)
    attached, noise = attach(model), Noise()
    groups = split_groups(attached, head_clip=0.5, adapter_clip=2.0, head_share=0.2)
    engine = DpSgd(attached, groups, sigma=1.5, noise=noise)
    engine.accumulate(toy_losses(model, batch))
    clean = [p.summed_grad.clone() for p in engine.parameters]
    released = engine.release()
    assert [id(p) for p in engine.parameters] == [id(p) for g in groups for p in g.parameters]
    assert all(r.dtype == torch.float32 for r in released)
    assert [r.shape for r in released] == [p.shape for p in engine.parameters]
    found = torch.cat([r.flatten() for r in released])
    expected = torch.cat([c.flatten() for c in clean]) + torch.cat(noise.added)
    torch.testing.assert_close(found, expected.float())
    assert noise.asked == [1.5 * 0.5 / math.sqrt(0.2), 1.5 * 2.0 / math.sqrt(0.8)]


@given(
    sigma=st.floats(0.3, 20.0),
    clips=st.lists(st.floats(0.01, 50.0), min_size=1, max_size=4),
    weights=st.lists(st.floats(0.05, 1.0), min_size=4, max_size=4),
)
def test_groups_together_are_one_gaussian_mechanism_of_the_same_sigma(sigma, clips, weights):
    shares = [w / sum(weights[: len(clips)]) for w in weights[: len(clips)]]
    groups = [ClipGroup("g", (), c, f) for c, f in zip(clips, shares, strict=True)]
    moved = math.fsum((g.clip / g.noise_std(sigma)) ** 2 for g in groups)
    assert math.isclose(math.sqrt(moved), 1.0 / sigma, rel_tol=1e-9)


def test_an_empty_batch_releases_noise_of_the_right_size_and_nothing_else():
    model = toy(Shape(width=40, rank=8))
    attached = attach(model)
    engine = DpSgd(attached, one_group(attached, 0.7), sigma=2.0, noise=SeededNoise(3))
    released = engine.release()
    flat = torch.cat([r.flatten() for r in released]).double()
    # 6 standard errors of a standard deviation and of a mean: false alarm 2e-9 each.
    assert abs(float(flat.std()) / 1.4 - 1) < 6 / math.sqrt(2 * len(flat))
    assert abs(float(flat.mean())) < 6 * 1.4 / math.sqrt(len(flat))
    engine.accumulate(toy_losses(model, sequences(0)))
    engine.release()


def test_steps_are_independent():
    model, batch = toy(), sequences(5)
    attached = attach(model)
    engine = DpSgd(attached, one_group(attached), sigma=1.0, noise=Noise())
    engine.accumulate(toy_losses(model, batch))
    first = clean_sum(attached, engine)
    for _ in range(2):
        engine.accumulate(toy_losses(model, batch))
        again = clean_sum(attached, engine)
    for a, b in zip(first, again, strict=True):
        torch.testing.assert_close(a, b)


def test_the_head_can_be_trained_alone_on_cached_features():
    model = toy()
    attached = attach(model)
    head = tuple(p for n, p in attached.parameters.items() if "head" in n)
    features, target = torch.randn(6, 15), torch.zeros(6, dtype=torch.long)
    engine = DpSgd(attached, [ClipGroup("head", head, 1.0)], sigma=1.0, noise=Noise())
    logits = model.base_model.model.head(features)
    engine.accumulate(F.cross_entropy(logits, target, reduction="none"))
    assert [r.shape for r in engine.release()] == [p.shape for p in head]


@pytest.mark.parametrize("units", [None, [0, 1, 1, 0]])
def test_no_unit_moves_the_sum_by_more_than_the_clip_norm(units):
    model, batch = toy(seed=2), sequences(4, seed=2)
    attached = attach(model)
    for row in range(4):
        engine = DpSgd(attached, one_group(attached, 0.01), sigma=1.0, noise=Noise())
        chosen = [row] if units is None else [i for i in range(4) if units[i] == units[row]]
        assigned = None if units is None else torch.zeros(len(chosen), dtype=torch.int64)
        engine.accumulate(
            toy_losses(model, rows(batch, chosen)),
            units=assigned,
            n_units=None if units is None else 1,
        )
        flat = torch.cat([s.double().flatten() for s in clean_sum(attached, engine)])
        assert 0.00999 < float(flat.norm()) <= 0.01


@pytest.mark.parametrize("size", [3, 1000, 300_000])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_clipping_never_passes_its_bound_by_rounding(size, scale):
    head = nn.Linear(size, 1, bias=False)
    attached = attach(head)
    engine = DpSgd(attached, one_group(attached, 1.0), sigma=1.0, noise=Noise())
    generator = torch.Generator().manual_seed(size)
    for _ in range(20):
        engine.accumulate(head(torch.randn(1, size, generator=generator) * scale).sum(1))
        norm = float(clean_sum(attached, engine)[0].double().norm())
        assert norm <= 1.0


def test_a_unit_in_a_crowd_moves_the_sum_by_its_own_clipped_gradient_alone():
    """Float32 sums fail this: one more unit changes how the sum of all the others is rounded."""
    size, crowd = 5000, 300
    head = nn.Linear(size, 1, bias=False)
    attached = attach(head)
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(1, size, generator=generator)  # units that agree make a long sum
    records = common + 1e-3 * torch.randn(crowd, size, generator=generator)

    def total(chosen):
        engine = DpSgd(attached, one_group(attached, 1.0), sigma=1.0, noise=Noise())
        for batch in chosen.split(64):
            engine.accumulate(head(batch).sum(1))
        return clean_sum(attached, engine)[0].double()

    whole, others, own = total(records), total(records[1:]), total(records[:1])
    assert float(whole.norm()) > 0.99 * crowd
    assert float((whole - others - own).norm()) < 1e-10
    assert float((whole - others).norm()) <= 1.0


def test_a_zero_gradient_stays_zero():
    head = nn.Linear(4, 2)
    attached = attach(head)
    engine = DpSgd(attached, one_group(attached), sigma=1.0, noise=Noise())
    engine.accumulate((head(torch.randn(3, 4)) * 0).sum(1))
    assert all(float(s.abs().sum()) == 0 for s in clean_sum(attached, engine))


def test_the_plain_twin_sums_without_clipping():
    model, batch = toy(), sequences(5)
    truth = alone(model, batch)
    engine = PlainSgd(attach(model, private=False))
    for part in (slice(0, 2), slice(2, 5), slice(5, 5)):
        engine.accumulate(toy_losses(model, rows(batch, part)))
    assert relative_error(engine.release(), [sum(g) for g in zip(*truth, strict=True)]) < TOLERANCE
    assert all(float(t.abs().sum()) == 0 for t in engine.release())


# --- checks, each with the fault that it is for ---------------------------------------------------


def engine_for(model, **options):
    attached = attach(model)
    options = {"sigma": 1.0, "noise": Noise(), **options}
    return attached, DpSgd(attached, one_group(attached), **options)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("units", [None, [0, 1, 0, 2]])
def test_a_unit_whose_gradient_is_not_finite_adds_nothing(bad, units):
    """Not a failure, which would tell that the unit was drawn: zero is within every clip."""
    model, batch = toy(), sequences(4)
    attached = attach(model)
    groups = split_groups(attached, head_clip=0.5, adapter_clip=2.0, head_share=0.2)

    def total(chosen, factors):
        engine = DpSgd(attached, groups, sigma=1.0, noise=Noise())
        given = None if units is None else torch.tensor(units)[chosen]
        losses = toy_losses(model, rows(batch, chosen)) * torch.tensor(factors)
        engine.accumulate(losses, units=given, n_units=None if units is None else 3)
        return clean_sum(attached, engine)

    poisoned = total([0, 1, 2, 3], [1.0, bad, 1.0, 1.0])
    assert relative_error(poisoned, total([0, 2, 3], [1.0, 1.0, 1.0])) < 1e-6
    attached.norms_checked = False
    assert all(not s.any() for s in total([0, 1, 2, 3], [bad] * 4))


def test_a_gradient_beyond_the_squares_of_float32_is_clipped_like_any_other():
    head = nn.Linear(50, 3)
    attached, engine = engine_for(head)
    engine.accumulate(head(torch.full((2, 50), 1e30)).sum(1))
    norm = torch.cat([s.flatten() for s in clean_sum(attached, engine)]).double().norm()
    assert 1.9999 < float(norm) <= 2.0


def test_an_error_in_one_micro_batch_leaves_the_step_as_it_was():
    model = toy()
    attached, engine = engine_for(model)
    engine.accumulate(toy_losses(model, sequences(3)))
    before = [p.summed_grad.clone() for p in attached.parameters.values()]
    head = next(p for n, p in attached.parameters.items() if n.endswith("default.weight"))
    with pytest.raises(SelfCheckFailed, match="outside its layer"):
        engine.accumulate(toy_losses(model, sequences(3)) + head.square().sum())
    after = [p.summed_grad for p in attached.parameters.values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    released = engine.release()
    assert all(torch.isfinite(r).all() for r in released)


def structured(kind, size):
    """Gradients of one record whose numbers are no sample of anything: rows of a real head's kind."""
    generator = torch.Generator().manual_seed(size)
    if kind == "equal":
        return torch.full((1, size), 0.3)
    if kind == "one_large":
        return torch.cat([torch.full((1, 1), 4096.0), torch.full((1, size - 1), 0.7)], dim=1)
    outer = torch.randn(64, generator=generator)[:, None] * torch.full((size // 64,), 0.1)
    return outer.reshape(1, -1)


@pytest.mark.parametrize("kind", ["equal", "one_large", "outer"])
@pytest.mark.parametrize("scale", [1.0, 1e-18, 1e18])
def test_norms_of_structured_rows_are_right_to_far_less_than_the_margin(kind, scale):
    row = structured(kind, 64_000) * scale
    squares = math.fsum(float(x) ** 2 for x in row[0])
    assert float(row_norms(row)) == pytest.approx(math.sqrt(squares), rel=2.0**-30)


@pytest.mark.parametrize("classes", [77, 1000])
def test_a_head_of_many_classes_is_trained_and_never_passes_its_bound(classes):
    """An outer product of one constant with another: float32 lost 5e-5 of such a norm."""
    head = nn.Linear(768, classes)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    attached = attach(head)
    features, targets = torch.full((4, 768), 1.0), torch.arange(4)
    engine = DpSgd(attached, one_group(attached, 0.01), sigma=1.0, noise=Noise())
    for units in (None, torch.tensor([0, 0, 1, 1])):
        losses = F.cross_entropy(head(features), targets, reduction="none")
        engine.accumulate(losses, units=units, n_units=None if units is None else 2)
    for row in range(4):
        losses = F.cross_entropy(head(features[[row]]), targets[[row]], reduction="none")
        alone = DpSgd(attached, one_group(attached, 0.01), sigma=1.0, noise=Noise())
        alone.accumulate(losses)
        norm = torch.cat([s.flatten() for s in clean_sum(attached, alone)]).double().norm()
        assert 0.00999 < float(norm) <= 0.01


def test_a_group_of_many_large_adapters_never_passes_its_bound():
    """Rows of a LoRA group as of a large model: 24 matrices whose gradients are outer products."""
    layers = nn.ModuleList(nn.Linear(512, 96, bias=False) for _ in range(24))
    attached = attach(layers)
    for seed in range(3):
        x = torch.rand(2, 1, generator=torch.Generator().manual_seed(seed)).expand(2, 512) + 0.1
        engine = DpSgd(attached, one_group(attached, 1.0), sigma=1.0, noise=Noise())
        engine.accumulate(sum(layer(x).sum(1) for layer in layers))
        flat = torch.cat([s.flatten() for s in clean_sum(attached, engine)]).double()
        assert 1.9999 < float(flat.norm()) <= 2.0


def test_an_engine_gives_way_to_a_newer_one_for_the_same_model():
    model = toy()
    attached, old = engine_for(model)
    old.accumulate(toy_losses(model, sequences(3)))
    new = DpSgd(attached, one_group(attached), sigma=1.0, noise=Noise())
    for call in (old.release, lambda: old.accumulate(toy_losses(model, sequences(3)))):
        with pytest.raises(SelfCheckFailed, match="another engine"):
            call()
    assert all(p.summed_grad is None for p in attached.parameters.values())
    new.release()


def test_a_plain_sum_that_is_not_finite_is_not_released():
    model = toy()
    engine = PlainSgd(attach(model, private=False))
    engine.accumulate(toy_losses(model, sequences(3)) * math.nan)
    with pytest.raises(SelfCheckFailed, match="not finite"):
        engine.release()


@pytest.mark.parametrize("factor", [0.0, 0.9, 1.1, math.nan])
def test_noise_of_the_wrong_size_is_caught(factor):
    model = toy(Shape(width=120, rank=8))
    _, engine = engine_for(model, noise=Noise(factor=factor))
    engine.accumulate(toy_losses(model, sequences(3)))
    with pytest.raises(SelfCheckFailed, match="noise of the all"):
        engine.release()


def test_noise_that_is_not_finite_is_caught():
    model = toy()
    _, engine = engine_for(model, noise=Noise(factor=math.inf))
    with pytest.raises(SelfCheckFailed):
        engine.release()


def within(attached, engine, bound):
    """Whether the step's sum is that of units within the bound: here one unit."""
    flat = torch.cat([s.double().flatten() for s in clean_sum(attached, engine)])
    return 0.9 * bound < float(flat.norm()) <= bound


def test_a_unit_above_its_bound_is_clipped_again(monkeypatch):
    model = toy()
    attached, engine = engine_for(model)
    monkeypatch.setattr("silotune.privacy.engine._MARGIN", 1.5)
    engine.accumulate(toy_losses(model, sequences(1)) * 1e3)
    assert within(attached, engine, 1.0)


@pytest.mark.parametrize("units", [None, torch.tensor([0, 0, 0])])
def test_a_unit_whose_norm_was_measured_wrong_is_clipped_again(monkeypatch, units):
    model = toy()
    attached, engine = engine_for(model)
    plain = torch.linalg.vector_norm
    with monkeypatch.context() as broken:
        broken.setattr(torch.linalg, "vector_norm", lambda *a, **k: plain(*a, **k) * 0.5)
        chosen = sequences(3 if units is not None else 1)
        n_units = None if units is None else 1
        engine.accumulate(toy_losses(model, chosen) * 1e3, units=units, n_units=n_units)
    assert within(attached, engine, 1.0)


def test_later_batches_are_checked_at_their_largest_unit(monkeypatch):
    model = toy()
    attached, engine = engine_for(model)
    engine.accumulate(toy_losses(model, sequences(6)) * 1e3)
    engine.release()
    assert attached.norms_checked
    monkeypatch.setattr("silotune.privacy.engine._MARGIN", 1.5)
    units = torch.tensor([0, 0, 0, 0, 0, 0])
    engine.accumulate(toy_losses(model, sequences(6)) * 1e3, units=units, n_units=1)
    assert within(attached, engine, 1.0)


def test_a_parameter_used_past_its_layer_is_caught():
    model = toy()
    attached, engine = engine_for(model)
    head = next(p for n, p in attached.parameters.items() if n.endswith("default.weight"))
    with pytest.raises(SelfCheckFailed, match="outside its layer"):
        engine.accumulate(toy_losses(model, sequences(3)) + head.square().sum())


def test_a_parameter_that_gets_no_gradient_is_caught():
    model = toy()
    model.base_model.model.unused = nn.Linear(2, 2)
    _, engine = engine_for(model)
    with pytest.raises(SelfCheckFailed, match=r"unused\.weight"):
        engine.accumulate(toy_losses(model, sequences(3)))


def test_a_layer_that_does_not_see_the_batch_first_is_caught():
    head = nn.Linear(4, 2)
    _, engine = engine_for(head)
    tokens = torch.randn(3, 5, 4)
    with pytest.raises(SelfCheckFailed, match="not one a sequence"):
        engine.accumulate(head(tokens.view(15, 4)).view(3, -1).sum(1))


def test_hooked_gradients_that_do_not_add_up_are_caught(monkeypatch):
    model = toy()
    model.base_model.model.norm.requires_grad_(True)
    attached, engine = engine_for(model)
    weight = model.base_model.model.norm.weight
    weight.register_hook(lambda gradient: gradient * 2)
    with pytest.raises(SelfCheckFailed, match="do not add up"):
        engine.accumulate(toy_losses(model, sequences(3)))
    del attached


@pytest.mark.parametrize("count", [1, 2, 10, 500, 50_000])
def test_correct_noise_passes_the_check(count):
    generator = torch.Generator().manual_seed(count)
    for _ in range(300):
        # 300 x 5 draws, each failing with probability at most 1e-9.
        draw = torch.randn(count, generator=generator, dtype=torch.float64)
        assert noise_is_plausible(float(draw.square().sum()), count)


@pytest.mark.parametrize(("count", "std"), [(10, 1e-3), (9_000, 1.05), (55_000, 0.98), (1, 0.0)])
def test_the_noise_check_has_the_power_it_claims(count, std):
    assert not noise_is_plausible(count * std**2, count)


# --- misuse -----------------------------------------------------------------------------------


def test_groups_must_be_disjoint_known_and_share_one():
    attached, foreign = attach(toy()), nn.Parameter(torch.zeros(2))
    a, *rest = attached.parameters.values()
    wrong = {
        "no parameters": [],
        "two clip groups": [ClipGroup("x", (a,), 1, 0.5), ClipGroup("y", (a,), 1, 0.5)],
        "does not train": [ClipGroup("x", (foreign,), 1)],
        "out of range": [ClipGroup("x", (a,), 0.0)],
        "do not add up": [ClipGroup("x", (a,), 1, 0.5), ClipGroup("y", tuple(rest), 1, 0.4)],
    }
    for match, groups in wrong.items():
        with pytest.raises(ValueError, match=match):
            DpSgd(attached, groups, sigma=1.0, noise=Noise())


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.nan, math.inf])
def test_sigma_must_be_positive(sigma):
    with pytest.raises(ValueError, match="sigma"):
        engine_for(toy(), sigma=sigma)


def test_each_engine_wants_its_own_kind_of_attachment():
    with pytest.raises(ValueError, match="private=True"):
        twin = attach(toy(), private=False)
        DpSgd(twin, one_group(twin), sigma=1.0, noise=Noise())
    with pytest.raises(ValueError, match="private=False"):
        PlainSgd(attach(toy()))


@pytest.mark.parametrize(
    ("units", "n_units", "match"),
    [
        (torch.tensor([0, 1, 2]), 2, "range"),
        (torch.tensor([0, -1, 1]), 2, "range"),
        (torch.tensor([0, 1]), 2, "one a sequence"),
        (torch.tensor([0.0, 1.0, 0.0]), 2, "int64"),
        (torch.tensor([0, 1, 0]), None, "together"),
    ],
)
def test_units_must_fit_the_batch(units, n_units, match):
    model = toy()
    _, engine = engine_for(model)
    with pytest.raises(ValueError, match=match):
        engine.accumulate(toy_losses(model, sequences(3)), units=units, n_units=n_units)


def test_a_mean_loss_is_refused():
    model = toy()
    _, engine = engine_for(model)
    with pytest.raises(ValueError, match="one a record"):
        engine.accumulate(toy_losses(model, sequences(3)).mean())
