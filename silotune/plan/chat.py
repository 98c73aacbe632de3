"""``[model.chat]``: how a causal language model is shown a chat."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from silotune.plan.document import Document

ROLES = ("system", "user", "assistant")
"""Who says something in a chat."""

PLACE = "{content}"
"""Where the text of a turn stands in what a plan puts around it."""


def _with_place(text: str) -> str:
    if text.count(PLACE) != 1:
        raise ValueError(f"has {PLACE} once, where the text of the turn is")
    return text


Around = Annotated[str, Field(max_length=4000), AfterValidator(_with_place)]


class Turns(Document):
    """``[model.chat.template]``: what stands around each turn. Data: there is nothing to execute."""

    system: Around | None = None
    user: Around
    assistant: Around


class ChatSection(Document):
    """``[model.chat]``: records that are chats, and the template that makes one text of each."""

    template: Literal["base"] | Turns = "base"
    records: Literal["messages", "prompts"] = Field(
        "messages",
        description="Roles of a record: 'messages', or 'prompts' for prompt and response as two turns.",
    )
    system: Annotated[str, Field(min_length=1, max_length=20_000)] | None = Field(
        None, description="Put before chats that have no system turn of their own."
    )
