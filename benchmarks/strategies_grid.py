"""What `strategies.py` trains: methods, settings, and the cases they make."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product

from silotune.plan.plan import Plan

HEAD_ROUNDS, ROUNDS = 12, 24
POISONED_SITES, POISON = 2, -10
POISONED = ", poisoned"
COMMON = {
    "rounds.number": ROUNDS,
    "rounds.min_sites": 7,
    "optimizer.site.head_rounds": HEAD_ROUNDS,
    "optimizer.site.head_lr": 0.1,
    "optimizer.site.adapter_lr": 0.02,
    "lora.last_layers": 1,
    "data.test_share": 0.2,
    "data.validation_share": 0.0,
    "rounds.evaluate_every": 0,
    "privacy.rate": 0.04,
}
WITHOUT_PRIVACY = {
    "privacy.mode": "none",
    "privacy.epsilon": None,
    "privacy.delta": None,
    "privacy.clip": None,
}
# Four times the steps, a quarter of their length.
LOCAL_ADAM = {
    "rounds.local_steps": 4,
    "optimizer.server.name": "none",
    "optimizer.site.head_lr": 0.05,
    "optimizer.site.adapter_lr": 0.005,
}
# Adam's step is about the learning rate whatever the gradient; SGD's is not.
LOCAL_SGD = {
    **LOCAL_ADAM,
    "optimizer.site.local": "sgd",
    "optimizer.site.head_lr": 1.0,
    "optimizer.site.adapter_lr": 0.1,
}
VOTE = {"aggregation.weights": "equal"}
LIARS = {**VOTE, "aggregation.byzantine": 2}

PROBE = {"optimizer.site.head_rounds": ROUNDS}
METHODS: dict[str, dict[str, object]] = {
    "probe": PROBE,
    **{
        name: {"aggregation.strategy": name}
        for name in ("fedavg", "ffa", "rolora", "fedsvd", "fedsa")
    },
}
WRAPPERS: dict[str, dict[str, object]] = {"fedavg + sgd": {"optimizer.server.name": "sgd"}}
ROBUST: dict[str, dict[str, object]] = {
    "median": {"aggregation.strategy": "median", **VOTE},
    "trimmed_mean": {"aggregation.strategy": "trimmed_mean", **VOTE, "aggregation.trim": 0.3},
    "multi_krum": {"aggregation.strategy": "multi_krum", **LIARS, "aggregation.selected": 5},
    "geometric_median": {"aggregation.strategy": "geometric_median", **VOTE},
    "norm_bound": {"aggregation.strategy": "norm_bound", "aggregation.bound": 0.1},
}
# Rules that compare sites see the most when these differ least: equal records, all of them a step.
ALIKE: dict[str, object] = {**PROBE, "privacy.rate": 1.0}
SEVERAL: dict[str, dict[str, object]] = {
    "flexlora": {"aggregation.strategy": "flexlora"},
    "fedavg + prox": {"optimizer.site.prox": 0.1},
    "fedavg (local sgd)": LOCAL_SGD,
    "probe (local sgd)": {**PROBE, **LOCAL_SGD},
    "scaffold": {**LOCAL_SGD, "aggregation.strategy": "scaffold"},
}


@dataclass(frozen=True)
class Case:
    """One training of the grid."""

    method: str
    epsilon: float | None
    steps: int
    split: str
    seed: int

    @property
    def records(self) -> str:
        """Folder of the sites."""
        return {"alike": "iid"}.get(self.clean, self.clean)

    @property
    def clean(self) -> str:
        """The split without its liars."""
        return self.split.removesuffix(POISONED)

    @property
    def liars(self) -> int:
        return POISONED_SITES if self.split.endswith(POISONED) else 0

    @property
    def key(self) -> str:
        return "|".join(str(value) for value in asdict(self).values())

    def plan(self, base: Plan) -> Plan:
        settings: dict[str, object] = {**COMMON, "plan.seed": self.seed}
        settings |= LOCAL_ADAM if self.steps > 1 else {}
        settings |= WITHOUT_PRIVACY if self.epsilon is None else {"privacy.epsilon": self.epsilon}
        settings |= {**METHODS, **WRAPPERS, **ROBUST, **SEVERAL}[self.method]
        settings |= ALIKE if self.clean == "alike" else {}
        return base.override(settings)


def grid(*, quick: bool) -> Iterator[Case]:
    """All cases, seeds in the outer loop."""
    if quick:
        for method in ("probe", "fedavg", "ffa", "fedsvd"):
            yield Case(method, 8.0, 1, "hospitals", 1)
        yield Case("flexlora", None, 4, "hospitals", 1)
        yield Case("median", None, 1, "hospitals" + POISONED, 1)
        return
    for seed in (1, 2, 3):
        for case in one_seed():
            yield replace(case, seed=seed)


def one_seed() -> Iterator[Case]:
    """What each seed is run on, what says most first."""
    for epsilon, method in product((8.0, None, 2.0), METHODS):
        yield Case(method, epsilon, 1, "hospitals", 0)
    for method in SEVERAL:
        yield Case(method, None, 4, "hospitals", 0)
    for epsilon, method in product((8.0, None, 2.0), METHODS):
        yield Case(method, epsilon, 4, "hospitals", 0)
    yield Case("fedavg", None, 1, "alike", 0)
    for split, method in product(("hospitals", "iid", "alike"), ROBUST):
        yield Case(method, None, 1, split, 0)
    for split, method in product(("hospitals", "iid", "alike"), ("fedavg", *ROBUST)):
        yield Case(method, None, 1, split + POISONED, 0)
    for epsilon, method in product((8.0, None), METHODS):
        yield Case(method, epsilon, 1, "iid", 0)
    for method in WRAPPERS:
        yield Case(method, 8.0, 1, "hospitals", 0)
        yield Case(method, None, 1, "hospitals", 0)
    for method in METHODS:
        yield Case(method, 2.0, 1, "iid", 0)
    for epsilon, method in product((8.0, 2.0), SEVERAL):
        yield Case(method, epsilon, 4, "hospitals", 0)
    for epsilon, method in product((8.0, None, 2.0), METHODS):
        yield Case(method, epsilon, 4, "iid", 0)
    for epsilon, method in product((8.0, None, 2.0), SEVERAL):
        yield Case(method, epsilon, 4, "iid", 0)
    for split, epsilon, method in product(("hospitals", "iid"), (8.0, 2.0), ROBUST):
        yield Case(method, epsilon, 1, split, 0)
