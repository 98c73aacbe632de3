"""How unlike the others a site's update is, where the coordinator sees updates.

The score is the modified z-score of Iglewicz and Hoaglin (How to Detect and Handle Outliers, 1993) over
the logarithms of the updates' norms: robust, as it uses medians, and free of scale. It finds what is too
large or too small; a lie of ordinary size it can't see, and robust strategies (docs/strategies.md) are
for that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median

FEWEST = 4
"""With fewer sites there are no "others" to speak of: no scores."""

_NORMAL = 0.6745  # of a normal distribution, the deviation that half of all values stay within
_FLOOR = 0.05  # norms within some 5 % of each other are alike, however alike the rest are
_SILENT = 1e-30  # an update of zeros has a norm too


def scores(norms: Mapping[str, float]) -> dict[str, float]:
    """Score of each site from the norm of its update; empty with fewer than `FEWEST` sites."""
    if len(norms) < FEWEST:
        return {}
    logs = {site: math.log(max(norm, _SILENT)) for site, norm in norms.items()}
    centre = median(logs.values())
    spread = max(median(abs(value - centre) for value in logs.values()), _FLOOR)
    return {site: _NORMAL * abs(value - centre) / spread for site, value in logs.items()}
