"""Single-label image classification: a linear head on the pooled features of a backbone of images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from silotune.errors import RecordInvalid
from silotune.models.answers import Targets
from silotune.models.batching import Encoded
from silotune.models.images import ImageUnread, content_of, decoded, drawn
from silotune.models.tasks.text_classification import TextClassification
from silotune.plan.plan import Plan

_DRAWN = "drawn:"  # before the number of a public picture: no path of a file begins so


class ImageClassification(TextClassification):
    """Cross-entropy of one label an image. An image's unit is told by its path."""

    def example(self, text: str, *, number: int, plan: Plan) -> dict[str, str]:
        """A drawn picture with a label of the plan."""
        del text, plan
        return {"image": f"{_DRAWN}{number}", **self.answer.example(number)}

    def inputs(
        self,
        examples: Sequence[Mapping[str, str]],
        targets: Targets,
        tokenizer: Any,
        plan: Plan,
    ) -> Encoded:
        """The prepared images; `tokenizer` is the base model's `Preparation`.

        Raises
        ------
        RecordInvalid
            An image can't be read; the message says why, and counts.
        """
        del plan
        ids = np.empty((len(examples), tokenizer.size), dtype=np.uint8)
        for row, example in enumerate(examples):
            try:
                ids[row] = tokenizer.prepared(_pixels(example["image"]))
            except ImageUnread as exc:
                raise RecordInvalid(
                    f"image {row + 1} of {len(examples)} is {exc}",
                    remedy="silotune data check tells which images of a dataset are left out, and why.",
                ) from None
        offsets = np.arange(len(examples) + 1, dtype=np.int64) * tokenizer.size
        return Encoded(ids.reshape(-1), offsets, targets, 0, images=tokenizer)


def _pixels(place: str) -> Any:
    if place.startswith(_DRAWN):
        return drawn(int(place.removeprefix(_DRAWN)))
    path = Path(place).absolute()
    return decoded(content_of(path.parent, path.name))
