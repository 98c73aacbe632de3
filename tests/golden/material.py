"""Keys, names and plans that the golden files were made with. The keys are public, for tests alone."""

import base64

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from silotune.models.layout import ArrayEntry, Layout
from silotune.plan.plan import Plan
from silotune.privacy.ledger import ReleaseKey
from silotune.protocol.envelope import MessagePlace

FEDERATION, SITE, RUN, DATASET = "golden", "alpha", "golden-0001", "notes"
DELTA = 1e-5
FEDERATION_KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
SITE_KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33)))
PASSPHRASE = "not a secret: golden files"
UPDATE = ReleaseKey(RUN, 1, "update")
ADDRESS = MessagePlace(
    federation=FEDERATION, run=RUN, round=3, kind="train", sender="coordinator", receiver=SITE
)
SCHEMAS = ("0001", "0002", "0003", "0004", "0005", "0006")
MEMBERS = ("alpha", "beta", "gamma")

LAYOUT = Layout(
    (
        ArrayEntry("base_model.model.layer.0.lora_A.weight", (2, 6), "adapter"),
        ArrayEntry("base_model.model.layer.0.lora_B.weight", (6, 2), "adapter"),
        ArrayEntry("head.weight", (2, 6), "head"),
        ArrayEntry("head.bias", (2,), "head"),
    )
)

SECURE = {
    "plan": {"name": "golden", "purpose": "test", "seed": 7},
    "model": {"base": "x", "task": "text_classification", "labels": ["a", "b"]},
    "data": {"dataset": DATASET},
    "rounds": {"number": 3, "min_sites": 3},
    "privacy": {
        "mode": "record",
        "unit": "patient",
        "max_records_per_unit": 4,
        "epsilon": 8.0,
        "delta": DELTA,
        "clip": {"head": 0.5, "adapter": 2.0},
        "rate": 0.05,
        "noise": "shared",
    },
    "aggregation": {"secure": True, "cohort": 7, "threshold": 6},
}
BARE = {**SECURE, "privacy": {"mode": "none", "rate": 0.1}, "aggregation": {}}
STEPS = {
    **BARE,
    "rounds": {"number": 4, "min_sites": 3, "local_steps": 3},
    "optimizer": {"server": {"name": "none"}, "site": {"local": "sgd"}},
}


def plan_of(raw, **aggregation):
    return Plan.from_mapping({**raw, "aggregation": {**raw["aggregation"], **aggregation}})


def scaffold_plan():
    return plan_of(STEPS, strategy="scaffold", weights="equal")


def banded_plan():
    return Plan.from_mapping(
        {
            **BARE,
            "lora": {"target_modules": "none"},
            "rounds": {"number": 6, "min_sites": 3},
            "optimizer": {"server": {"name": "sgd"}},
            "privacy": {
                **{k: v for k, v in SECURE["privacy"].items() if k != "noise"},
                "bands": 3,
                "band_weights": [1.0, 0.5],
            },
        }
    )


def personal_plan():
    return plan_of(BARE, strategy="fedsa")


def vector(number, size=LAYOUT.size):
    """An adapter or update: exact in binary, and another one for each number."""
    return ((np.arange(size) % 7 - 3) * 0.125 + number).astype(np.float32)


def text(raw):
    return base64.b64encode(raw).decode()
