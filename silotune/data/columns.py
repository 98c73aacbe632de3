"""``[datasets.NAME.columns]``: which column of a source plays which role to a plan."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Literal, Self, get_args

from pydantic import Field, model_validator

from silotune.plan.sections import Section

Role = Literal[
    "text", "label", "unit", "group", "split", "prompt", "response",
    "text_b", "labels", "value", "spans", "words", "tags", "messages", "image",
]  # fmt: skip

LISTS = frozenset({"labels", "spans", "words", "tags", "messages"})
"""Roles whose value is a list."""

LABELLED = frozenset({"label", "labels", "spans"})
"""Roles whose value has labels of the plan."""

STANDS_FOR = {"words": "text", "tags": "spans"}
"""What a plan asks for, by the role that it may be made of."""

Column = Annotated[str, Field(min_length=1)]

_PIECE = re.compile(r"\{\{|\}\}|\{([^{}]+)\}")


def pieces_of(text: str) -> list[tuple[str, str | None]] | None:
    """What ``{title}: {body}`` puts together; None if it is the name of one column.

    Returns
    -------
    list of (str, str or None)
        Text that stands between columns, and the column's name where one is.
    """
    pieces: list[tuple[str, str | None]] = []
    at = 0
    for match in _PIECE.finditer(text):
        pieces.append((text[at : match.start()], None))
        pieces.append((match[0][0], None) if match[1] is None else ("", match[1]))
        at = match.end()
    pieces.append((text[at:], None))
    return pieces if any(name is not None for _, name in pieces) else None


def columns_in(text: str) -> list[str]:
    """The columns that a role is made of: those of a template, or the one that it is."""
    pieces = pieces_of(text)
    return [text] if pieces is None else [name for _, name in pieces if name is not None]


def by_asked(columns: Mapping[str, str]) -> dict[str, str]:
    """Columns by the roles that a plan asks for, of columns by the roles that they have."""
    return {STANDS_FOR.get(role, role): column for role, column in columns.items()}


class ColumnsConfig(Section):
    """``[datasets.NAME.columns]``: which column plays which role."""

    text: Column | None = None
    label: Column | None = None
    unit: Column | None = Field(None, description="Identifies the patient, customer, ...")
    group: Column | None = Field(None, description="Kept whole when data.split_by is 'group'.")
    split: Column | None = Field(
        None, description="Says train, validation or test; the site's secret decides without it."
    )
    prompt: Column | None = None
    response: Column | None = None
    text_b: Column | None = Field(None, description="The second text of a pair.")
    labels: Column | None = Field(
        None, description="Several labels: a list, or one text with label_separator between them."
    )
    value: Column | None = Field(None, description="The number of a record.")
    spans: Column | None = Field(
        None, description="What is to be found in the text: a list of start, end and label."
    )
    words: Column | None = Field(None, description="The text as a list of words.")
    tags: Column | None = Field(None, description="A tag for each of the words: B-NAME, O, ...")
    messages: Column | None = Field(None, description="A chat: a list of role and content.")
    image: Column | None = Field(None, description="The path of a file below `images`.")

    @model_validator(mode="after")
    def _single(self) -> Self:
        whole = ("label", "value", "unit", "group", "split", "image", *sorted(LISTS))
        # The spans of a text count its characters.
        for role in (*whole, *(["text"] if self.spans is not None else [])):
            column = getattr(self, role)
            if column is not None and pieces_of(column) is not None:
                raise ValueError(f"{role} is one column, and {column!r} puts several together")
        for one, other in (("text", "words"), ("spans", "tags")):
            if getattr(self, one) is not None and getattr(self, other) is not None:
                raise ValueError(f"{one} and {other} say the same; remove one")
        for one, other in (("tags", "words"), ("spans", "text")):
            if getattr(self, one) is not None and getattr(self, other) is None:
                raise ValueError(f"{one} need {other}, which they are of")
        return self

    def by_role(self) -> dict[Role, str]:
        """The columns that are named, by role."""
        roles: tuple[Role, ...] = get_args(Role)
        return {role: getattr(self, role) for role in roles if getattr(self, role) is not None}
