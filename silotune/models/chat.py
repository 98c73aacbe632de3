"""Chats as token ids: what stands around the turns, and which tokens an assistant would write.

No template ever sees a record. It is rendered around marks in the places of the turns' texts, once for
each order of roles; what it puts between the marks is the *frame*. Control tokens are read in the frame
alone, and a turn's text is encoded for itself, so that a literal ``<|im_end|>`` in a record is the
tokens of its characters. A base model's own template (Jinja, in a sandbox) is refused where this is not
exactly what Transformers makes of it; a plan's template is two texts around each turn, and nothing else.
"""

from __future__ import annotations

import json
import sys
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple, NoReturn

from jinja2 import Environment, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from silotune.errors import ChatRefused, LengthRefused
from silotune.models.batching import bare_ids, end_id, leading_ids
from silotune.plan.chat import PLACE, ROLES, ChatSection, Turns

_MARK = "\ue000turn {}\ue001"
_MOST_SOURCE, _MOST_FRAME, _MOST_TURNS = 100_000, 100_000, 1000
_DAY = datetime(2024, 7, 26)  # the day of any template that asks: a run is the same on every day
_PROBE = ("Who was here at noon?", "Two boats.", "And who counted them?", "Nobody did.")


class Turn(NamedTuple):
    """Who says what."""

    role: str
    content: str


def turns_of(example: Mapping[str, str], chat: ChatSection, *, asks: bool = False) -> list[Turn]:
    """The turns of an example, up to the last that an assistant wrote, or a user if it `asks`.

    A text without roles is a user's. Spaces around a turn's text don't count.

    Raises
    ------
    ChatRefused
        A role is unknown, or nothing is left.
    """
    found = _listed_turns(example["messages"]) if "messages" in example else None
    if found is None:
        text = example["prompt"] if "prompt" in example else example["messages"]
        found = [Turn("user", text.strip())]
        if not asks:
            found.append(Turn("assistant", example["response"].strip()))
    last = "user" if asks else "assistant"
    while found and found[-1].role != last:
        found.pop()
    if chat.system is not None and found and found[0].role != "system":
        found.insert(0, Turn("system", chat.system))
    if not found or any(turn.role not in ROLES for turn in found) or len(found) > _MOST_TURNS:
        listed = ", ".join(ROLES)
        raise ChatRefused(f"a chat has no turn to learn from, or a role that is none of {listed}")
    return found


def _listed_turns(messages: str) -> list[Turn] | None:
    """The turns of a list of role and content; None if it is a text."""
    with suppress(ValueError, TypeError, KeyError, AttributeError):
        return [Turn(str(t["role"]), t["content"].strip()) for t in json.loads(messages)]
    return None


class _Generation(Extension):
    """Reads ``{% generation %}`` as Transformers does: a block that is only marked."""

    tags: set[str] = {"generation"}  # noqa: RUF012 - as the base class has it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The block's own content."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _refuse(reason: object) -> NoReturn:
    raise TemplateError(str(reason))


def _environment() -> Environment:
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    made.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False)
    made.globals |= {"raise_exception": _refuse, "strftime_now": _DAY.strftime}
    return made


class _BaseTemplate:
    """The base model's own template."""

    def __init__(self, tokenizer: Any) -> None:
        source = tokenizer.chat_template
        if not isinstance(source, str) or len(source) > _MOST_SOURCE:
            raise ChatRefused(
                "the base model's tokenizer has no chat template",
                remedy="Say in [model.chat.template] what stands around the turns.",
            )
        try:
            self._template = _environment().from_string(source)
        except TemplateError as exc:
            raise ChatRefused(f"the base model's chat template can't be read: {exc}") from exc
        self._tokens = {k: str(v) for k, v in tokenizer.special_tokens_map.items()}

    def around(self, roles: Sequence[str], *, opens: bool) -> tuple[str, ...]:
        """What stands before each turn, and behind the last; ``opens`` for an answer to come."""
        marks = [_MARK.format(number) for number in range(len(roles))]
        messages = [{"role": r, "content": m} for r, m in zip(roles, marks, strict=True)]
        try:
            pieces, size = [], 0
            for piece in self._template.generate(
                messages=messages, add_generation_prompt=opens, **self._tokens
            ):
                pieces.append(piece)
                if (size := size + len(piece)) > _MOST_FRAME:
                    _refuse("it makes too long a text")
            rest, found = "".join(pieces), list[str]()
        except Exception as exc:
            raise ChatRefused(f"the base model's chat template refuses a chat: {exc}") from exc
        for mark in marks:
            before, met, rest = rest.partition(mark)
            if not met or "\ue000" in before:
                raise ChatRefused(
                    "the base model's chat template does not show each turn once and in order"
                )
            found.append(before)
        if "\ue000" in rest:
            raise ChatRefused("the base model's chat template shows a turn twice")
        return (*found, rest)


class _PlanTemplate:
    """What a plan puts around turns."""

    def __init__(self, turns: Turns) -> None:
        given = {role: getattr(turns, role) for role in ROLES}
        self._parts = {role: text.split(PLACE) for role, text in given.items() if text is not None}

    def around(self, roles: Sequence[str], *, opens: bool) -> tuple[str, ...]:
        """As `_BaseTemplate.around`."""
        if any(role not in self._parts for role in roles):
            raise ChatRefused("a chat has a system turn, and model.chat.template has none")
        found = [""]
        for role in roles:
            before, after = self._parts[role]
            found[-1] += before
            found.append(after)
        if opens:
            found[-1] += self._parts["assistant"][0]
        return tuple(found)


@dataclass(frozen=True)
class _Frame:
    """Token ids around turns: of each piece, those that are shown and those that are learned.

    ``shown[i]`` and then ``written[i]`` stand before turn i; ``closing[i]`` is what an assistant writes
    behind its turn i.
    """

    shown: tuple[tuple[int, ...], ...]
    written: tuple[tuple[int, ...], ...]
    closing: tuple[tuple[int, ...], ...]

    @property
    def size(self) -> int:
        """Tokens that are no turn's."""
        return sum(len(ids) for part in (self.shown, self.written, self.closing) for ids in part)


class ChatFormat:
    """How chats are encoded for one model.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        Of the base model.
    chat : ChatSection
        What the plan says.

    Raises
    ------
    ChatRefused
        The base model has no template that can be used.
    """

    def __init__(self, tokenizer: Any, chat: ChatSection) -> None:
        self._tokenizer, self._chat = tokenizer, chat
        self._own = isinstance(chat.template, Turns)
        self._template: _BaseTemplate | _PlanTemplate = (
            _PlanTemplate(chat.template)
            if isinstance(chat.template, Turns)
            else _BaseTemplate(tokenizer)
        )
        self._known: dict[tuple[str, ...], _Frame] = {}
        added = tokenizer.added_tokens_decoder.items()
        self._control = {*tokenizer.all_special_ids, *(i for i, token in added if token.special)}

    def encoded(self, turns: Sequence[Turn], *, limit: int) -> tuple[list[int], list[int]]:
        """Token ids of a chat, and a 1 for each that an assistant writes, else a 0.

        Too long a chat loses its oldest turns, the system's apart, up to the next one of a user; the
        last question then loses its beginning, and the last answer its end.

        Raises
        ------
        ChatRefused
            The template takes no such order of roles.
        LengthRefused
            The template alone is too long.
        """
        turns, texts = list(turns), self._bare(turns)
        self._shorten(turns, texts, limit)
        frame = self._frame(_roles(turns))
        over = frame.size + sum(map(len, texts)) - limit
        if frame.size >= limit:
            raise LengthRefused(
                f"data.max_length is {limit}, and what the chat template puts around one question "
                f"and its answer takes {frame.size} tokens"
            )
        _cut(turns[:-1], texts, over)
        ids, learned = list[int](), list[int]()
        for number, turn in enumerate(turns):
            mark = int(said(turn.role))
            ids += frame.shown[number]
            learned += [0] * len(frame.shown[number])
            own = [*frame.written[number], *texts[number], *frame.closing[number]]
            ids += own
            learned += [mark] * len(own)
        return ids[:limit], learned[:limit]

    def asked(self, turns: Sequence[Turn], *, limit: int) -> list[int]:
        """Token ids of a chat that ends with a question, up to where an assistant begins to write."""
        turns, texts = list(turns), self._bare(turns)
        while True:
            frame = self._asking(turns)
            over = sum(map(len, (*frame, *texts))) - limit
            if over <= 0 or not self._dropped(turns, texts):
                break
        _cut(turns, texts, over)
        ids = frame[0]
        for text, after in zip(texts, frame[1:], strict=True):
            ids = [*ids, *text, *after]
        return ids

    def opening(self) -> tuple[list[int], list[int]]:
        """Token ids before and behind the one question of a chat without an answer yet."""
        turns = turns_of({"prompt": ""}, self._chat, asks=True)
        frame, texts = self._asking(turns), self._bare(turns)
        before = [token for ids, text in zip(frame, texts, strict=False) for token in (*ids, *text)]
        return before, frame[-1]

    def _asking(self, turns: Sequence[Turn]) -> list[list[int]]:
        frame = [*map(self._literal, self._template.around(_roles(turns), opens=True))]
        return [self._led(frame[0]), *frame[1:]]

    def _shorten(self, turns: list[Turn], texts: list[list[int]], limit: int) -> None:
        """Take the oldest turns out, up to a later question, until the rest fits or is the last one."""
        first = int(turns[0].role == "system")
        begins = [first, *_later(turns)]

        def fits(begin: int) -> bool:
            size = sum(map(len, (*texts[:first], *texts[begin:])))
            kept = [*turns[:first], *turns[begin:]]
            return size <= limit and size + self._frame(_roles(kept)).size <= limit

        # A frame costs the square of its turns: few are made.
        begin = first if fits(first) else begins[bisect_left(begins[:-1], True, key=fits)]
        del turns[first:begin], texts[first:begin]

    def _dropped(self, turns: list[Turn], texts: list[list[int]]) -> bool:
        """Take the oldest turns out, up to the next question; whether there is one."""
        if not (later := _later(turns)):
            return False
        first = int(turns[0].role == "system")
        del turns[first : later[0]], texts[first : later[0]]
        return True

    def stops(self) -> list[int]:
        """The token that ends an assistant's turn."""
        return list(self._frame(("user", "assistant")).closing[1][-1:])

    def require_exact(self) -> None:
        """Check on a public chat that a template's text is encoded alike in parts and as a whole.

        Raises
        ------
        ChatRefused
            It is not.
        """
        if self._own:
            return
        roles = ("user", "assistant") * 2
        ids, _ = self.encoded([*map(Turn, roles, _PROBE)], limit=_MOST_FRAME)
        around = self._template.around(roles, opens=False)
        whole = "".join(f"{before}{said}" for before, said in zip(around, _PROBE, strict=False))
        behind = self._literal(around[-1])[len(self._frame(roles).closing[-1]) :]
        if self._literal(whole + around[-1]) != ids + behind:
            raise ChatRefused(
                "the base model's tokenizer joins what its chat template puts around a turn with it",
                remedy="Say in [model.chat.template] what stands around the turns.",
            )

    def _bare(self, turns: Sequence[Turn]) -> list[list[int]]:
        return bare_ids(self._tokenizer, [turn.content for turn in turns])

    def _literal(self, text: str) -> list[int]:
        """Token ids of what a template puts somewhere: control tokens are control tokens here."""
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

    def _led(self, ids: list[int]) -> list[int]:
        """With the tokenizer's begin token, if a plan's template has not put it there itself."""
        lead = leading_ids(self._tokenizer) if self._own else []
        return ids if ids[: len(lead)] == lead else lead + ids

    def _frame(self, roles: tuple[str, ...]) -> _Frame:
        if roles not in self._known:
            self._known[roles] = self._made(roles)
        return self._known[roles]

    def _made(self, roles: tuple[str, ...]) -> _Frame:
        around = self._template.around(roles, opens=False)
        shown, written, closing = list[list[int]](), list[list[int]](), list[list[int]]()
        for number, role in enumerate(roles):
            before, more = around[number], ""
            if role == "assistant":
                before = self._opened(roles[:number], around)
                more = around[number].removeprefix(before)
            ids, closed = self._literal(before), closing[-1] if closing else []
            # What the answer before was closed with is the beginning of this piece.
            shown.append(ids[len(closed) :] if ids[: len(closed)] == closed else ids)
            written.append(self._literal(more))
            closing.append(self._ending(roles[: number + 1], around) if said(role) else [])
        shown[0] = self._led(shown[0])
        return _Frame(*(tuple(map(tuple, part)) for part in (shown, written, closing)))

    def _opened(self, roles: tuple[str, ...], around: tuple[str, ...]) -> str:
        """The piece before an answer, as far as it is there when the answer is asked for."""
        *earlier, last = self._template.around(roles, opens=True)
        if tuple(earlier) != around[: len(roles)] or not around[len(roles)].startswith(last):
            raise ChatRefused(
                "the base model's chat template shows earlier turns otherwise once an answer follows"
            )
        return last

    def _ending(self, roles: tuple[str, ...], around: tuple[str, ...]) -> list[int]:
        """What an assistant writes behind its text: up to the first control token of its turn."""
        *_, last = self._template.around(roles, opens=False)
        ids = self._literal(last if around[len(roles)].startswith(last) else "")
        end = next((place for place, token in enumerate(ids) if token in self._control), None)
        if end is not None:
            return ids[: end + 1]
        if self._own:
            return [end_id(self._tokenizer)]
        raise ChatRefused(
            "the base model's chat template puts no token behind an answer that ends it",
            remedy="Say in [model.chat.template] what stands around the turns.",
        )


def unshown(
    examples: Sequence[Mapping[str, str]], tokenizer: Any, chat: ChatSection, *, limit: int
) -> list[int]:
    """The places of the examples that a base model's template can't show within so many tokens.

    Raises
    ------
    ChatRefused
        It can show none.
    """
    shown = ChatFormat(tokenizer, chat)
    shown.require_exact()
    found = []
    for place, example in enumerate(examples):
        try:
            shown.encoded(turns_of(example, chat), limit=limit)
        except (ChatRefused, LengthRefused):
            found.append(place)
    return found


def whole_sizes(
    examples: Sequence[Mapping[str, str]], tokenizer: Any, chat: ChatSection
) -> list[int]:
    """How many tokens each chat has, uncut. Raises `ChatRefused`."""
    shown = ChatFormat(tokenizer, chat)
    return [len(shown.encoded(turns_of(e, chat), limit=sys.maxsize)[0]) for e in examples]


def said(role: str) -> bool:
    """Whether it is a turn to learn."""
    return role == "assistant"


def _cut(turns: Sequence[Turn], texts: Sequence[list[int]], over: int) -> None:
    """Take so many tokens away, from the beginnings of these turns' texts; the system's last."""
    for number in sorted(range(len(turns)), key=lambda n: turns[n].role == "system"):
        cut = min(max(over, 0), len(texts[number]))
        del texts[number][:cut]
        over -= cut


def _roles(turns: Sequence[Turn]) -> tuple[str, ...]:
    return tuple(turn.role for turn in turns)


def _later(turns: Sequence[Turn]) -> list[int]:
    """Where a chat may begin instead, its system turn apart: at users' turns after an answer."""
    first = 1 + int(turns[0].role == "system")
    places = range(first, len(turns))
    return [n for n in places if _roles(turns[n - 1 : n + 1]) == ("assistant", "user")]
