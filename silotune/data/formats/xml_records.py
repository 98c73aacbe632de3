"""Elements of large XML files one after the other, in bounded memory, from writers nobody has to trust.

A document type declaration is refused wherever it stands: without one there are no entities, so none
can grow, and none can name another file. What a record may hold and how deep it may go is bounded, and
so is what a single tag may take.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import BinaryIO
from xml.etree.ElementTree import Element
from xml.parsers import expat

from silotune.errors import DatasetUnreadable

_CHUNK = 2**16
MOST_TEXT = 64 * 2**20
MOST_ELEMENTS = 1_000_000
DEEPEST = 200


class XmlBroken(Exception):
    """A file that is not well-formed from some line on, or beyond a bound."""


def records(
    path: Path, stream: BinaryIO, within: Collection[str], *, root: bool = False
) -> Iterator[tuple[Element, Element | None]]:
    """Each child of some elements, whole, as soon as it is closed.

    Parameters
    ----------
    path : Path
        The file, as messages name it.
    stream : binary file
        Its content.
    within : collection of str
        Names of the elements whose children are records, without namespaces. One that is a child of
        another is not a record but holds records.
    root : bool
        Whether the children of the root are records, too.

    Yields
    ------
    tuple of Element and Element or None
        The open element (its name and attributes only) and one of its children; once before the first
        child with None in its place. Names are without namespaces.

    Raises
    ------
    DatasetUnreadable
        The file has a document type declaration.
    XmlBroken
        It is not well-formed, or beyond a bound; what was read until there was yielded.
    """
    builder = _Builder(path, frozenset(within), root=root)
    parser = expat.ParserCreate(namespace_separator=" ")
    parser.buffer_text = True
    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    parser.StartDoctypeDeclHandler = builder.refuse_doctype
    read = 0
    while True:
        chunk = stream.read(_CHUNK)
        read += len(chunk)
        try:
            parser.Parse(chunk, not chunk)
        except expat.ExpatError as exc:
            yield from builder.taken()
            raise XmlBroken(f"not well-formed XML from line {exc.lineno}") from None
        except (LookupError, ValueError):
            raise XmlBroken("of an encoding that can't be read; write it as UTF-8") from None
        except XmlBroken as exc:
            yield from builder.taken()
            raise XmlBroken(f"{exc} at line {parser.CurrentLineNumber}") from None
        yield from builder.taken()
        if read - parser.CurrentByteIndex > MOST_TEXT:  # one tag or comment that does not end
            raise XmlBroken(f"a tag of more than {MOST_TEXT // 2**20} MiB")
        if not chunk:
            return


class _Builder:
    """Builds the elements below some others, and forgets what was taken."""

    def __init__(self, path: Path, within: frozenset[str], *, root: bool) -> None:
        self._path, self._within, self._root = path, within, root
        self._names: list[str] = []
        self._holder: Element | None = None
        self._holder_depth = 0
        self._open: list[Element] = []
        self._done: list[tuple[Element, Element | None]] = []
        self._text: list[str] = []
        self._size = self._elements = 0

    def taken(self) -> list[tuple[Element, Element | None]]:
        """What was finished since the last call."""
        done, self._done = self._done, []
        return done

    def refuse_doctype(self, *_: object) -> None:
        raise DatasetUnreadable(
            f"{self._path} declares a document type (DOCTYPE), which may expand or read other files",
            remedy="None of these formats needs one: ask where the file comes from.",
        )

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        name = tag.rpartition(" ")[2]
        self._names.append(name)
        if len(self._names) > DEEPEST:
            raise XmlBroken(f"elements nested more than {DEEPEST} deep")
        holds = name in self._within or (self._root and len(self._names) == 1)
        if self._open or (self._holder is not None and not holds):
            self._begin(name, attributes)
        elif holds:
            self._holder = Element(name, _plain(attributes))
            self._holder_depth = len(self._names)
            self._done.append((self._holder, None))

    def _begin(self, name: str, attributes: dict[str, str]) -> None:
        self._flush()
        self._elements += 1
        self._size += sum(map(len, attributes.values()))
        self._check()
        element = Element(name, _plain(attributes))
        if self._open:
            self._open[-1].append(element)
        self._open.append(element)

    def end(self, tag: str) -> None:
        del tag
        depth = len(self._names)
        self._names.pop()
        if self._open:
            self._flush()
            element = self._open.pop()
            if not self._open:
                assert self._holder is not None
                self._done.append((self._holder, element))
                self._size = self._elements = 0
        elif self._holder is not None and depth == self._holder_depth:
            self._holder = None

    def data(self, text: str) -> None:
        if self._open:
            self._text.append(text)
            self._size += len(text)
            self._check()

    def _flush(self) -> None:
        """Put text where it stands: in front of an element's children, or behind the last of them."""
        if not self._text:
            return
        text, self._text = "".join(self._text), []
        holder = self._open[-1]
        if len(holder):
            holder[-1].tail = (holder[-1].tail or "") + text
        else:
            holder.text = (holder.text or "") + text

    def _check(self) -> None:
        if self._size > MOST_TEXT or self._elements > MOST_ELEMENTS:
            raise XmlBroken("a record of more than 64 MiB or a million elements")


def _plain(attributes: dict[str, str]) -> dict[str, str]:
    return {name.rpartition(" ")[2]: value for name, value in attributes.items()}


def text_at(element: Element, path: str) -> str:
    """The text at a path below an element (``A/B``, ``A/@attribute``), empty if there is none."""
    place, at, attribute = path.rpartition("@")
    if at and (not place or place.endswith("/")):
        found = element.find(place.rstrip("/")) if place else element
        return "" if found is None else found.get(attribute, "").strip()
    found = element.find(path)
    return "" if found is None else text_of_element(found)


def text_of_element(element: Element) -> str:
    """All text of an element and of those in it, without spaces around it."""
    return "".join(element.itertext()).strip()
