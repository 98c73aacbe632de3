"""Taking what a model finds out of texts: a mark such as ``[NAME]`` stands where it was.

Everything else of a text stays as it is, to the last space.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from silotune.data.streams import RecordBlock
from silotune.inference.written import Answer
from silotune.models.spans import TextSpan
from silotune.models.task import LoadedModel


def redacted(text: str, spans: Sequence[TextSpan]) -> str:
    """A text with marks in place of its spans, which don't overlap."""
    parts, at = [], 0
    for span in sorted(spans):
        parts += [text[at : span.start], f"[{span.label}]"]
        at = span.end
    return "".join([*parts, text[at:]])


def finding(model: LoadedModel, *, threshold: float | None) -> LoadedModel:
    """The model, finding what is at least so likely; as it usually does when None."""
    if threshold is None:
        return model
    task: Any = model.task
    return replace(model, task=replace(task, threshold=threshold))


@dataclass(frozen=True)
class Redaction:
    """Puts the redacted text into a column of records, and counts what it took out.

    Parameters
    ----------
    column : str
        Of the texts.
    found : Counter of str
        How much was taken out, by label.
    """

    column: str
    found: Counter[str] = field(default_factory=Counter)

    def __call__(self, block: RecordBlock, answers: Sequence[Answer | None]) -> RecordBlock:
        """The block with redacted texts."""
        records = [
            {**record, self.column: self._without(record.get(self.column), answer)}
            for record, answer in zip(block.records, answers, strict=True)
        ]
        if block.arrow is None:
            return replace(block, records=records)
        import pyarrow as pa

        place = block.arrow.schema.get_field_index(self.column)
        values = pa.array([record[self.column] for record in records], pa.string())
        batch = block.arrow.set_column(place, self.column, values)
        return replace(block, records=records, arrow=batch)

    def _without(self, value: Any, answer: Answer | None) -> Any:
        """A value of the column without what was found in it."""
        if answer is None or not isinstance(value, str):
            return value
        # Spaces around a text are nobody's text to a model; its answer does not count them.
        cut = len(value) - len(value.lstrip())
        spans = [moved(span, cut) for span in answer["prediction"]]
        self.found.update(span.label for span in spans)
        return redacted(value, spans)


def moved(span: Mapping[str, Any], by: int) -> TextSpan:
    """A predicted span, so many characters further on."""
    return TextSpan(span["start"] + by, span["end"] + by, span["label"])


def in_words(found: Mapping[str, int], labels: Sequence[str]) -> str:
    """How much was found of each label: ``3 NAME, 1 DATE``."""
    listed = [f"{found[label]:,} {label}" for label in labels if found.get(label)]
    return ", ".join(listed) or "nothing"
