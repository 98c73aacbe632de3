"""A plan as the TOML file that says the same."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from silotune.plan.plan import Plan


def plan_toml(plan: Plan) -> str:
    """The text of a file that `Plan.load` reads as this plan: what is not set is left out."""
    content = plan.model_dump(mode="json", exclude_none=True, exclude_unset=True)
    return "\n".join(_lines(content)) + "\n"


def _lines(sections: Mapping[str, Any]) -> Iterator[str]:
    for name, section in sections.items():
        yield f"[{name}]"
        for key, value in section.items():
            if key == "candidates":  # one a line, to be read and changed
                yield from (f"{key} = [", *(f"    {toml_text(one)}," for one in value), "]")
            elif name != "vote" or key != "plan":
                yield f"{key} = {toml_text(value)}"
        if name == "vote":
            yield from _lines({"vote.plan": section["plan"]})


def _key(key: str) -> str:
    """A key as it is, or in quotes: a dot would begin a table."""
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key)


def toml_text(value: Any) -> str:
    """A value as TOML, in one line."""
    if isinstance(value, Mapping):
        return (
            f"{{ {', '.join(f'{_key(key)} = {toml_text(item)}' for key, item in value.items())} }}"
        )
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml_text, value))}]"
    return json.dumps(value, ensure_ascii=False)
