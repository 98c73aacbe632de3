"""Instruction tuning on chats: all that assistants say is learned, and nothing that others say."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from silotune.errors import ChatRefused, RecordInvalid
from silotune.models.batching import Encoded, Rows, padding_id
from silotune.models.chat import ChatFormat, turns_of
from silotune.models.task import LoadedModel
from silotune.models.tasks.causal_lm import RESPONSE, CausalLm, labelled
from silotune.plan.chat import ChatSection
from silotune.plan.plan import Plan


@dataclass(frozen=True, kw_only=True)
class Chat(CausalLm):
    """Mean negative log-likelihood of the tokens that assistants write.

    Attributes
    ----------
    chat : ChatSection
        How chats are shown.
    """

    chat: ChatSection

    def example(self, text: str, *, number: int, plan: Plan) -> dict[str, str]:
        """A text as a question, and one short answer to all."""
        if self.chat.records == "prompts":
            return {"prompt": text, "response": RESPONSE}
        turns = [{"role": "user", "content": text}, {"role": "assistant", "content": RESPONSE}]
        return {"messages": json.dumps(turns)}

    def encode(
        self, examples: Sequence[Mapping[str, str]], tokenizer: Any, *, plan: Plan
    ) -> Encoded:
        """Token ids of whole chats; of each token, whether it is learned.

        Raises
        ------
        ChatRefused, LengthRefused
            The template can't be used, or ``data.max_length`` has no room for it.
        RecordInvalid
            Some chats don't fit it; the message counts examples and quotes none.
        """
        shown = ChatFormat(tokenizer, self.chat)
        shown.require_exact()
        limit, refused = plan.data.max_length, list[ChatRefused]()
        found = list[list[tuple[list[int], list[int]]]]()
        for example in examples:
            try:
                found.append([shown.encoded(turns_of(example, self.chat), limit=limit)])
            except ChatRefused as exc:
                refused.append(exc)
        if refused:
            raise RecordInvalid(
                f"{len(refused)} of {len(examples)} chats don't fit the template: {refused[0].detail}"
            )
        return Encoded.of_tokens(found, padding_id(tokenizer))

    def collate(self, encoded: Encoded, rows: Rows, device: torch.device) -> dict[str, Tensor]:
        """As `CausalLm.collate`, with labels where an assistant writes."""
        chosen = encoded.subset(rows)
        answered = torch.from_numpy(chosen.targets_in_batch(fill=0) > 0)
        return labelled(chosen.whole(device), answered.to(device))

    def prompts(self, model: LoadedModel, examples: Sequence[Mapping[str, str]]) -> list[list[int]]:
        """Token ids of chats that end with a question: the ``messages``, or one ``prompt``."""
        shown, room = self.format(model.tokenizer), model.plan.data.max_length // 2
        return [
            shown.asked(turns_of(example, self.chat, asks=True), limit=room) for example in examples
        ]

    def stops(self, model: LoadedModel) -> list[int]:
        """The template's own end of an answer, too."""
        return list(dict.fromkeys([*self.format(model.tokenizer).stops(), *super().stops(model)]))

    def format(self, tokenizer: Any) -> ChatFormat:
        """How chats are shown to a model with this tokenizer."""
        return ChatFormat(tokenizer, self.chat)
