"""Secure aggregation against Flower's own primitives, and a whole round end to end.

Flower: `pseudo_rand_gen` (masks), `create_shares`/`combine_shares` (Shamir) and `generate_shared_key`
(ECDH and HKDF), as its SecAgg+ workflow uses them. CPU time of one process and thread; both sides of a
ratio are measured in turns, and the median over the turns is given. Ratios are times, ours over theirs.

    python benchmarks/secagg.py [--quick] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import flwr
import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from flwr.common.secure_aggregation.crypto.shamir import combine_shares, create_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import generate_shared_key
from flwr.common.secure_aggregation.ndarrays_arithmetic import parameters_addition
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen
from flwr.supercore.primitives.asymmetric import (
    bytes_to_private_key,
    bytes_to_public_key,
    generate_key_pairs,
    private_key_to_bytes,
    public_key_to_bytes,
)

from silotune.privacy.secagg.coordinator import CoordinatorRound
from silotune.privacy.secagg.encoding import Mask, apply_masks
from silotune.privacy.secagg.graph import quorum_for, topology
from silotune.privacy.secagg.keys import Interpolation, RoundSecrets, pairwise_mask, split
from silotune.privacy.secagg.messages import Member
from silotune.privacy.secagg.site import SiteRound

Numbers = dict[str, float]


def cpu(action: Callable[[], object]) -> float:
    started = time.process_time()
    action()
    return time.process_time() - started


def turns(actions: dict[str, Callable[[], object]], count: int) -> dict[str, float]:
    """Median CPU seconds of each action, measured one after the other in every turn."""
    found: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(count):
        for name, action in actions.items():
            found[name].append(cpu(action))
    return {name: statistics.median(values) for name, values in found.items()}


def masks(parameters: int, *, peers: int, repeats: int) -> Numbers:
    seed, flat = os.urandom(32), np.zeros(parameters, np.int64)
    vector = np.zeros(parameters, np.uint32)
    ours = [Mask(os.urandom(32), bool(i % 2)) for i in range(peers)]
    buffer, block = bytearray((1 << 17) + 16), memoryview(bytes(1 << 17))

    def keystream() -> None:
        stream = Cipher(algorithms.AES(seed), modes.CTR(bytes(16))).encryptor()
        for _ in range(0, 4 * parameters, 1 << 17):
            stream.update_into(block, buffer)

    def flower() -> None:
        parameters_addition([flat], pseudo_rand_gen(seed, 1 << 32, [(parameters,)]))

    found = turns(
        {"flower": flower, "ours": lambda: apply_masks(vector, ours), "raw": keystream}, repeats
    )
    each, size = found["ours"] / peers, 4 * parameters / 1e9
    case = f"mask_{parameters}"
    print(
        f"  {parameters:>10,} parameters: {size / each:5.2f} GB/s a mask, Flower "
        f"{size / found['flower']:5.2f} GB/s, keystream alone {size / found['raw']:5.2f} GB/s; "
        f"{found['flower'] / each:.1f} times as fast as Flower, {each / found['raw']:.2f} of raw time"
    )
    return {
        f"{case}.ours_over_flower": each / found["flower"],
        f"{case}.ours_over_keystream": each / found["raw"],
        f"{case}.gb_per_second": size / each,
    }


def sharing(sites: int, *, repeats: int) -> Numbers:
    threshold = quorum_for(sites, None)
    secret, flower_key = os.urandom(32), private_key_to_bytes(generate_key_pairs()[0])
    points = list(range(1, sites + 1))
    key = os.urandom(32)

    batch = max(1, 200 // sites)  # below a tenth of a millisecond a single call can't be timed

    def ours_split() -> None:
        for _ in range(2 * batch):
            split(secret, threshold=threshold, points=points, key=key)

    def flower_split() -> None:
        create_shares(secret, threshold, sites)
        create_shares(flower_key, threshold, sites)

    theirs = create_shares(secret, threshold, sites)
    shares = dict(
        zip(points, split(secret, threshold=threshold, points=points, key=key), strict=True)
    )

    def ours_combine() -> None:
        weights = Interpolation(points[:threshold])
        for _ in range(sites):
            weights.combine(shares)

    assert Interpolation(points[:threshold]).combine(shares) == secret
    found = turns({"ours": ours_split, "flower": flower_split}, repeats)
    found["ours"] /= batch
    # Flower combines one secret at a time; a round combines one a site.
    one = cpu(lambda: combine_shares(theirs[:threshold]))
    together = turns({"ours": ours_combine}, repeats)["ours"]
    print(
        f"  {sites:>4} sites: a site shares in {1e3 * found['ours']:.2f} ms, Flower "
        f"{1e3 * found['flower']:.0f} ms ({found['flower'] / found['ours']:.0f} times); a round's "
        f"secrets are rebuilt in {1e3 * together:.2f} ms, Flower {1e3 * one * sites:.0f} ms "
        f"({one * sites / together:.0f} times)"
    )
    return {
        f"share_{sites}.ours_over_flower": found["ours"] / found["flower"],
        f"rebuild_{sites}.ours_over_flower": together / (one * sites),
    }


def agreement(*, repeats: int) -> Numbers:
    private, public = generate_key_pairs()
    private_bytes, public_bytes = private_key_to_bytes(private), public_key_to_bytes(public)
    own, other = RoundSecrets.fresh(), RoundSecrets.fresh()
    peer = other.masking.public_key().public_bytes_raw()
    names = {"context": bytes(32), "own": "a", "peer": "b"}

    def flower() -> None:
        for _ in range(50):
            generate_shared_key(
                bytes_to_private_key(private_bytes), bytes_to_public_key(public_bytes)
            )

    def ours() -> None:
        for _ in range(50):
            pairwise_mask(own.masking, peer, **names)

    found = turns({"ours": ours, "flower": flower}, repeats)
    print(
        f"  a key agreement takes {2e4 * found['ours']:.0f} us, Flower's (P-384) "
        f"{2e4 * found['flower']:.0f} us ({found['flower'] / found['ours']:.1f} times)"
    )
    return {"agreement.ours_over_flower": found["ours"] / found["flower"]}


def members(names: list[str]) -> dict[str, SiteRound]:
    """The sites of a first round, all in one roster."""
    keys = {name: Ed25519PrivateKey.generate() for name in names}
    roster = {name: key.public_key().public_bytes_raw() for name, key in keys.items()}
    found = {}
    for name, key in keys.items():
        member = Member(
            site=name,
            identity=key,
            roster=roster,
            plan_sha256="00" * 32,
            run="r",
            declared_units=100,
        )
        found[name] = SiteRound.begin(member, 1)
    return found


class Watch:
    """CPU seconds of one site, of the many that this process plays."""

    def __init__(self, site: str) -> None:
        self.site, self.seconds, self.sent = site, 0.0, 0

    @contextmanager
    def on(self, site: str) -> Iterator[None]:
        """Count what the body takes, if it is the watched site's."""
        began = time.process_time()
        yield
        if site == self.site:
            self.seconds += time.process_time() - began


def perform(
    names: list[str], parameters: int, *, dropped: int, watch: Watch
) -> tuple[CoordinatorRound, int]:
    """A round up to the sum; the coordinator, and the cohort's size in bytes."""
    rounds, coordinator = members(names), CoordinatorRound()
    for name, part in rounds.items():
        coordinator.advertise(name, part.advertisement().to_bytes())
    cohort = coordinator.cohort.to_bytes()
    for name, part in rounds.items():
        with watch.on(name):
            sealed = part.share(cohort)
        if name == watch.site:
            watch.sent += sum(len(message) for message in sealed.values())
        coordinator.add_shares(name, sealed)
    for name in names[: len(names) - dropped]:
        vector = np.zeros(parameters, np.uint32)
        with watch.on(name):
            rounds[name].mask(vector, present=names, sealed=coordinator.sealed_for(name))
        coordinator.add_masked(name, vector, like=vector)
    survivors = sorted(coordinator.survivors)
    if coordinator.agreement_needed:
        for name in survivors:
            coordinator.add_signature(name, rounds[name].sign(survivors))
    for name in survivors:
        with watch.on(name):
            opened = rounds[name].open(survivors, coordinator.signatures)
        if name == watch.site:
            watch.sent += sum(len(share) for share in opened.values())
        coordinator.add_opening(name, opened)
    return coordinator, len(cohort)


def whole_round(sites: int, parameters: int, *, dropped: int) -> Numbers:
    """CPU of one site and of the coordinator, and bytes of a site, over a whole round."""
    names = [f"site-{i:04d}" for i in range(sites)]
    watch, started = Watch(names[0]), time.process_time()
    coordinator, cohort = perform(names, parameters, dropped=dropped, watch=watch)
    began = time.process_time()
    assert not coordinator.unmask().any()
    unmasking, total = time.process_time() - began, time.process_time() - started
    peers = topology(sites).sites - 1
    # A site sends 4 bytes a parameter, two sealed shares a peer (66 and a tag of 16), one share a
    # member (33), and its keys.
    own = cohort // sites
    theory = 4 * parameters + 82 * peers + 33 * sites + own
    measured = 4 * parameters + watch.sent + own
    print(
        f"  {sites:>4} sites, {parameters:>9,} parameters, {dropped} dropped: {watch.seconds:.3f} s "
        f"a site, {unmasking:.3f} s to unmask, {total:.1f} s all together; {measured:,} bytes up a "
        f"site ({measured / (4 * parameters):.4f} of the bare update, theory {theory:,})"
    )
    case = f"round_{sites}_{parameters}_{dropped}"
    return {
        f"{case}.site_seconds": watch.seconds,
        f"{case}.unmask_seconds": unmasking,
        f"{case}.bytes_over_theory": measured / theory,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="smaller cases, fewer turns")
    parser.add_argument("--json", action="store_true", help="last line is one JSON object")
    options = parser.parse_args()
    print(f"flwr {flwr.__version__}, numpy {np.__version__}, one thread")
    numbers: Numbers = {}
    print("masks (9 peers at once, as in a round of ten)")
    for parameters in (300_000, 3_000_000) if options.quick else (300_000, 3_000_000, 30_000_000):
        repeats = 5 if parameters < 10_000_000 else 3
        numbers |= masks(parameters, peers=9, repeats=repeats)
    print("secret sharing (two secrets a site; threshold two thirds)")
    for sites in (10, 50) if options.quick else (10, 50, 100):
        numbers |= sharing(sites, repeats=1 if sites > 10 else 9)
    print("key agreement")
    numbers |= agreement(repeats=5)
    print("whole rounds in one process")
    cases = [(10, 300_000, 0), (10, 300_000, 2), (50, 300_000, 0)]
    if not options.quick:
        cases += [(100, 300_000, 0), (100, 300_000, 10), (10, 3_000_000, 0), (10, 30_000_000, 0)]
        cases += [(50, 3_000_000, 5)]
    for sites, parameters, dropped in cases:
        numbers |= whole_round(sites, parameters, dropped=dropped)
    if options.json:
        print(json.dumps({name: round(value, 6) for name, value in numbers.items()}))


if __name__ == "__main__":
    main()
