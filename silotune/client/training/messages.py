"""What a site's daemon and its trainer say to each other: frames of JSON and arrays on one socket pair.

A frame is a length of text, a length of arrays, the text, and the arrays as a safetensors file. Each
side knows how long a frame may be before it reads it, and reads the text into one of the models below.
Nothing of a frame is run, and nothing outside the models is looked at.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load, save

from silotune.client.errors import TrainerAnswerInvalid, TrainerDied, TrainerStuck
from silotune.data.values import Rule

Arrays = Mapping[str, NDArray[Any]]

MOST_TEXT = 4 << 20
"""Bytes of a frame's text."""

_LENGTHS = struct.Struct(">IQ")
_PIECE = 1 << 20
_MOST_TOLD, _MOST_PARTS = 500, 64

Word = Annotated[str, Field(max_length=64)]
Told = Annotated[str, Field(max_length=_MOST_TOLD)]
Count = Annotated[int, Field(ge=0, lt=1 << 40)]


class Said(BaseModel):
    """Base of the models: frozen, strict, and with no field that it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


# --- what the daemon asks ---


class Begin(Said):
    """What the process is for. It has no key but that of the records' split.

    Attributes
    ----------
    plan : str
        Canonical JSON.
    site : str
        The part of site.toml that reading needs, as JSON: name, and the one dataset.
    folder, base : str
        Where relative paths start; where the base model is.
    rank : int
        Of the adapter.
    secret : str
        Of the split, in hex; empty for a process that reads no records.
    device, dtype, attention : str
        What to compute with; empty for what is to be chosen.
    trial : bool
        Whether the model is tried on public texts.
    threads : int
        Processor threads; 0 for PyTorch's own choice.
    """

    kind: Literal["begin"] = "begin"
    plan: str
    site: str
    folder: str
    base: str
    rank: int
    secret: str
    device: str
    dtype: str
    attention: str
    trial: bool
    threads: int


class AskLayout(Said):
    """What the adapter consists of, without a weight read."""

    kind: Literal["layout"] = "layout"


class AskLoaded(Said):
    """What the model is once it is loaded."""

    kind: Literal["loaded"] = "loaded"


class AskWeights(Said):
    """The hash of the base model's weights."""

    kind: Literal["weights"] = "weights"


class AskPrepared(Said):
    """Read the records and be ready for rounds with this noise multiplier."""

    kind: Literal["prepare"] = "prepare"
    sigma: float


class AskRound(Said):
    """A round, from the arrays ``adapter`` and what was kept in round `prior`, named ``prior:…``."""

    kind: Literal["round"] = "round"
    round: int
    clip: float | None
    sigma: float
    prior: int | None
    blank: bool


class AskTables(Said):
    """Counts of the array ``adapter``, with what was kept in round `prior`."""

    kind: Literal["tables"] = "tables"
    prior: int | None


class AskLook(Said):
    """Read one dataset, as the doctor asks before any run: no `Begin` comes first.

    Attributes
    ----------
    site, folder : str
        As in `Begin`.
    rule : int
        By which values become text.
    """

    kind: Literal["look"] = "look"
    site: str
    folder: str
    rule: Rule


Question = Begin | AskLayout | AskLoaded | AskWeights | AskPrepared | AskRound | AskTables | AskLook


# --- what the trainer answers ---


class LayerOfIsolation(Said):
    """One protection of the process, in force or not."""

    name: Word
    in_force: bool
    reason: Told


class Begun(Said):
    """The process is confined, and has read its first frame."""

    kind: Literal["begun"] = "begun"
    protections: Annotated[tuple[LayerOfIsolation, ...], Field(max_length=_MOST_PARTS)]


class LayoutFound(Said):
    """A layout, as its canonical text."""

    kind: Literal["layout_found"] = "layout_found"
    layout: str


class ModelLoaded(Said):
    """Layout at the site's rank, and what is computed with."""

    kind: Literal["model_loaded"] = "model_loaded"
    layout: str
    dtype: Word
    device: Word
    attention: Word


class WeightsFound(Said):
    """A hash, in hex."""

    kind: Literal["weights_found"] = "weights_found"
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Prepared(Said):
    """The records were read: how many, what not, and their fingerprint."""

    kind: Literal["prepared"] = "prepared"
    records: Count
    rows_left_out: Count
    left_out: Annotated[tuple[Told, ...], Field(max_length=_MOST_PARTS)]
    fingerprint: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class RoundDone(Said):
    """The array ``flat``, and what is to be kept, named ``kept:…``."""

    kind: Literal["round_done"] = "round_done"
    records: Count


class TablesCounted(Said):
    """Arrays of counts."""

    kind: Literal["tables_counted"] = "tables_counted"


class Looked(Said):
    """How many records there are, and what would be left out."""

    kind: Literal["looked"] = "looked"
    records: Count
    left_out: Annotated[tuple[Told, ...], Field(max_length=_MOST_PARTS)]


class Failed(Said):
    """It went wrong: the error's code, and what the site's own people may read of it."""

    kind: Literal["failed"] = "failed"
    code: Annotated[str, Field(pattern=r"^ST-[0-9]{3}$")]
    error: Word
    detail: Told
    remedy: Told = ""


Answer = (
    Begun
    | LayoutFound
    | ModelLoaded
    | WeightsFound
    | Prepared
    | RoundDone
    | TablesCounted
    | Looked
    | Failed
)

_QUESTIONS: TypeAdapter[Question] = TypeAdapter(Annotated[Question, Field(discriminator="kind")])
_ANSWERS: TypeAdapter[Answer] = TypeAdapter(Annotated[Answer, Field(discriminator="kind")])


# --- frames ---


def told(text: str) -> str:
    """A text as long as a frame may have it."""
    return text[:_MOST_TOLD]


def few(parts: tuple[str, ...]) -> tuple[str, ...]:
    """As many texts as a frame may have, each as long as it may be."""
    return tuple(map(told, parts[:_MOST_PARTS]))


def send(connection: socket.socket, message: Said, arrays: Arrays | None = None) -> None:
    """Send a frame. Raises `OSError` when the other side is gone or too slow."""
    text = message.model_dump_json().encode()
    content = {name: np.ascontiguousarray(array) for name, array in (arrays or {}).items()}
    body = bytes(save(content)) if content else b""
    connection.sendall(_LENGTHS.pack(len(text), len(body)) + text)
    connection.sendall(body)


def receive_question(connection: socket.socket) -> tuple[Question, Arrays] | None:
    """The next question and its arrays, as the daemon sent them; None at the end."""
    lengths = connection.recv(_LENGTHS.size, socket.MSG_WAITALL)
    if len(lengths) < _LENGTHS.size:
        return None
    texts, arrays = _LENGTHS.unpack(lengths)
    text = _exactly(connection, texts, ends=None)
    body = _exactly(connection, arrays, ends=None)
    return _QUESTIONS.validate_json(text), load(bytes(body)) if body else {}


def receive_answer(
    connection: socket.socket, *, most: int, seconds: float
) -> tuple[Answer, Arrays]:
    """The answer to a question, and its arrays, of which nothing but the form is believed.

    Parameters
    ----------
    connection : socket
        The daemon's end.
    most : int
        Bytes that the arrays may have.
    seconds : float
        How long it may take from now until the whole answer is there.

    Raises
    ------
    TrainerDied
        The connection ended.
    TrainerStuck
        The time is over.
    TrainerAnswerInvalid
        It is longer, or of another form.
    """
    ends = time.monotonic() + seconds
    texts, arrays = _LENGTHS.unpack(_exactly(connection, _LENGTHS.size, ends=ends))
    if texts > MOST_TEXT or arrays > most:
        raise TrainerAnswerInvalid(f"it has {texts} and {arrays} bytes")
    text = _exactly(connection, texts, ends=ends)
    body = _exactly(connection, arrays, ends=ends)
    try:
        return _ANSWERS.validate_json(text), load(bytes(body)) if body else {}
    except (ValidationError, SafetensorError, ValueError, KeyError) as exc:
        raise TrainerAnswerInvalid(f"it can't be read: {type(exc).__name__}") from None


def _exactly(connection: socket.socket, size: int, *, ends: float | None) -> bytearray:
    found = bytearray()
    while len(found) < size:
        if ends is not None:
            left = ends - time.monotonic()
            if left <= 0:
                raise TrainerStuck
            connection.settimeout(left)
        try:
            part = connection.recv(min(_PIECE, size - len(found)))
        except TimeoutError:
            raise TrainerStuck from None
        except OSError as exc:
            raise TrainerDied(exc.strerror or str(exc)) from None
        if not part:
            raise TrainerDied
        found += part
    return found
