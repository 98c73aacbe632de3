"""SCAFFOLD: each site corrects its steps by how its records differ from everybody's.

Karimireddy, Kale, Mohri et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning"
(ICML 2020), with control variates by option II.

Good for
    Many local steps on sites that differ, without privacy or with mild noise.
Bytes
    As fedavg: with option II and no optimizer at the server, the common control variate is the mean
    change of the last round over ``steps * rate``, which a site reads off two successive adapters. In
    a round that some site misses, it is the mean over those that answered.
Linear
    Yes: works under secure aggregation.
Privacy
    Post-processing where the site's steps are private (mode "record"): its control variate is made
    of its own releases. Refused with mode "site", where what is sent is clipped after the fact and the
    variates of the sites would no longer add up to the common one. The variates bring back the noise
    of the round before.
Head
    Corrected and averaged like the rest.
"""

from __future__ import annotations

from silotune.strategies.linear import LinearStrategy


class Scaffold(LinearStrategy):
    """Weighted mean of changes; the control variates are the site's business."""
