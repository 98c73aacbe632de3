"""What the examples of docstrings and notebooks stand on: sites, a plan, two finished runs."""

from unittest.mock import patch

import pytest

from silotune.plan.plan import Plan
from silotune.plan.written import plan_toml
from silotune.simulation import run
from tests.federation import PRIVATE, write_federation
from tests.whole_run import in_this_process

LABELLED = [("cough", "no"), ("gout", "yes"), ("cut", "no"), ("asthma", "yes")]
SHORT = {"rounds.number": 3, "optimizer.site.head_rounds": 1}


def in_one_process():
    """Simulations of this process start no worker."""
    return patch.object(run, "WorkerGrid", in_this_process)


@pytest.fixture(scope="session")
def workspace(tmp_path_factory, bert_folder):
    """A folder with ``hospitals/``, ``notes.csv`` and two runs, under the names that examples use."""
    folder = tmp_path_factory.mktemp("workspace")
    made = write_federation(folder / "hospitals", bert_folder)
    plan = Plan.load(made.plan_path, {**PRIVATE, **SHORT})
    made.plan_path.write_text(plan_toml(plan))
    (folder / "notes.csv").write_text(
        "note,kind\n" + "".join(f"note {i},{'yes' if i % 2 else 'no'}\n" for i in range(20))
    )
    (folder / "labelled.csv").write_text(
        "text,label\n" + "".join(f"{w} of the left side,{x}\n" for w, x in LABELLED * 5)
    )
    for name, settings in (("small", {}), ("other", {"privacy.epsilon": 4.0})):
        with in_one_process():
            done = run.simulate(
                made.plan_path,
                runs=folder / "made",
                settings=run.Settings(workers=1),
                listener=lambda event: None,
                overrides=settings,
            )
        (folder / "runs").mkdir(exist_ok=True)
        done.root.rename(folder / "runs" / name)
    return folder
