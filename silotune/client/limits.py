"""``[resources]`` made to hold for this process."""

from __future__ import annotations

import resource

from silotune.data.site_terms import ResourcesConfig


def apply_limits(resources: ResourcesConfig) -> None:
    """Bound the process's memory; asking for more then fails like a full machine would.

    The limit is on private writable memory (``RLIMIT_DATA``, Linux 4.7 and later); what a GPU has is
    not counted.
    """
    if resources.memory_mb is not None:
        limit = resources.memory_mb * 1_000_000
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        if hard != resource.RLIM_INFINITY:
            limit = min(limit, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
