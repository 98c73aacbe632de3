"""Which device, which type of matrix product, which attention: chosen once a run, then fixed.

What is fastest depends on the machine, so the driver of a simulation has it measured, for a fraction
of a second, writes it down with the run and hands it to every process. Whoever loads a model without
being told, as a site of a federation does, goes by a fixed rule instead, which sees only what kind of
machine it is: a stop-watch could come to another result in each process. A plan with a seed is never
measured: it must give the same adapter tomorrow.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import linear
from transformers import MODEL_MAPPING, AutoModel

from silotune.errors import EnvironmentFault
from silotune.models.pretrained import fixed_rng, load_config, locate, quiet, width_of
from silotune.plan.plan import Plan

_BF16_GAIN = 1.3  # bf16 products cost accuracy, so they must be worth it
_REPEATS = 3  # of which the first only warms up
_BATCH, _SHORTEST, _LONGEST = 64, 16, 64  # texts, tokens: what a step typically looks like
_WORK = 2e9  # multiplications of weights a forward pass may cost: about 0.05 s on a core


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What to compute with; plain strings, so that it travels to worker processes as JSON.

    Attributes
    ----------
    device : str
        ``cpu`` or ``cuda:N``.
    dtype : str
        Type of the matrix products with frozen weights, ``float32`` or ``bfloat16``. Weights,
        gradients and noise are float32 always.
    attention : str
        Transformers' name of the implementation, ``eager`` or ``sdpa``.
    reason : str
        Why, in words.
    """

    device: str
    dtype: str
    attention: str
    reason: str = ""

    def __str__(self) -> str:
        why = f" ({self.reason})" if self.reason else ""
        return f"{self.device}, {self.dtype}, {self.attention} attention{why}"


def choose(
    plan: Plan, *, device: str = "auto", base: str | None = None, measure: bool = True
) -> Choices:
    """Choose for a plan on this machine; on a CPU for one thread, as workers have.

    Parameters
    ----------
    plan : Plan
        Gives model, ``model.dtype``, ``data.max_length`` and whether there is a seed.
    device : str
        ``auto`` (the first CUDA device, else the CPU), ``cpu``, ``cuda`` or ``cuda:N``.
    base : str, optional
        Where the base model is on this machine, if not where ``model.base`` says.
    measure : bool
        Whether to measure where the plan has no seed, once for a run; else the fixed rule decides.

    Raises
    ------
    EnvironmentFault
        The device is not there.
    ModelNotFound, ModelError
        The base model is not there or not usable.
    """
    place, config = resolve_device(device), load_config(locate(base or plan.model.base))
    measure = measure and plan.plan.seed is None
    with _one_thread(place):
        dtype, dtype_reason = _choose_dtype(plan, config, place, measure=measure)
        attention, attention_reason = _choose_attention(plan, config, place, measure=measure)
    reasons = [reason for reason in (dtype_reason, attention_reason) if reason]
    return Choices(device=str(place), dtype=dtype, attention=attention, reason="; ".join(reasons))


def resolve_device(device: str) -> torch.device:
    """The torch device that a name means here. Raises `EnvironmentFault`."""
    if device == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError as exc:
        raise EnvironmentFault(
            f"{device!r} is no device", remedy="Use auto, cpu, cuda or cuda:N."
        ) from exc
    if place.type == "cpu":
        return place
    count = torch.cuda.device_count() if place.type == "cuda" else 0
    if (place.index or 0) >= count:
        raise EnvironmentFault(
            f"{device} is not on this machine, which has {count} CUDA devices",
            remedy="Use auto or cpu.",
        )
    return torch.device("cuda", place.index or 0)


def _choose_dtype(
    plan: Plan, config: Any, place: torch.device, *, measure: bool
) -> tuple[str, str]:
    if plan.model.dtype != "auto":
        return plan.model.dtype, ""
    if place.type == "cuda":
        return ("bfloat16" if torch.cuda.is_bf16_supported() else "float32"), ""
    if not measure:
        return ("bfloat16" if _has_amx() else "float32"), ""
    seconds = _time_products(min(width_of(config) or 1024, 1024))
    gain = seconds["float32"] / seconds["bfloat16"]
    measured = f"bfloat16 products measured {gain:.2f}x as fast"
    return ("bfloat16" if gain >= _BF16_GAIN else "float32"), measured


def _choose_attention(
    plan: Plan, config: Any, place: torch.device, *, measure: bool
) -> tuple[str, str]:
    kind = MODEL_MAPPING.get(type(config), None)
    if not getattr(kind, "_supports_sdpa", False):
        return "eager", "the model has no other attention"
    tokens = min(max(plan.data.max_length // 4, _SHORTEST), _LONGEST)
    # Eager keeps all tokens x tokens weights: fast while they fit a cache, costly beyond.
    rule = "eager" if place.type == "cpu" and tokens < _LONGEST else "sdpa"
    if not measure:
        return rule, "attention by a fixed rule"
    try:
        seconds = _time_attention(config, place, tokens=tokens)
    except Exception:  # one layer alone can't be built, which says nothing of the whole model
        return rule, "attention by a fixed rule, for it could not be measured"
    best, other = sorted(seconds, key=lambda name: seconds[name])
    return (
        best,
        f"{best} attention measured {seconds[other] / seconds[best]:.2f}x as fast as {other}",
    )


def _has_amx() -> bool:
    """Whether this CPU multiplies bf16 matrices in hardware tiles; AVX-512 alone is no gain."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16", False))


def _time_products(width: int) -> dict[str, float]:
    """Seconds of a feed-forward product on 1,024 tokens, conversions included, by type."""
    x, w = torch.full((1024, width), 0.5), torch.full((4 * width, width), 0.5)
    half = w.to(torch.bfloat16)
    return _time(
        {
            "float32": lambda: linear(x, w),
            "bfloat16": lambda: linear(x.to(torch.bfloat16), half).float(),
        },
        torch.device("cpu"),
    )


def _time_attention(config: Any, place: torch.device, *, tokens: int) -> dict[str, float]:
    """Seconds of forward and backward through one layer of the model's shape, by attention."""
    small = _one_layer(config)
    with fixed_rng(), quiet():
        models = {
            name: AutoModel.from_config(
                copy.deepcopy(small), attn_implementation=name, dtype=torch.float32
            )
            .requires_grad_(False)
            .to(place)
            for name in ("eager", "sdpa")
        }
    weights = sum(p.numel() for p in models["eager"].parameters())
    batch = int(min(_BATCH, max(4, _WORK // (weights * tokens))))
    ids = torch.ones(batch, tokens, dtype=torch.int64, device=place)
    mask = ids.clone()
    mask[::4, -2:] = 0  # some padding, as batches of like length have

    def step(model: Any) -> Callable[[], object]:
        model.enable_input_require_grads()
        return lambda: model(input_ids=ids, attention_mask=mask)[0].sum().backward()

    return _time({name: step(model) for name, model in models.items()}, place)


def _one_layer(config: Any) -> Any:
    """The configuration with one layer and hardly any vocabulary: quick to build and to run."""
    small = copy.deepcopy(config)
    for part in {id(c): c for c in (small, small.get_text_config())}.values():
        part.num_hidden_layers = 1
        part.vocab_size = 8
        if getattr(part, "pad_token_id", None) is not None:
            part.pad_token_id = 0
        if getattr(part, "layer_types", None):
            part.layer_types = part.layer_types[:1]
    return small


def _time(work: Mapping[str, Callable[[], object]], place: torch.device) -> dict[str, float]:
    """Shortest time of each piece of work, the pieces taking turns."""
    best = dict.fromkeys(work, float("inf"))
    for turn in range(_REPEATS):
        for name, run in work.items():
            started = time.perf_counter()
            run()
            if place.type == "cuda":
                torch.cuda.synchronize(place)
            if turn:
                best[name] = min(best[name], time.perf_counter() - started)
    return best


@contextmanager
def _one_thread(place: torch.device) -> Iterator[None]:
    """Measure as a worker runs: on one thread."""
    threads = torch.get_num_threads()
    if place.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
