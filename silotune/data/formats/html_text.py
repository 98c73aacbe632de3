"""HTML as plain text, in time proportional to its length whatever stands in it.

The standard library's parser takes minutes for 100 KB of ``<a <a <a``, and a note comes from anywhere.
"""

from __future__ import annotations

import html
import re

_MARK = re.compile(
    r"<(?:(?P<comment>!--)|(?P<other>[!?])|(?P<close>/?)(?P<tag>[a-zA-Z][a-zA-Z0-9]*))"
)
_QUOTE_OR_END = re.compile("[>\"']")
_BLOCKS = frozenset((
    "address", "article", "blockquote", "br", "dd", "div", "dl", "dt", "footer", "h1", "h2", "h3", "h4",
    "h5", "h6", "header", "hr", "li", "ol", "p", "pre", "section", "table", "td", "th", "tr", "ul",
))  # fmt: skip
_SILENT = {
    tag: re.compile(f"</{tag}", re.IGNORECASE) for tag in ("script", "style", "head", "template")
}


def plain_text_of(source: str) -> str:
    """The text of HTML as a browser shows it, one line a block, without scripts and styles."""
    parts, at = [], 0
    while mark := _MARK.search(source, at):
        parts.append(_shown(source[at : mark.start()]))
        if mark["comment"]:
            at = _behind(source, "-->", mark.end())
        elif mark["other"]:
            at = _behind(source, ">", mark.end())
        else:
            tag, at = mark["tag"].lower(), _behind_tag(source, mark.end())
            if tag in _BLOCKS:
                parts.append("\n")
            elif tag in _SILENT and not mark["close"]:
                end = _SILENT[tag].search(source, at)
                at = end.start() if end else len(source)
    parts.append(_shown(source[at:]))
    lines = (" ".join(line.split()) for line in "".join(parts).split("\n"))
    return "\n".join(line for line in lines if line)


def unescaped(text: str) -> str:
    """A text with its character references (``&amp;``, ``&#233;``) replaced."""
    try:
        return html.unescape(text)
    except ValueError:  # a number of more than 4,300 digits
        return text


def _shown(text: str) -> str:
    return unescaped(re.sub(r"\s+", " ", text))


def _behind(source: str, end: str, at: int) -> int:
    found = source.find(end, at)
    return len(source) if found < 0 else found + len(end)


def _behind_tag(source: str, at: int) -> int:
    """Where a tag ends: at the next ``>`` that is not quoted."""
    while found := _QUOTE_OR_END.search(source, at):
        if found[0] == ">":
            return found.end()
        closing = source.find(found[0], found.end())
        # Without a second one it is no quote; that can be so only once a file, so this stays linear.
        at = found.end() if closing < 0 else closing + 1
    return len(source)
