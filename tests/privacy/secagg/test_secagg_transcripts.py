"""Whole rounds: against a slow reference, with dropouts in every phase, over restarts."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from silotune.privacy.errors import RoundUsed, SecureAggregationError, TooFewSurvivors
from silotune.privacy.secagg import graph
from silotune.privacy.secagg.graph import topology
from tests.privacy.secagg import slow_reference as slow
from tests.privacy.secagg.secagg_world import World, masked_round, ring_sum, vectors_for

PHASES = ("advertise", "share", "mask", "check", "open")
RINGS = {"uint32": 4, "uint16": 2}


@st.composite
def rounds(draw):
    n = draw(st.integers(3, 6))
    threshold = draw(st.integers(n // 2 + 1, n))
    names = [f"site-{i:04d}" for i in range(n)]
    # When each site drops out: mostly never, so that most rounds come to a sum.
    when = {name: draw(st.sampled_from([*PHASES, *["never"] * 12])) for name in names}
    ring = draw(st.sampled_from(sorted(RINGS)))
    return n, threshold, when, ring, draw(st.integers(0, 9))


def play(world, vectors, when):
    dropped, gone = {}, set()
    for phase in PHASES:
        gone |= {name for name, last in when.items() if last == phase}
        dropped[phase] = frozenset(gone)
    return world.run(
        vectors,
        advertise=dropped["advertise"],
        share=dropped["share"],
        mask=dropped["mask"],
        check=dropped["check"],
        open_=dropped["open"],
    )


def enough(world, when, threshold):
    """Whether the threshold is kept in every phase that takes place."""
    left = {
        phase: [n for n, last in when.items() if last not in PHASES[: i + 1]]
        for i, phase in enumerate(PHASES)
    }
    everybody = set(left["share"]) == set(left["mask"])
    needed = [left["share"], left["mask"], left["open"]] + ([] if everybody else [left["check"]])
    # In a round without a check, a site that "drops out in the check" drops out in the opening.
    small = not 2 * threshold > len(left["advertise"]) or threshold > len(left["advertise"])
    return not small and len(left["share"]) >= 3 and all(len(x) >= threshold for x in needed)


@settings(
    max_examples=200, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
@given(case=rounds())
def test_every_transcript_is_the_slow_references(case):
    n, threshold, when, ring, size = case
    world = World(n, threshold=threshold)
    vectors = vectors_for(world.names, size, ring=ring, seed=n)
    if not enough(world, when, threshold):
        with pytest.raises(SecureAggregationError):
            play(world, vectors, when)
        return
    total = play(world, vectors, when)
    coordinator, width = world.coordinator, RINGS[ring]
    survivors, present = sorted(coordinator.survivors), sorted(coordinator.present)
    assert total.tolist() == ring_sum(vectors, survivors).tolist()
    secrets = {name: world.sites[name]._state.secrets for name in present}
    publics = {name: slow.public(secrets[name].mask_key) for name in present}
    context = world.members[world.names[0]].context(1)
    for name in survivors:
        expected = slow.masked_vector(
            vectors[name],
            site=name,
            present=present,
            secrets=(secrets[name].seed, secrets[name].mask_key),
            publics=publics,
            context=context,
            width=width,
        )
        assert world.wire["masked"][name].tolist() == expected
    if size:
        found = slow.coordinator_sum(
            masked=world.wire["masked"],
            opened=world.wire["opened"],
            names=coordinator.cohort.names,
            present=present,
            publics=publics,
            context=context,
            threshold=threshold,
            width=width,
        )
        assert found == total.tolist()


def test_the_slow_ladder_is_rfc_7748s():
    # Section 5.2, first test vector.
    scalar = "a546e36bf0527c9d3b16154b82465edd62144c0ac1fc5a18506a2244ba449ac4"
    point = "e6db6867583030db3594c1a424b15f7c726624ec26b3353b10a903a6d0ab1c4c"
    shared = "c3da55379de9c6908e94ea4df28d084f32eccf03491c71f754b4075577a28552"
    assert slow.x25519(bytes.fromhex(scalar), bytes.fromhex(point)).hex() == shared


@pytest.mark.parametrize("phase", ["share", "mask", "open"])
@pytest.mark.parametrize("restarted", [True, False])
def test_the_sum_is_right_with_dropouts_up_to_the_threshold(phase, restarted):
    world = World(7, threshold=4)
    vectors = vectors_for(world.names, 300)
    gone = {"share": set(), "mask": set(), "open": set()}
    gone[phase] = set(world.names[1:4])
    world.advertise()
    world.share(gone["share"])
    if restarted:
        for name in world.names:
            world.restart(name)
    world.mask(vectors, gone["mask"])
    if restarted:
        for name in world.names:
            world.restart(name)
    world.check()
    world.open(gone["open"])
    survivors = sorted(set(world.names) - (gone["share"] | gone["mask"]))
    assert (world.coordinator.unmask() == ring_sum(vectors, survivors)).all()


@pytest.mark.parametrize("phase", ["share", "mask", "check", "open"])
def test_one_dropout_too_many_and_nothing_is_opened(phase):
    world = World(5, threshold=4)
    vectors = vectors_for(world.names, 10)
    drops = {"share": (), "mask": (), "check": (), "open_": ()}
    if phase == "check":
        drops["mask"] = world.names[:1]
    drops["open_" if phase == "open" else phase] = world.names[1:3]
    with pytest.raises(TooFewSurvivors):
        world.run(vectors, **drops)
    if phase != "open":
        assert not world.wire["opened"]


def test_inverse_masks_in_any_order_take_the_masks_off_again():
    from silotune.privacy.secagg.encoding import Mask, apply_masks

    plain = np.random.default_rng(0).integers(0, 2**32, 300_001, dtype=np.uint32)
    masked, masks = plain.copy(), [Mask(bytes([i]) * 32, i % 2 == 0) for i in range(3)]
    apply_masks(masked, masks)
    assert (masked != plain).mean() > 0.99
    apply_masks(masked, [mask.inverse() for mask in reversed(masks)])
    assert (masked == plain).all()


def test_a_repeated_request_gets_the_same_bytes():
    world = World(4, threshold=3)
    world.advertise()
    blob, name = world.coordinator.cohort.to_bytes(), world.names[0]
    first = world.sites[name].share(blob)
    world.restart(name)
    assert world.sites[name].share(blob) == first
    world = masked_round()
    name, survivors = world.names[0], world.names
    first = world.sites[name].open(survivors)
    world.restart(name)
    assert world.sites[name].open(survivors) == first


def test_an_update_is_masked_once_also_by_a_restarted_site():
    world = masked_round()
    name = world.names[0]
    world.restart(name)
    with pytest.raises(RoundUsed):
        world.sites[name].mask(
            np.zeros(8, np.uint32),
            present=world.names,
            sealed=world.coordinator.sealed_for(name),
        )


# --- sparse graphs --------------------------------------------------------------------------------


@pytest.fixture
def sparse(monkeypatch):
    """A small cohort on a sparse graph: the sizes that 1,000 sites would have are for the slow test."""
    # Nine circles: that a site has fewer than five neighbours has a probability below 1e-5.
    sizes = graph.Topology(sites=12, circles=9, shares=3, retained=3, quorum=8)
    for module in ("site", "coordinator"):
        monkeypatch.setattr(
            f"silotune.privacy.secagg.{module}.topology", lambda n, threshold=None: sizes
        )
    return sizes


@pytest.mark.parametrize("dropped", [(), (3,), (1, 7)])
def test_a_sparse_graph_gives_the_same_sum(sparse, dropped):
    world = World(12)
    vectors = vectors_for(world.names, 50)
    gone = [world.names[i] for i in dropped]
    total = world.run(vectors, mask=gone)
    survivors = [name for name in world.names if name not in gone]
    assert (total == ring_sum(vectors, survivors)).all()
    assert world.coordinator.agreement_needed  # on a sparse graph, always


def test_a_survivor_that_would_be_cut_off_is_not_opened(sparse, monkeypatch):
    world = World(12)
    world.advertise()
    world.share()
    name = world.names[0]
    near = world.coordinator._near(name)
    gone = sorted(near)[: len(near) - 2]
    # Two neighbours are left, one too few. The quorum is met even if the graph came out complete.
    sizes = graph.Topology(12, 9, shares=3, retained=3, quorum=3)
    monkeypatch.setattr("silotune.privacy.secagg.site.topology", lambda n, threshold=None: sizes)
    survivors = [n for n in world.names if n not in gone]
    for other in survivors:
        world.sites[other].mask(
            np.zeros(3, np.uint32),
            present=world.names,
            sealed=world.coordinator.sealed_for(other),
        )
    with pytest.raises(TooFewSurvivors, match="neighbours"):
        world.sites[survivors[-1]].sign(survivors)


def test_the_graph_is_symmetric_and_drawn_by_everybody_alike():
    near = graph.neighbours(60, circles=5, seed=b"s" * 32)
    assert near == graph.neighbours(60, circles=5, seed=b"s" * 32)
    assert near != graph.neighbours(60, circles=5, seed=b"t" * 32)
    assert all(i in near[j] for i, row in enumerate(near) for j in row)
    assert all(2 <= len(row) <= 10 and i not in row for i, row in enumerate(near))


@pytest.mark.parametrize("n", [3, 7, 100, 500])
def test_small_cohorts_are_complete_and_need_more_than_two_thirds(n):
    found = topology(n)
    assert found.complete
    assert found.shares == found.quorum == 2 * n // 3 + 1


def test_of_a_thousand_sites_each_has_a_fifth_as_neighbours_at_the_stated_levels():
    found = topology(1000)
    assert not found.complete
    degree = 2 * found.circles
    assert degree < 260
    # The chance that `shares` of a member's neighbours collude, exactly, by scipy's distribution.
    from scipy.stats import binom

    assert 1000 * binom.sf(found.shares - 1, degree, 200 / 999) < 2.0**-80
    assert found.retained > found.shares


def test_dropping_well_chosen_sites_does_not_cut_the_graph():
    """On Harary's circle k dropped sites isolate an arc; here no small group can be cut off.

    Greedy attack on a graph of the size of 1,000 sites: grow a group from every site by the neighbour
    that adds fewest new neighbours, and see whether dropping all its other neighbours is allowed.
    """
    sizes = topology(1000)
    near = [set(row) for row in graph.neighbours(1000, circles=sizes.circles, seed=b"g" * 32)]
    dropped = 1000 - sizes.quorum
    for start in range(0, 1000, 250):
        group, border = {start}, set(near[start])
        for _ in range(12):
            best = min(border, key=lambda v: len(near[v] - border - group))
            group.add(best)
            border = (border | near[best]) - group
            kept = sizes.retained - 1
            # Members of a group this small must be left with fewer neighbours than `retained`,
            # or the group's border is larger than what may drop out.
            assert len(border) > dropped or len(group) - 1 <= kept


@pytest.mark.slow
@pytest.mark.parametrize("n", [300, 1000])
def test_large_cohorts_come_to_the_right_sum(n):
    world = World(n)
    vectors = vectors_for(world.names, 20)
    gone = world.names[:: 15 if n == 1000 else 4]
    total = world.run(vectors, mask=gone)
    survivors = [name for name in world.names if name not in gone]
    assert (total == ring_sum(vectors, survivors)).all()
