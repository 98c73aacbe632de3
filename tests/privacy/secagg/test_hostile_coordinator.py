"""Every refusal of a site, from a coordinator that tries it; each has its code."""

from dataclasses import replace

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from silotune.privacy.errors import (
    CohortTooSmall,
    KeyReused,
    MessageMalformed,
    RoundUsed,
    SecureAggregationError,
    ShareInvalid,
    SignerUnknown,
    SurvivorsInvalid,
    TooFewSurvivors,
    TranscriptMismatch,
)
from silotune.privacy.secagg.keys import Interpolation, split
from silotune.privacy.secagg.messages import (
    Advertisement,
    Cohort,
    pack,
    pack_named,
    signed,
    unpack,
    unpack_named,
    unpack_names,
)
from silotune.privacy.secagg.site import SiteRound
from tests.privacy.secagg.secagg_world import World, masked_round, members, vectors_for


@pytest.fixture
def advertised():
    """A world with its cohort, and the site that is lied to."""
    world = World(4, threshold=3)
    world.advertise()
    return world, world.sites[world.names[0]]


def cohort_of(world, **changes):
    """The cohort's bytes with some members' advertisements replaced."""
    known = {m.site: m for m in world.coordinator.cohort.members} | changes
    return Cohort(tuple(known[name] for name in sorted(known))).to_bytes()


def ad(member, number=1):
    return SiteRound.begin(member, number).advertisement()


# --- keys ------------------------------------------------------------------------------------------


def test_a_member_that_is_not_enrolled_is_refused(advertised):
    world, site = advertised
    invented = ad(replace(world.members[world.names[1]], site="site-9999"))
    with pytest.raises(SignerUnknown, match="enrolled"):
        site.share(cohort_of(world, **{"site-9999": invented}))


def test_a_member_whose_keys_the_coordinator_made_is_refused(advertised):
    world, site = advertised
    other = world.names[1]
    forged = ad(replace(world.members[other], identity=Ed25519PrivateKey.generate()))
    with pytest.raises(SignerUnknown, match="not signed by site-0001"):
        site.share(cohort_of(world, **{other: forged}))


@pytest.mark.parametrize("changes", [{"run": "other"}, {"plan_sha256": "cd" * 32}])
def test_keys_of_another_plan_or_run_are_refused(advertised, changes):
    world, site = advertised
    other = world.names[1]
    with pytest.raises(SignerUnknown, match="another plan, run or round"):
        site.share(cohort_of(world, **{other: ad(replace(world.members[other], **changes))}))


def test_keys_of_an_earlier_round_are_refused(advertised):
    world, site = advertised
    other = world.names[1]
    with pytest.raises(SignerUnknown, match="another plan, run or round"):
        site.share(cohort_of(world, **{other: ad(world.members[other], number=2)}))


def test_two_members_with_one_key_are_refused(advertised):
    world, site = advertised
    one, other = world.coordinator.cohort[world.names[1]], world.names[2]
    copied = signed(
        replace(world.coordinator.cohort[other], mask_public=one.mask_public),
        world.members[other].identity,
    )
    with pytest.raises(KeyReused):
        site.share(cohort_of(world, **{other: copied}))


def test_a_key_of_the_round_before_is_refused(advertised):
    world, site = advertised
    seen = frozenset({world.coordinator.cohort[world.names[1]].share_public})
    with pytest.raises(KeyReused):
        site.share(world.coordinator.cohort.to_bytes(), seen=seen)


def test_other_keys_for_the_site_itself_are_refused(advertised):
    world, site = advertised
    own = world.names[0]
    with pytest.raises(TranscriptMismatch):
        site.share(cohort_of(world, **{own: ad(world.members[own])}))


def test_a_cohort_without_the_site_is_refused(advertised):
    world, site = advertised
    others = world.coordinator.cohort.members[1:]
    with pytest.raises(TranscriptMismatch):
        site.share(Cohort(others).to_bytes())


def test_a_key_of_low_order_is_refused(advertised):
    world, site = advertised
    other = world.names[1]
    weak = signed(
        replace(world.coordinator.cohort[other], share_public=bytes(32)),
        world.members[other].identity,
    )
    with pytest.raises(MessageMalformed, match="agreed"):
        site.share(cohort_of(world, **{other: weak}))


# --- cohorts ---------------------------------------------------------------------------------------


def test_a_cohort_below_the_sites_minimum_is_refused():
    world = World(4, threshold=3, smallest_cohort=5)
    world.advertise()
    with pytest.raises(CohortTooSmall, match="minimum is 5"):
        world.share()


def test_a_cohort_above_the_plans_is_refused():
    world = World(4, threshold=3, largest_cohort=3)
    world.advertise()
    with pytest.raises(CohortTooSmall):
        world.share()


def test_a_threshold_of_half_the_cohort_is_refused():
    world = World(4, threshold=2)
    world.advertise()
    with pytest.raises(CohortTooSmall, match="more than half"):
        world.sites[world.names[0]].share(world.coordinator.cohort.to_bytes())


def test_a_second_cohort_in_a_round_is_refused(advertised):
    world, site = advertised
    site.share(world.coordinator.cohort.to_bytes())
    smaller = Cohort(world.coordinator.cohort.members[:3]).to_bytes()
    with pytest.raises(RoundUsed):
        site.share(smaller)


def test_a_site_that_shared_in_a_shrunken_cohort_is_found_out():
    """Different cohorts to different sites: their sealed shares do not open."""
    world = World(5, threshold=3)
    world.advertise()
    whole = world.coordinator.cohort
    fewer = Cohort(whole.members[:4]).to_bytes()
    one, other = world.names[0], world.names[1]
    world.sites[one].share(whole.to_bytes())
    lied_to = world.sites[other].share(fewer)
    present = world.names
    sealed = {n: world.sites[n].share(whole.to_bytes())[one] for n in world.names[2:]}
    with pytest.raises(TranscriptMismatch, match="site-0001"):
        world.sites[one].mask(
            np.zeros(4, np.uint32), present=present, sealed={**sealed, other: lied_to[one]}
        )


# --- masking ---------------------------------------------------------------------------------------


@pytest.fixture
def shared():
    world = World(4, threshold=3)
    world.advertise()
    world.share()
    return world, world.sites[world.names[0]], world.coordinator.sealed_for(world.names[0])


def vector():
    return np.arange(5, dtype=np.uint32)


def test_sealed_shares_of_the_wrong_site_do_not_open(shared):
    world, site, sealed = shared
    one, other = world.names[1], world.names[2]
    with pytest.raises(TranscriptMismatch):
        site.mask(
            vector(),
            present=world.names,
            sealed={**sealed, one: sealed[other], other: sealed[one]},
        )


def test_a_changed_bit_of_a_sealed_share_is_noticed(shared):
    world, site, sealed = shared
    one = world.names[1]
    broken = sealed[one][:-1] + bytes([sealed[one][-1] ^ 1])
    with pytest.raises(TranscriptMismatch):
        site.mask(vector(), present=world.names, sealed={**sealed, one: broken})


@pytest.mark.parametrize(
    ("present", "error"),
    [
        (["site-0000", "site-0001"], CohortTooSmall),
        (["site-0001", "site-0002", "site-0003"], SurvivorsInvalid),
        (["site-0000", "site-0001", "site-0001", "site-0002"], SurvivorsInvalid),
        (["site-0000", "site-0001", "site-0002", "site-0009"], SurvivorsInvalid),
        (["site-0000", "site-0001", "site-0002"], MessageMalformed),
    ],
)
def test_a_wrong_list_of_those_who_shared_is_refused(shared, present, error):
    world, site, sealed = shared
    before = vector()
    with pytest.raises(error):
        site.mask(before, present=present, sealed=sealed)
    assert (before == vector()).all()
    site.mask(before, present=world.names, sealed=sealed)  # the refusal left the round usable


def test_a_second_masked_update_is_refused(shared):
    world, site, sealed = shared
    site.mask(vector(), present=world.names, sealed=sealed)
    with pytest.raises(RoundUsed):
        site.mask(vector(), present=world.names[:3], sealed=sealed)
    with pytest.raises(RoundUsed):
        site.mask(vector(), present=world.names, sealed=sealed)


def test_nothing_is_masked_or_opened_out_of_turn(advertised):
    world, site = advertised
    with pytest.raises(RoundUsed):
        site.mask(vector(), present=world.names, sealed={})
    with pytest.raises(RoundUsed):
        site.sign(world.names)
    with pytest.raises(RoundUsed):
        site.open(world.names)


# --- survivors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("survivors", "error"),
    [
        (["site-0000", "site-0001"], TooFewSurvivors),
        (["site-0001", "site-0002", "site-0003"], SurvivorsInvalid),
        (["site-0000", "site-0001", "site-0002", "site-0009"], SurvivorsInvalid),
        (["site-0000", "site-0000", "site-0001", "site-0002"], SurvivorsInvalid),
    ],
)
def test_an_impossible_survivor_set_is_neither_signed_nor_opened(survivors, error):
    world = masked_round(4)
    site = world.sites[world.names[0]]
    with pytest.raises(error):
        site.sign(survivors)
    with pytest.raises(error):
        site.open(survivors)


def test_the_sites_own_floor_outranks_the_plans_threshold():
    world = masked_round(5, threshold=3, smallest_sum=5)
    survivors = world.names[:4]
    with pytest.raises(TooFewSurvivors, match="threshold here is 5"):
        world.sites[world.names[0]].sign(survivors)


def test_only_one_survivor_set_a_round_is_signed_or_opened():
    world = masked_round(5)
    all_of_them, fewer = world.names, world.names[:4]
    opened, signed_one = world.sites[world.names[0]], world.sites[world.names[1]]
    opened.open(all_of_them)
    with pytest.raises(RoundUsed):
        opened.sign(fewer)
    signed_one.sign(fewer)
    with pytest.raises(RoundUsed):
        signed_one.open(all_of_them)
    with pytest.raises(RoundUsed):
        signed_one.sign(world.names[:3])
    for site in (opened, signed_one):  # a restart does not make a site forget
        again = SiteRound.restore(site._member, site.dump())
        with pytest.raises(RoundUsed):
            again.sign(world.names[:3])


def test_fewer_survivors_are_opened_only_with_enough_signatures():
    world = masked_round(5)
    survivors = world.names[:4]
    signatures = {name: world.sites[name].sign(survivors) for name in survivors}
    site = world.sites[world.names[0]]
    with pytest.raises(TooFewSurvivors, match="agreed"):
        site.open(survivors)
    with pytest.raises(TooFewSurvivors, match="agreed"):
        site.open(survivors, dict(list(signatures.items())[:2]))
    outsider = {**signatures, world.names[4]: world.sites[world.names[4]].sign(world.names)}
    with pytest.raises(SurvivorsInvalid):
        site.open(survivors, outsider)
    assert site.open(survivors, signatures)


def test_a_signature_on_other_survivors_stops_the_opening():
    """The coordinator tells two halves different survivors."""
    world = masked_round(5)
    told, others = world.names[:4], [*world.names[:3], world.names[4]]
    signatures = {name: world.sites[name].sign(told) for name in told[1:]}
    signatures[world.names[0]] = world.sites[world.names[0]].sign(others)
    with pytest.raises(TranscriptMismatch, match="site-0000"):
        world.sites[world.names[1]].open(told, signatures)


def test_a_site_that_was_not_asked_to_sign_does_not_open_fewer():
    world = masked_round(5)
    survivors = world.names[:4]
    signatures = {name: world.sites[name].sign(survivors) for name in survivors[1:]}
    with pytest.raises(RoundUsed):
        world.sites[world.names[0]].open(survivors, signatures)


def test_seed_and_mask_key_of_one_site_are_never_both_rebuilt():
    """The split that two exchanges might invite: some open everybody, the others open fewer."""
    world = masked_round(5, threshold=3)
    victim, survivors = world.names[4], world.names[:4]
    fast, slow = world.names[:2], world.names[2:4]
    seeds = [world.sites[name].open(world.names)[victim] for name in fast]
    signatures = {name: world.sites[name].sign(survivors) for name in slow}
    for name in slow:
        with pytest.raises(TooFewSurvivors):
            world.sites[name].open(survivors, signatures)
    # Two shares of the seed are out, and none of the mask key: three are needed of either.
    assert len(seeds) == 2
    with pytest.raises(MessageMalformed):
        points = Interpolation([1, 2, 3])
        points.combine({1: seeds[0], 2: seeds[1], 3: b"\xff" * 33})


# --- bytes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [1, 3, 4, 40, 190])
def test_a_cohort_that_is_cut_short_is_malformed(advertised, cut):
    world, site = advertised
    with pytest.raises(SecureAggregationError):
        site.share(world.coordinator.cohort.to_bytes()[:-cut])


def test_every_field_of_an_advertisement_is_signed_or_of_fixed_length(advertised):
    world, _ = advertised
    member = world.members[world.names[0]]
    good = ad(member)
    parts = unpack(good.to_bytes())
    for place, part in enumerate(parts):
        changed = [*parts]
        changed[place] = bytes([part[0] ^ 1]) + part[1:]
        with pytest.raises(SignerUnknown):
            Advertisement.from_bytes(pack(changed)).require_signed(member.roster)
        changed[place] = part + b"\0"
        with pytest.raises((MessageMalformed, SignerUnknown)):
            Advertisement.from_bytes(pack(changed)).require_signed(member.roster)


def test_members_out_of_order_or_twice_are_malformed(advertised):
    world, _ = advertised
    one, other, *_ = world.coordinator.cohort.members
    for wrong in ((other, one), (one, one)):
        with pytest.raises(MessageMalformed):
            Cohort(wrong)


def test_lists_that_lie_about_their_length_are_malformed():
    for blob in (b"\1", b"\xff\xff\xff\xff", b"\5\0\0\0abc", pack([b"a"]) + b"\0"):
        with pytest.raises(MessageMalformed):
            unpack(blob)
    with pytest.raises(MessageMalformed):
        unpack_named(pack([b"a", b"1", b"a", b"2"]))
    with pytest.raises(MessageMalformed):
        unpack_names(pack([b"\xff"]))
    assert unpack_named(pack_named({"b": b"2", "a": b""})) == {"a": b"", "b": b"2"}


# --- hostile sites, seen from the coordinator -----------------------------------------------------


def test_wrong_shares_of_a_site_make_the_round_void_not_wrong():
    world = masked_round(4, threshold=3)
    for name in world.names:
        shares = world.sites[name].open(world.names)
        victim = world.names[1]
        if name == world.names[0]:
            shares[victim] = split(b"x" * 32, threshold=3, points=[1, 2, 3], key=b"k" * 32)[0]
        world.coordinator.add_opening(name, shares)
    with pytest.raises(ShareInvalid, match="site-0001"):
        world.coordinator.unmask()


@pytest.mark.parametrize(
    "wrong",
    [np.zeros(7, np.uint32), np.zeros(8, np.uint16), np.zeros((8, 1), np.uint32), np.zeros(8)],
)
def test_an_update_of_another_length_or_type_is_left_out(wrong):
    world = World(4, threshold=3)
    world.advertise()
    world.share()
    with pytest.raises(MessageMalformed, match="site-0000"):
        world.coordinator.add_masked("site-0000", wrong, like=np.zeros(8, np.uint32))
    assert not world.coordinator.survivors


def test_a_site_speaks_for_itself_only_and_once():
    world = World(3, threshold=2)
    with pytest.raises(MessageMalformed):
        world.coordinator.advertise("site-0001", ad(world.members["site-0000"]).to_bytes())
    world.advertise()
    world.share()
    vectors = vectors_for(world.names, 8)
    world.mask(vectors)
    with pytest.raises(SurvivorsInvalid):
        world.coordinator.add_masked("site-0000", vectors["site-0000"], like=vectors["site-0000"])


def test_a_site_of_another_run_does_not_spoil_the_cohort():
    world = World(3, threshold=2)
    world.advertise()
    stranger = ad(members(3, run="other")["site-0002"]).to_bytes()
    with pytest.raises(MessageMalformed, match="another round"):
        world.coordinator.advertise("site-0002", stranger)
