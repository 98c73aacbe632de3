"""Which groups' figures may be shown: none that is small, and none that others would give away.

A group is hidden if fewer than `least` of its units have the positive label, or fewer than `least` have
another one (without a positive label: if it has fewer units). If the figures of all groups but one are
shown, that one's follow from the total. So further groups are hidden, the smallest first, until the
hidden ones are two at least and together large enough in the same sense.
"""

from __future__ import annotations

from collections.abc import Mapping

Sizes = Mapping[str, tuple[int, ...]]


def shown_groups(sizes: Sizes, *, least: int) -> list[str]:
    """The groups that may be shown, in the order given.

    Parameters
    ----------
    sizes : mapping of str to tuple of int
        By group, how many units it has of each kind that counts.
    least : int
        How many of each a group, or all hidden ones together, must have.
    """
    hidden = [group for group, counts in sizes.items() if min(counts) < least]
    rest = sorted(
        (group for group in sizes if group not in hidden), key=lambda group: sum(sizes[group])
    )
    while hidden and rest and not _safe([sizes[group] for group in hidden], least):
        hidden.append(rest.pop(0))
    return [group for group in sizes if group not in hidden]


def _safe(hidden: list[tuple[int, ...]], least: int) -> bool:
    together = [sum(kind) for kind in zip(*hidden, strict=True)]
    return len(hidden) > 1 and min(together) >= least
