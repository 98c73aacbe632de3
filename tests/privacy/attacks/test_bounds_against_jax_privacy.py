"""Our bounds against those of jax-privacy, in an environment of its own: it is no dependency."""

import numpy as np
import pytest

from silotune.privacy.attacks.bounds import Guesses, epsilon_of, gaussian, gaussian_alone, steinke
from tests.own_environment import answered, python_in

PINNED = ("jax-privacy==2.0.0", "dp-accounting==0.6.0", "numpy==2.4.6", "scipy==1.17.1")
DELTA, ALPHA = 1e-5, 0.05
CASES = [
    {"mu": mu, "canaries": canaries, "threshold": threshold}
    for mu, canaries, threshold in [
        (0.5, 2000, 1.5),
        (1.0, 1000, 1.0),
        (1.66, 2000, 2.5),
        (3.0, 500, 2.0),
    ]
]

# The module alone: the package's own __init__ would want JAX, which audits nothing.
THEIRS = """
import importlib.util, json, sys
import numpy as np
root = importlib.util.find_spec("jax_privacy").submodule_search_locations[0]
spec = importlib.util.spec_from_file_location("auditing", f"{root}/auditing.py")
auditing = importlib.util.module_from_spec(spec)
sys.modules["auditing"] = auditing
spec.loader.exec_module(auditing)
delta, alpha = map(float, sys.argv[1:])
found = []
for case in json.load(sys.stdin):
    auditor = auditing.CanaryScoreAuditor(case["inside"], case["outside"])
    at = {"threshold_strategy": auditing.Explicit(case["threshold"])}
    found.append([
        auditor.epsilon_one_run(alpha, delta, **at),
        auditor.epsilon_one_run_fdp(alpha, delta, **at),
    ])
print(json.dumps(found))
"""


def scored(case, seed):
    rng = np.random.default_rng(seed)
    coins = rng.random(case["canaries"]) < 0.5
    return rng.normal(size=len(coins)) + case["mu"] * coins, coins


@pytest.fixture(scope="module")
def their_python(tmp_path_factory):
    folder = tmp_path_factory.mktemp("jax-privacy")
    return python_in(folder, ["--no-deps", PINNED[0]], ["absl-py", "attrs", *PINNED[1:]])


@pytest.mark.slow
def test_one_run_bounds_are_those_of_jax_privacy(their_python):
    given, ours = [], []
    for seed, case in enumerate(CASES):
        scores, coins = scored(case, seed)
        guessed = scores >= case["threshold"]
        found = Guesses(
            canaries=len(coins), guessed=int(guessed.sum()), right=int((guessed & coins).sum())
        )
        ours.append(
            [
                steinke(found, delta=DELTA, alpha=ALPHA),
                epsilon_of(gaussian(found, alpha=ALPHA), delta=DELTA),
            ]
        )
        sides = {"inside": scores[coins].tolist(), "outside": scores[~coins].tolist()}
        given.append({**sides, "threshold": case["threshold"]})
    theirs = answered(their_python, THEIRS, str(DELTA), str(ALPHA), given=given)
    assert all(row[1] > 0.5 for row in theirs)
    for own, other in zip(ours, theirs, strict=True):
        assert own == pytest.approx(other, rel=5e-3, abs=5e-3)


@pytest.mark.slow
def test_gaussian_rates_give_the_epsilon_of_jax_privacy(their_python):
    scores, coins = scored(CASES[2], 9)
    script = THEIRS.partition("delta, alpha")[0] + (
        "case = json.load(sys.stdin)\n"
        "auditor = auditing.CanaryScoreAuditor(case['inside'], case['outside'])\n"
        "print(auditor.epsilon_from_gdp(0.05, 1e-5))\n"
    )
    sides = {"inside": scores[coins].tolist(), "outside": scores[~coins].tolist()}
    theirs = answered(their_python, script, given=sides)
    # Theirs looks at all thresholds and pays for it (Bonferroni); ours at one, fixed beforehand.
    own = epsilon_of(gaussian_alone(scores, coins, threshold=0.83, alpha=ALPHA), delta=DELTA)
    assert theirs < own < 1.5 * theirs
