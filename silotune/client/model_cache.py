"""The base model of a process: loaded once, kept between messages, shared by its sites."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

from silotune.client.trainer import TrainableModel
from silotune.data.site import SiteConfig
from silotune.models.base import load_model, outline
from silotune.models.batching import Encoded
from silotune.models.choices import Choices
from silotune.models.features import Frozen, compute_frozen
from silotune.models.layout import Layout
from silotune.plan.plan import Plan

_MOST_FROZEN = 16  # sites whose frozen features are kept at a time


@dataclass
class ModelCache:
    """The base model of this process, loaded for one plan at a time and shared by its sites.

    Attributes
    ----------
    choices : Choices or None
        What to compute with; chosen here if None.
    shared : Path or None
        Folder through which the processes of a simulation share frozen features. A deployed site
        has none: what is made of its records stays in memory.
    device : str
        What to compute on when `choices` are made here.
    """

    choices: Choices | None = None
    shared: Path | None = None
    device: str = "auto"
    _held: dict[int, TrainableModel] = field(default_factory=dict)
    _outlined: tuple[Plan, Layout] | None = None
    _frozen: dict[_Made, Frozen] = field(default_factory=dict)

    def for_plan(
        self, plan: Plan, *, base: str | None = None, rank: int | None = None
    ) -> TrainableModel:
        """The model ready to train under `plan`, loaded if another plan had it before.

        `base` is where the base model is on this machine, if not where the plan says; `rank` that of
        the adapter, if not the plan's.
        """
        if any(held.plan != plan for held in self._held.values()):
            self._held.clear()
        rank = rank or plan.lora.r
        if rank not in self._held:
            wish = asdict(self.choices) if self.choices else {"device": self.device}
            wish.pop("reason", None)
            loaded = load_model(plan, base=base, rank=rank, **wish)
            self._held[rank] = TrainableModel(plan, loaded)
        return self._held[rank]

    def layout(self, plan: Plan, *, base: str) -> Layout:
        """The adapter's layout, without loading a model for it."""
        held = self._held.get(plan.lora.r)
        if held is not None and held.plan == plan:
            return held.model.layout
        if self._outlined is None or self._outlined[0] != plan:
            self._outlined = plan, outline(plan, base=base)
        return self._outlined[1]

    def frozen(
        self, site: SiteConfig, plan: Plan, encoded: Encoded, *, content: str = ""
    ) -> Frozen:
        """What the base model makes of a site's records: the same for all plans of one model.

        `content` names the records (`Records.content`), so that what was made of others can be
        forgotten. What is given out was made of exactly these tokens, whatever the name says.
        """
        lora = (plan.lora.last_layers, plan.lora.target_modules)
        tokens = hashlib.sha256(encoded.ids.tobytes() + encoded.offsets.tobytes()).hexdigest()
        made = _digest(f"{plan.model!r} {plan.data!r} {lora} {tokens}")
        key = _Made(_place(site, plan), content, made)
        if key not in self._frozen:
            if len(self._frozen) >= _MOST_FROZEN:
                self._frozen.clear()
            self._frozen[key] = self._find_frozen(key, plan, encoded, base=site.model_place(plan))
        return self._frozen[key]

    def forget_other_content(self, site: SiteConfig, plan: Plan, content: str) -> None:
        """Remove what was made of other versions of a dataset, from memory and from the disk."""
        place = _place(site, plan)
        for key in [k for k in self._frozen if k.place == place and k.content != content]:
            del self._frozen[key]
        for path in self.shared.glob(f"{place}-*") if self.shared else ():
            if not path.name.startswith(f"{place}-{content}-"):
                path.unlink(missing_ok=True)

    def _find_frozen(self, key: _Made, plan: Plan, encoded: Encoded, *, base: str) -> Frozen:
        path = self.shared / f"{'-'.join(key)}.safetensors" if self.shared else None
        if path is not None and path.exists():
            return Frozen.load(path, encoded)
        found = compute_frozen(self.for_plan(plan, base=base).model, encoded)
        if path is not None:
            found.save(path)
        return found


class _Made(NamedTuple):
    """What frozen features were made of."""

    place: str
    content: str
    settings: str


def _place(site: SiteConfig, plan: Plan) -> str:
    return _digest(f"{site.folder} {plan.data.dataset}")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
