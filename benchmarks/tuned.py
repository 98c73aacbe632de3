"""The plan that the hospitals demo once had, tuned by hand on validation records (one seed).

What the rules of `silotune.plan.left_out` are measured against, and a plan that trains an adapter.
"""

from silotune.plan.plan import Plan

TUNED = {
    "model.head_features": None,
    "model.pooling": "mean",
    "model.centre_texts": [
        "disease", "disorder", "unspecified condition", "infection", "pain",
        "congenital malformation", "acute inflammation", "chronic illness", "neoplasm", "bleeding",
        "fracture", "pregnancy", "eye", "heart", "kidney", "skin", "nerve", "joint", "blood",
        "hormone",
    ],
    "model.feature_scale": 4.0,
    "lora.r": 2,
    "lora.alpha": 4.0,
    "lora.target_modules": ["query", "value"],
    "lora.last_layers": 1,
    "rounds.number": 130,
    "optimizer.site.head_rounds": 120,
    "optimizer.site.head_lr": 0.1,
    "optimizer.site.adapter_lr": 0.01,
    "privacy.clip": {"head": 2.0, "adapter": 2.0, "head_share": 0.5},
}  # fmt: skip
"""Keys of a plan of the hospitals."""


def tuned(demo: Plan) -> Plan:
    """The demo's plan with these numbers in the place of those by rule."""
    return demo.override(TUNED)
