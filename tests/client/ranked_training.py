"""One site's rounds in two confined processes: `python -P ranked_training.py FOLDER MODEL`.

Each leaves what it computed in FOLDER; at last the second one dies in the middle of a round.
"""

import os
import sys
from pathlib import Path

from silotune.client.data_parallel import Ranks
from silotune.client.isolation.confinement import Confinement, confine

CLIP = 0.5


def encoded_units(model, plan, *, huge):
    """Twelve units of one to three records; with `huge` a thirteenth of 40, more than a micro-batch."""
    import numpy as np

    rng = np.random.default_rng(3)
    sizes = [*rng.integers(1, 4, size=12), *([40] if huge else [])]
    unit_of = np.repeat(np.arange(len(sizes)), sizes)
    words = ["gout", "asthma of the left side", "chronic kidney disease", "a cut"]
    examples = [
        {"text": f"{words[rng.integers(4)]} {row}", "label": ["no", "yes"][unit % 2]}
        for row, unit in enumerate(unit_of)
    ]
    return model.task.encode(examples, model.tokenizer, plan=plan), unit_of.astype(np.int64)


def trainer_of(ranks, case, base, *, huge=True, spoil=lambda encoded: encoded, sigma=0.3):
    import numpy as np

    from silotune.client.trainer import SiteData, TrainableModel, Trainer
    from silotune.models.base import load_model
    from tests.models.model_material import a_plan

    private = {
        "privacy.mode": "record", "privacy.epsilon": 8.0, "privacy.delta": 1e-4,
        "privacy.clip": {"head": CLIP, "adapter": CLIP}, "privacy.max_records_per_unit": 40,
        "privacy.unit": "patient",
    }  # fmt: skip
    steps = {
        "rounds.local_steps": 3, "optimizer.server.name": "none", "optimizer.site.local": "adam",
    }  # fmt: skip
    changes = {
        "model.labels": ["no", "yes"], "lora.last_layers": 2, "optimizer.site.head_rounds": 0,
        "privacy.max_physical_batch": 40, "privacy.rate": 0.999, "privacy.batch": None,
    }  # fmt: skip
    changes |= private if case != "plain" else {}
    changes |= steps if case == "steps" else {}
    plan = a_plan(base).override(changes)
    model = load_model(plan, device="cpu", attention="eager", dtype="float32")
    encoded, unit_of = encoded_units(model, plan, huge=huge)
    data = SiteData(
        site="s", encoded=spoil(encoded), unit_of=unit_of, train=np.arange(len(unit_of)),
        declared_units=10,
    )  # fmt: skip
    return Trainer(TrainableModel(plan, model), data, sigma=sigma, ranks=ranks)


def faulty(trainer, ranks, fault):
    """Have the second process fail in its part of the first step."""
    added, step = trainer._accumulate, []

    def accumulate(*arguments):
        if ranks.rank == 1 and not step:
            step.append(1)
            fault()
        added(*arguments)

    trainer._accumulate = accumulate


def rounds(ranks, case, base):
    """Two rounds of a case."""
    import numpy as np

    from silotune.models.layout import initial_adapter

    trainer = trainer_of(ranks, case, base)
    start = initial_adapter(trainer.layout, trainer._plan)
    return np.stack([trainer.round(start, number).flat for number in (1, 2)])


def influence(ranks, base):
    """What the unit of 40 records moves in a sum with hardly any noise."""
    from silotune.models.layout import initial_adapter

    sums = []
    for huge in (True, False):
        trainer = trainer_of(ranks, "sums", base, huge=huge, sigma=1e-3)
        sums.append(trainer.round(initial_adapter(trainer.layout, trainer._plan), 2).flat)
    return sums[0] - sums[1]


def failed(ranks, base, *, fault=None, spoil=None):
    """What a failure of the second process is in each, and whether the next round is done."""
    from silotune.models.layout import initial_adapter

    changed = {"spoil": spoil} if spoil and ranks.rank == 1 else {}
    trainer = trainer_of(ranks, "plain", base, **changed)
    if fault:
        faulty(trainer, ranks, fault)
    start, told = initial_adapter(trainer.layout, trainer._plan), []
    for number in (1, 2):
        try:
            trainer.round(start, number)
        except Exception as exc:
            told.append(f"{type(exc).__name__}: {exc}")
        else:
            told.append("done")
    return told


def fails():
    raise KeyError("of one process")


def work(ranks, folder, base):
    import dataclasses
    import json

    import numpy as np

    for case in ("sums", "steps", "plain"):
        np.save(folder / f"{case}-{ranks.rank}.npy", rounds(ranks, case, base))
    np.save(folder / f"influence-{ranks.rank}.npy", influence(ranks, base))
    told = {
        "fault": failed(ranks, base, fault=fails),
        "other records": failed(
            ranks, base, spoil=lambda e: dataclasses.replace(e, targets=1 - e.targets)
        ),
    }
    (folder / f"told-{ranks.rank}.json").write_text(json.dumps(told))
    failed(ranks, base, fault=lambda: os._exit(9))


def main():
    folder, model = Path(sys.argv[1]), Path(sys.argv[2])
    scratch, root, ranks = folder / "scratch", Path(__file__).parents[2], Ranks()
    scratch.mkdir()
    os.environ |= {"HOME": str(scratch), "TMPDIR": str(scratch)}
    import torch  # noqa: F401 - once for both; a trainer imports it afterwards, and could not be forked
    import transformers  # noqa: F401

    sys.path.append(str(root))
    import tests  # noqa: F401 - a confined process can't look it up: the repository is closed to it

    bound = Confinement(
        read=(model, root / "tests"), write=(scratch, folder), memory=4 * 10**9, loopback=True
    )
    found = confine(bound, share=lambda: ranks.fork(2, scratch=scratch))
    (folder / f"layers-{ranks.rank}").write_text(" ".join(p.name for p in found if p.in_force))
    work(ranks, folder, model)


if __name__ == "__main__":
    main()
