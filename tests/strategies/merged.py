"""Merged weights, sites and aggregate alike: what a model really computes with."""

import numpy as np

from silotune.models.layout import pairs


def factors(case, start, update):
    """One site's A and B after its round, float64; a frozen A is the same for all."""
    layout = case.layout()
    sent = layout.spans(type(case.fresh([])).sent(case.plan, 1))
    own = layout.unpack(start + layout.spread(sent, update))
    A = next((v for n, v in own.items() if ".lora_A." in n), FROZEN_A[: case.plan.lora.r])
    B = next(v for n, v in own.items() if ".lora_B." in n)
    return np.float64(A), np.float64(B)


FROZEN_A = np.random.default_rng(8).normal(size=(9, 9))


def whole(case, flat):
    """The frozen weight's total change at the coordinator: scale B A."""
    layout, scale = case.layout(), case.plan.lora.alpha / case.plan.lora.r
    found = list(pairs(layout, flat))
    if found:
        (pair,) = found
        return scale * np.float64(pair.B) @ np.float64(pair.A)
    B = next(v for n, v in layout.unpack(flat).items() if ".lora_B." in n)
    return scale * np.float64(B) @ FROZEN_A[: case.plan.lora.r]


def merged_weights(case, terms, updates, start):
    """The merged weight after aggregation, and the weighted mean of the sites' merged weights."""
    scale = case.plan.lora.alpha / case.plan.lora.r
    weights = [t.declared_units for t in terms]
    products = [scale * b @ a for a, b in (factors(case, start, u) for u in updates)]
    after = case.aggregate(terms, updates, adapter=start)
    return whole(case, after), np.average(products, axis=0, weights=weights)
