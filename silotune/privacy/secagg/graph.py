"""Who masks and shares with whom: everybody with everybody, or a sparse random graph.

Up to `COMPLETE_UP_TO` sites the graph is complete. Above, each site has about k neighbours, as in Bell
et al. (CCS 2020), and the work of a site grows with k instead of n. Their circle over a random order is
made for a coordinator that follows the protocol: one that sees the graph and chooses who "drops out"
cuts it with k well-chosen sites. Here the graph is the union of k/2 random circles instead, which has no
such cuts: it is drawn from a hash of all members' fresh keys, every site draws it for itself, and a site
opens nothing for a survivor that keeps fewer than `Topology.retained` of its neighbours.

Sizes are chosen (`topology`) for levels that are stated here, against a coordinator that colludes with a
fifth of the sites and may drop all that the threshold lets it drop:

- colluding neighbours alone rebuild no secret, and no small group of honest survivors is cut off from
  the rest: each but with probability ``2**-80`` a graph. A coordinator that tries 2**40 sets of keys
  for its colluding sites, within a round, is left with ``2**-40``;
- if a tenth of the sites drops out by chance, a round fails with a probability of at most ``2**-30``.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from silotune.privacy.errors import CohortTooSmall

COMPLETE_UP_TO = 500
COLLUDING_SHARE = 0.2
DROPPING_SHARE = 0.1
SECURITY_BITS = 80.0
CORRECTNESS_BITS = 30.0


@dataclass(frozen=True)
class Topology:
    """Sizes of a round's graph.

    Attributes
    ----------
    sites : int
        Members of the cohort, n.
    circles : int
        Random circles that the graph is the union of, k/2; 0 for a complete graph.
    shares : int
        Shares that rebuild a secret of a site.
    retained : int
        Neighbours of a survivor that must have survived too.
    quorum : int
        Survivors, and signatures on the survivor set, without which nothing is opened.
    """

    sites: int
    circles: int
    shares: int
    retained: int
    quorum: int

    @property
    def complete(self) -> bool:
        """Whether everybody is everybody's neighbour."""
        return self.circles == 0


def quorum_for(sites: int, threshold: int | None) -> int:
    """Survivors that a round of so many sites needs: the plan's, or more than two thirds."""
    return 2 * sites // 3 + 1 if threshold is None else threshold


def tolerated_collusion(threshold: int, cohort: int) -> int:
    """Sites that may collude with the coordinator without two disjoint quorums with them in both."""
    return min(2 * threshold - cohort - 1, threshold - 1)


@lru_cache(maxsize=64)
def topology(sites: int, *, threshold: int | None = None) -> Topology:
    """The graph's sizes for a cohort.

    Parameters
    ----------
    sites : int
        Members, at least 2.
    threshold : int, optional
        Survivors that the plan asks for; more than two thirds of the cohort when absent.

    Raises
    ------
    CohortTooSmall
        The threshold is above the cohort, or not more than half of it: then two disjoint sets of
        survivors could be opened.
    """
    quorum = quorum_for(sites, threshold)
    if sites < 2 or not sites < 2 * quorum <= 2 * sites:
        raise CohortTooSmall(
            f"{sites} sites with a threshold of {quorum}: it must be more than half of them"
        )
    if sites <= COMPLETE_UP_TO:
        return Topology(sites, 0, quorum, quorum, quorum)
    for circles in range(48, sites // 4, 2):
        found = _sizes(sites, circles, quorum)
        if found is not None:
            return found
    return Topology(sites, 0, quorum, quorum, quorum)


def _sizes(sites: int, circles: int, quorum: int) -> Topology | None:
    """Shares and retained neighbours that give the stated levels with so many circles, if any do."""
    degree, colluding = 2 * circles, math.floor(COLLUDING_SHARE * sites)
    union = math.log2(sites)
    share = colluding / (sites - 1)
    # The tail falls with the number: the first that is rare enough is found by bisection.
    shares = bisect_left(
        range(degree),
        True,
        key=lambda t: _log2_tail(share, degree, t) + union <= -SECURITY_BITS,
    )
    group = _largest_cut_off(sites, circles, quorum, colluding)
    if shares == degree or group is None:
        return None
    # A survivor keeps `retained` neighbours, of which fewer than `shares` collude: so a group of honest
    # survivors without an edge to the others has more than retained - shares members.
    retained = max(shares, shares + group)
    # A place in the circles is lost to a site that dropped, or to a neighbour that is one already.
    lost = degree - retained + 1
    if _log2_tail(DROPPING_SHARE + degree / 2 / sites, degree, lost) + union > -CORRECTNESS_BITS:
        return None
    return Topology(sites, circles, shares, retained, quorum)


def _log2_tail(share: float, drawn: int, least: int) -> float:
    """Log2 of the chance that at least `least` of `drawn` are marked: the binomial tail.

    Drawing without replacement, or with chances that differ from draw to draw around `share`, spreads
    no wider (Hoeffding, JASA 1963, theorem 4; Annals of Mathematical Statistics 1956).
    """
    if not (least > 0 and share < 1.0):
        return 0.0
    log_yes, log_no = math.log2(share), math.log2(1.0 - share)
    logs = [
        _log2_choose(drawn, i) + i * log_yes + (drawn - i) * log_no for i in range(least, drawn + 1)
    ]
    top = max(logs, default=-math.inf)
    return top + math.log2(math.fsum(2.0 ** (x - top) for x in logs)) if logs else -math.inf


def _largest_cut_off(sites: int, circles: int, quorum: int, colluding: int) -> int | None:
    """Size up to which a group of honest survivors might be cut off; larger ones are not.

    A group of m is cut off if the successors of its members, in every circle, lie in the group, among
    the colluding or among the dropped, which the coordinator chooses after it saw the graph: a union
    bound over all groups and all sets of dropped sites.
    """
    dropped = sites - quorum
    ways = _log2_choose(sites, dropped)
    safe_from = None
    for m in range((sites - dropped - colluding) // 2, 0, -1):
        inside = min(1.0, (m + dropped + colluding) / sites)
        chance = _log2_choose(sites, m) + ways + m * circles * math.log2(inside)
        if chance + math.log2(sites) > -SECURITY_BITS:
            break
        safe_from = m
    return None if safe_from is None else safe_from - 1


def _log2_choose(n: int, k: int) -> float:
    return (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)) / math.log(2)


@lru_cache(maxsize=4)  # a process that plays many sites draws one graph for all of them
def neighbours(sites: int, *, circles: int, seed: bytes) -> tuple[tuple[int, ...], ...]:
    """The neighbours of every member, by place in the cohort, sorted.

    Parameters
    ----------
    sites : int
        Number of members.
    circles : int
        0 for the complete graph.
    seed : bytes
        32 bytes that nobody could choose: a hash over all members' keys.
    """
    if circles == 0:
        return tuple(tuple(j for j in range(sites) if j != i) for i in range(sites))
    found: list[set[int]] = [set() for _ in range(sites)]
    for order in _orders(sites, circles, seed):
        for here, there in zip(order, [*order[1:], order[0]], strict=True):
            found[here].add(there)
            found[there].add(here)
    return tuple(tuple(sorted(near)) for near in found)


def _orders(sites: int, circles: int, seed: bytes) -> Sequence[list[int]]:
    """Random orders: the ranks of 64-bit words of a keystream, ties by place."""
    stream = Cipher(algorithms.AES(seed), modes.CTR(bytes(16))).encryptor()
    words = np.frombuffer(stream.update(bytes(8 * sites * circles)), dtype="<u8")
    return np.argsort(words.reshape(circles, sites), axis=1, kind="stable").tolist()  # type: ignore[no-any-return]
