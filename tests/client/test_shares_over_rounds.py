"""Shares of correlated noise, from site to sum, under a coordinator that leaves sites out."""

import numpy as np
import pytest

from silotune.client.model_cache import ModelCache
from silotune.client.site_run import SiteRun
from silotune.client.terms import missing_noise
from silotune.errors import CalibrationImpossible, ReleaseConflict
from silotune.models.layout import initial_adapter
from silotune.privacy.noise import noise_for
from silotune.privacy.secagg.coordinator import CoordinatorRound
from silotune.privacy.secagg.encoding import units_per_step
from silotune.privacy.secagg.messages import unpack_named
from silotune.strategies.secure import encoding_for
from tests.client.test_secure import released, vector
from tests.federation import CHOICES, banded, underscored, write_federation

FOUR = ("alpha", "beta", "delta", "gamma")
COLUMN, ROUNDS = (1.0, 0.7, 0.4), 7
SHARED = {
    "aggregation.secure": True,
    "aggregation.cohort": 4,
    "aggregation.threshold": 3,
    "privacy.noise": "shared",
    "privacy.band_weights": list(COLUMN),
}
BANDED = underscored(banded(ROUNDS, **SHARED))


@pytest.fixture(scope="module")
def federation(tmp_path_factory, bert_folder):
    return write_federation(tmp_path_factory.mktemp("shares"), bert_folder, names=FOUR, **BANDED)


class Rounds:
    """Four sites with disks, and a coordinator that has them do as it likes."""

    def __init__(self, federation, name):
        self.federation, self.folder = federation, federation.folder / name
        self.plan, self.models = federation.plan, ModelCache(CHOICES)
        bare = federation.runs(self.plan, state=name)
        self.roster = {p.site.name: p._keys.signing.public_key().public_bytes_raw() for p in bare}
        self.sums = {}
        self.parts = {name: self.started(name) for name in FOUR}
        for part in self.parts.values():
            part.join()
        self.layout = self.parts["alpha"].layout
        self.adapter = initial_adapter(self.layout, self.plan)
        self.encoding = encoding_for(self.plan, layout=self.layout, server_round=1)
        self.step = self.encoding.step(self.encoding.spans[0])

    def started(self, name):
        """A fresh process of a site, on the disk of the last one."""
        (site,) = [s for s in self.federation.sites if s.name == name]
        part = SiteRun(
            site, state=self.folder / name, plan=self.plan, run="r", models=self.models,
            roster=self.roster,
        )  # fmt: skip
        trained = part.training.round

        def spied(adapter, number, **more):
            found = trained(adapter, number, **more)
            self.sums[name, number] = found.flat.copy()
            return found

        part.training.round = spied
        return part

    def masked(self, number, names, *, twice=False):
        """The sites' masked updates of a round, as far as the coordinator's part goes."""
        coordinator = CoordinatorRound(threshold=3, largest_cohort=4)
        for name in names:
            coordinator.advertise(name, released(self.parts[name].secure.keys(number), "keys"))
        blob = coordinator.cohort.to_bytes()
        for name in names:
            shares = released(self.parts[name].secure.share(number, blob), "shares")
            coordinator.add_shares(name, unpack_named(shares))
        replies = {}
        for name in names:
            asked = {"present": sorted(names), "sealed": coordinator.sealed_for(name)}
            replies[name] = self.parts[name].train_masked(self.adapter, number, **asked)
            if twice:
                self.parts[name] = self.started(name)
                again = self.parts[name].train_masked(self.adapter, number, **asked)
                assert vector(again).tobytes() == vector(replies[name]).tobytes()
        return coordinator, replies

    def opened(self, number, names, *, without=(), twice=False):
        """The sum of a round, in steps of the ring; `without` sites that sent all the same."""
        coordinator, replies = self.masked(number, names, twice=twice)
        alive = sorted(set(names) - set(without))
        for name in alive:
            sent = vector(replies[name])
            coordinator.add_masked(name, sent, like=sent)
        if coordinator.agreement_needed:
            for name in alive:
                signed = released(self.parts[name].secure.check(number, alive), "signature")
                coordinator.add_signature(name, signed)
        for name in alive:
            reply = self.parts[name].secure.opened(
                number, survivors=alive, signatures=coordinator.signatures, next_cohort=b""
            )
            coordinator.add_opening(name, unpack_named(released(reply, "opened")))
        return coordinator.unmask().view(np.int32)[:-1].astype(np.float64)

    def rows(self, name, numbers):
        """What the theory says of a site's noise in rounds that it sent, in steps of the ring."""
        missing = missing_noise(self.plan, ["head"], sigma=self.parts[name].sigma)
        units = units_per_step(missing["head"] / self.step)
        found = {}
        for number in numbers:
            noise, fresh = noise_for(self.plan.plan.seed, "ring", name, number), []
            for span in self.encoding.spans:
                fresh += [draws.copy() for _, draws in noise.draws(span.size)]
                list(noise.draws(span.size))  # what the site rounds with
            found[number] = np.concatenate(fresh) / units - sum(
                weight * found[number - ago]
                for ago, weight in enumerate(COLUMN)
                if ago and number - ago in found
            )
        return found


HISTORY = {
    # round: who masks, who is left out of the sum although it sent, who is restarted and asked again
    1: (FOUR, (), False),
    2: (FOUR, ("gamma",), True),
    3: (("alpha", "beta", "delta"), (), False),
    4: (FOUR, (), True),
    5: (("beta", "delta", "gamma"), (), False),
    7: (FOUR, ("alpha",), False),
}


def test_every_sum_has_what_its_sites_rows_say_whoever_was_left_out_or_restarted(federation):
    """Rows are counted by the run's rounds; one that nobody opened is taken back like the others."""
    played = Rounds(federation, "history")
    found = {}
    for number, (names, without, twice) in HISTORY.items():
        found[number] = played.opened(number, names, without=without, twice=twice)
    rows = {
        name: played.rows(name, [n for n, (names, *_) in HISTORY.items() if name in names])
        for name in FOUR
    }
    for number, (names, without, _) in HISTORY.items():
        alive = set(names) - set(without)
        wanted = sum(rows[name][number] + played.sums[name, number] / played.step for name in alive)
        # Six steps a site to round with, of which no later round knows; false alarms below 1e-9.
        assert np.abs(found[number] - wanted).max() < 7 * 6 * np.sqrt(len(alive))
        assert min(rows[name][number].std() for name in alive) > 100 * 6
    for part in played.parts.values():
        body = part.finish()
        (mechanism,) = body.mechanisms
        assert mechanism.times == 3  # a block of three rounds is charged once
        assert 7.9 < body.epsilon <= 8.0


def test_a_site_whose_row_is_gone_sends_nothing_more(federation):
    played = Rounds(federation, "gone")
    played.opened(1, FOUR)
    for path in (played.folder / "alpha" / "memory").iterdir():
        path.unlink()
    with pytest.raises(ReleaseConflict):
        played.masked(2, FOUR)


def test_noise_that_the_ring_has_no_room_for_in_any_round_is_refused_before_the_first(federation):
    plan = federation.plan.override(
        {"aggregation.encoding": "uint16", "privacy.band_weights": [1.0, -1.5, 0.0]}
    )
    federation = type(federation)(federation.folder, plan, federation.plan_path)
    with pytest.raises(CalibrationImpossible):
        Rounds(federation, "coarse")
