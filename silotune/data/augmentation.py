"""More versions of a training text, made at the site: words replaced by synonyms, words left out.

A version is a function of its own record, the site's list of synonyms and the site's secret, and of
nothing else: not of other records, their number or their order. It belongs to the unit of its record. So
two datasets that differ in one unit differ in that unit's records and versions only, and what bounds a
unit bounds them together: one draw, at most ``privacy.max_records_per_unit`` of them a step, one clip. A
run costs what it costs without them.

The list must not be made from the records: it would carry one unit's words into another's versions.
"""

from __future__ import annotations

import hmac
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from silotune.errors import DatasetUnreadable
from silotune.plan.sections import Section

_DOMAIN = b"silotune augmentation 1\0"
_PIECE = re.compile(r"\w+|\W+")
_MOST_BYTES = 50_000_000

_REFUSED = {
    "pseudo_labels": "a run labels no records: what a model says of them would change what the next "
    "round trains on. Label them once, with `silotune predict` and a released adapter, and offer them "
    "with their unit (docs/records.md)",
    "back_translation": "a run translates nothing: make the translations once, with a model on this "
    "machine, and offer them as records of their unit (docs/records.md)",
}


class AugmentationConfig(Section):
    """``[datasets.NAME.augmentation]``: more versions of each training text, inside its unit."""

    copies: Annotated[int, Field(ge=1, le=20)] = Field(
        1, description="Versions of each training record, beside itself."
    )
    synonyms: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="A file with words that mean the same on each line, between commas."
    )
    replace: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        0.0, description="Chance that a word with synonyms becomes one of them."
    )
    drop: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.0, description="Chance that a word is left out."
    )

    @model_validator(mode="before")
    @classmethod
    def _nothing_refused(cls, given: Any) -> Any:
        found = [f"{key}: {_REFUSED[key]}" for key in _REFUSED if key in given]
        if found:
            raise ValueError("\n".join(found))
        return given

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.synonyms is None) != (self.replace == 0.0):
            raise ValueError("synonyms and replace belong together: give both or neither")
        if not self.replace and not self.drop:
            raise ValueError("give synonyms with replace, or drop: versions would be copies")
        return self


@dataclass(frozen=True)
class Synonyms:
    """Words and phrases that mean the same.

    Attributes
    ----------
    others : mapping of tuple of str to tuple of str
        For a phrase, as its words in small letters, the other ones of its lines.
    longest : int
        Words of the longest phrase.
    """

    others: Mapping[tuple[str, ...], tuple[str, ...]]
    longest: int

    @classmethod
    def read(cls, path: Path) -> Synonyms:
        """Read a file of synonyms; a line that begins with # is none.

        Raises
        ------
        DatasetUnreadable
            It is missing, too large, or not UTF-8 text.
        """
        try:
            if path.stat().st_size > _MOST_BYTES:
                raise DatasetUnreadable(f"{path}: a list of synonyms has 50 MB at most")
            lines = path.read_text("utf-8-sig").splitlines()
        except OSError as exc:
            raise DatasetUnreadable(f"{path}: {exc.strerror or type(exc).__name__}") from None
        except UnicodeDecodeError:
            raise DatasetUnreadable(f"{path}: not UTF-8 text") from None
        others: dict[tuple[str, ...], dict[str, None]] = {}
        for line in lines:
            group = [phrase.strip() for phrase in line.split(",") if phrase.strip()]
            for phrase in group if not line.startswith("#") else ():
                found = others.setdefault(_words(phrase), {})
                found.update(dict.fromkeys(p for p in group if _words(p) != _words(phrase)))
        others.pop((), None)
        told = {words: tuple(found) for words, found in others.items() if found}
        return cls(told, max(map(len, told), default=0))

    def at(self, words: Sequence[str]) -> tuple[int, tuple[str, ...]]:
        """The longest phrase that these words begin with: how many words it has, and the others."""
        for size in range(min(self.longest, len(words)), 0, -1):
            if found := self.others.get(tuple(words[:size])):
                return size, found
        return 0, ()


def _words(phrase: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\w+", phrase.casefold()))


NO_SYNONYMS = Synonyms({}, 0)


@dataclass(frozen=True)
class Augmentation:
    """Makes versions of texts.

    Attributes
    ----------
    config : AugmentationConfig
        How many, and how far from the text.
    synonyms : Synonyms
        From the site's file.
    key : bytes
        The secret that decides what becomes of a text.
    """

    config: AugmentationConfig
    synonyms: Synonyms
    key: bytes

    @classmethod
    def of(cls, config: AugmentationConfig, *, folder: Path, secret: bytes) -> Augmentation:
        """As site.toml says; raises `DatasetUnreadable` as `Synonyms.read`."""
        synonyms = Synonyms.read(folder / config.synonyms) if config.synonyms else NO_SYNONYMS
        return cls(config, synonyms, hmac.digest(secret, _DOMAIN, sha256))

    @property
    def name(self) -> str:
        """What makes other versions has another name, in hex."""
        told = f"{self.config.model_dump_json()} {sorted(self.synonyms.others.items())!r}"
        return hmac.digest(self.key, told.encode(), sha256).hex()

    def versions(self, text: str) -> Iterator[str]:
        """Versions of a text that differ from it and from each other: at most `copies`."""
        seen = {text}
        for number in range(self.config.copies):
            seed = hmac.digest(self.key, f"{number} {text}".encode(), sha256)
            made = self._version(text, random.Random(seed))  # noqa: S311 - no secret rests on it
            if made not in seen:
                seen.add(made)
                yield made

    def _version(self, text: str, rng: random.Random) -> str:
        pieces = _PIECE.findall(text)
        words = [(place, piece) for place, piece in enumerate(pieces) if piece[0].isalnum()]
        folded = [piece.casefold() for _, piece in words]
        at = 0
        while at < len(words):
            size, others = self.synonyms.at(folded[at:])
            if size and rng.random() < self.config.replace:
                self._put(pieces, words[at][0], words[at + size - 1][0], rng.choice(others))
                at += size
                continue
            if len(words) > 1 and rng.random() < self.config.drop:
                self._put(pieces, words[at][0], words[at][0], "")
            at += 1
        made = re.sub(r"\s+", " ", "".join(pieces)).strip()
        return made if any(sign.isalnum() for sign in made) else text

    @staticmethod
    def _put(pieces: list[str], first: int, last: int, phrase: str) -> None:
        """Put a phrase in the place of some pieces; it begins with a capital if they did."""
        capital = pieces[first][0].isupper() and not pieces[first].isupper()
        pieces[first] = phrase[:1].upper() + phrase[1:] if capital else phrase
        for place in range(first + 1, last + 1):
            pieces[place] = ""
