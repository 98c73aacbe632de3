"""Attachments of FHIR resources as text: what is inline, and plain text or HTML."""

from __future__ import annotations

import re
from base64 import b64decode
from typing import Any

from silotune.data.formats.html_text import plain_text_of


class Unread(Exception):
    """Why a text can't be read; it says nothing that the record holds."""


def text_of_attachments(attachments: list[Any]) -> str:
    """The text of the best of some attachments, which are one document in several types."""
    kinds: dict[str, dict[str, Any]] = {}
    elsewhere = False
    for attachment in attachments:
        if isinstance(attachment, dict):
            media = attachment.get("contentType")
            kind = media.partition(";")[0].strip().lower() if isinstance(media, str) else ""
            elsewhere |= kind in _MEDIA and "data" not in attachment
            if "data" in attachment:
                kinds.setdefault(kind, attachment)
    for kind in _MEDIA:
        if kind in kinds:
            text = _decoded(kinds[kind])
            return text if kind == "text/plain" else plain_text_of(text)
    if elsewhere:
        raise Unread("its text is not inline: the attachment has a URL only")
    raise Unread("no attachment of text/plain or text/html")


_MEDIA = ("text/plain", "text/html", "application/xhtml+xml")
_CHARSET = re.compile(r";\s*charset\s*=\s*\"?([\w.:\-]+)", re.IGNORECASE)


def _decoded(attachment: dict[str, Any]) -> str:
    data = attachment["data"]
    named = _CHARSET.search(str(attachment["contentType"]))
    try:
        raw = b64decode("".join(data.split()), validate=True)
        text = raw.decode(named[1] if named else "utf-8")
        text.encode()  # some codecs give half characters
    except (ValueError, LookupError, AttributeError):  # UnicodeError is a ValueError
        raise Unread("its attachment is not base64, or not text of its charset") from None
    return text.removeprefix("\ufeff")
