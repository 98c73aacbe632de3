"""A cohort of sites and a coordinator in one process, with everything that went over the wire."""

from dataclasses import replace

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from silotune.privacy.secagg.coordinator import CoordinatorRound
from silotune.privacy.secagg.messages import Member
from silotune.privacy.secagg.site import SiteRound

# Made once: fresh identities for every example would be most of a test's time.
_IDENTITIES = [Ed25519PrivateKey.generate() for _ in range(12)]


def members(n, *, threshold=None, run="run", plan="ab" * 32, **options):
    names = [f"site-{i:04d}" for i in range(n)]
    keys = {
        name: _IDENTITIES[i] if i < len(_IDENTITIES) else Ed25519PrivateKey.generate()
        for i, name in enumerate(names)
    }
    roster = {name: key.public_key().public_bytes_raw() for name, key in keys.items()}
    return {
        name: Member(
            site=name,
            identity=key,
            roster=roster,
            plan_sha256=plan,
            run=run,
            declared_units=100,
            threshold=threshold,
            **options,
        )
        for name, key in keys.items()
    }


class World:
    """One round. Each phase takes the names of the sites that drop out in it."""

    def __init__(self, n, *, threshold=None, number=1, **options):
        self.members = members(n, threshold=threshold, **options)
        self.names = sorted(self.members)
        self.sites = {name: SiteRound.begin(m, number) for name, m in self.members.items()}
        self.coordinator = CoordinatorRound(threshold=threshold)
        self.wire = {"masked": {}, "opened": {}, "signatures": {}}

    def restart(self, name):
        """The site's process ends, and comes back with what it had on its disk."""
        self.sites[name] = SiteRound.restore(self.members[name], self.sites[name].dump())

    def advertise(self, dropped=()):
        for name in self.names:
            if name not in dropped:
                message = self.sites[name].advertisement().to_bytes()
                self.coordinator.advertise(name, message)
        return self.coordinator.cohort

    def share(self, dropped=()):
        blob = self.coordinator.cohort.to_bytes()
        for name in self.coordinator.cohort.names:
            if name not in dropped:
                self.coordinator.add_shares(name, self.sites[name].share(blob))
        self.coordinator.require_quorum(self.coordinator.present)

    def mask(self, vectors, dropped=()):
        present = sorted(self.coordinator.present)
        for name in present:
            if name in dropped:
                continue
            vector = vectors[name].copy()
            sealed = self.coordinator.sealed_for(name)
            self.sites[name].mask(vector, present=present, sealed=sealed)
            self.wire["masked"][name] = vector.copy()
            self.coordinator.add_masked(name, vector, like=vector)
        self.coordinator.require_quorum(self.coordinator.survivors)

    def check(self, dropped=()):
        if self.coordinator.agreement_needed:
            survivors = sorted(self.coordinator.survivors)
            for name in survivors:
                if name not in dropped:
                    signature = self.sites[name].sign(survivors)
                    self.coordinator.add_signature(name, signature)
            self.coordinator.require_quorum(set(self.coordinator.signatures))

    def open(self, dropped=()):
        survivors = sorted(self.coordinator.survivors)
        for name in survivors:
            # A site that did not sign was not there for the check; it does not come back to open.
            signed = not self.coordinator.agreement_needed or name in self.coordinator.signatures
            if name not in dropped and signed:
                shares = self.sites[name].open(survivors, self.coordinator.signatures)
                self.wire["opened"][name] = shares
                self.coordinator.add_opening(name, shares)

    def run(self, vectors, *, advertise=(), share=(), mask=(), check=(), open_=()):
        self.advertise(advertise)
        self.share(share)
        self.mask(vectors, mask)
        self.check(check)
        self.open(open_)
        return self.coordinator.unmask()


def vectors_for(names, size, *, ring="uint32", seed=0):
    rng = np.random.default_rng(seed)
    top = np.iinfo(ring).max
    return {name: rng.integers(0, top, size, dtype=ring, endpoint=True) for name in names}


def ring_sum(vectors, names):
    """The sum in Python's integers."""
    chosen = [vectors[name] for name in names]
    modulus = int(np.iinfo(chosen[0].dtype).max) + 1
    totals = [sum(int(v[i]) for v in chosen) % modulus for i in range(len(chosen[0]))]
    return np.array(totals, dtype=chosen[0].dtype)


def masked_round(n=5, *, threshold=3, size=8, **options):
    """A world up to the masked updates, everybody alive."""
    world = World(n, threshold=threshold, **options)
    world.advertise()
    world.share()
    world.mask(vectors_for(world.names, size))
    return world


def swapped(member, **changes):
    return replace(member, **changes)
