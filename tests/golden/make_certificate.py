"""Wrote ``certificate.json``: a run with shared noise and metrics, signed by a key that is public.

Run once, by ``python -m tests.golden.make_certificate``. The file is a promise: every later release
reads it, and it is made anew only together with a new name of the format.
"""

import tempfile
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from dp_accounting import ComposedDpEvent

from silotune.plan.plan import Plan
from silotune.privacy.certificate import issue
from silotune.privacy.events import gaussian_event, shared_step_event
from silotune.privacy.ledger import Budget, Ledger, ReleaseKey
from tests.golden.material import DELTA, SECURE

PLAN = {**SECURE, "plan": {"name": "golden", "purpose": "test"}}


def main() -> None:
    plan = Plan.from_mapping(PLAN)
    step = shared_step_event(rate=0.05, sigma=0.9, steps=1, sharers=6, tolerated=4)
    everything = ComposedDpEvent([step, gaussian_event(10.0)])
    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger(Path(folder) / "ledger.sqlite")
        ledger.reserve("notes", "run", plan.sha256, everything, budget=Budget(100.0, DELTA))
        key = ReleaseKey("run", 1, "update")
        ledger.charge("notes", key, plan.sha256, everything, "00" * 32)
        issue(
            Path(__file__).parent / "certificate.json",
            ledger=ledger,
            dataset="notes",
            run="run",
            plan=plan,
            site="north",
            model_sha256="cd" * 32,
            secure_noise=True,
            key=Ed25519PrivateKey.from_private_bytes(bytes(range(32))),
        )


if __name__ == "__main__":
    main()
