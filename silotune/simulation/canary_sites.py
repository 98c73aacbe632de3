"""A simulation's sites with canaries among their records: the worker program of an attacked run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from silotune.client.site_run import SiteRun
from silotune.data.records import Records, Split
from silotune.models.adapter import write_adapter
from silotune.models.batching import batches
from silotune.privacy.attacks.canaries import Example
from silotune.simulation.program import Arrays, SimulatedSites

_BATCH = 64


class _PlantedSite(SiteRun):
    """A site that trains on canaries too, each a unit of its own."""

    planted: Sequence[Example] = ()

    @cached_property
    def records(self) -> Records:
        """The site's records, and the canaries."""
        own = super().records
        first, more = own.n_units(), len(self.planted)
        return replace(
            own,
            examples=[*own.examples, *self.planted],
            unit_of=np.concatenate([own.unit_of, np.arange(first, first + more, dtype=np.int64)]),
            split=np.concatenate([own.split, np.full(more, Split.TRAIN, dtype=np.uint8)]),
        )


class CanarySites(SimulatedSites):
    """Program of a worker of an attacked run.

    Parameters
    ----------
    payload : mapping
        That of `SimulatedSites`, and ``planted``: the canaries to train on, a list a site.
    """

    part = _PlantedSite

    def __init__(self, payload: Mapping[str, Any]) -> None:
        self._planted = payload["planted"]
        super().__init__(payload)

    def site(self, index: int) -> SiteRun:
        """The site at an index, with its canaries."""
        found = super().site(index)
        cast(_PlantedSite, found).planted = self._planted[index]
        return found

    def inspect(
        self, site_index: int, request: dict[str, Any], arrays: Arrays
    ) -> tuple[dict[str, Any], Arrays]:
        """Answer the attacker too: ``losses`` and ``complete`` of examples under an adapter."""
        match request["op"]:
            case "losses":
                return {}, {"losses": self._losses(site_index, request["examples"], arrays["flat"])}
            case "complete":
                site = self.site(site_index)
                model = site.trainable.model
                write_adapter(model, site.at_own_rank(arrays["flat"]))
                return {"texts": model.task.predict(model, request["prompts"])}, {}
            case _:
                return super().inspect(site_index, request, arrays)

    def _losses(
        self, site_index: int, examples: Sequence[Example], flat: NDArray[np.float32]
    ) -> NDArray[np.float64]:
        site = self.site(site_index)
        model = site.trainable.model
        write_adapter(model, site.at_own_rank(flat))
        encoded = model.task.encode(examples, model.tokenizer, plan=self._plan)
        found = np.empty(len(examples))
        for rows in batches(encoded, range(len(examples)), size=_BATCH):
            with model.module.inference():
                inputs = model.task.collate(encoded, rows, model.device)
                found[rows] = model.task.losses(model.module, inputs).double().cpu().numpy()
        return found


def build(payload: Mapping[str, Any]) -> CanarySites:
    """The worker's factory."""
    return CanarySites(payload)
