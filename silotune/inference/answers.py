"""A model's answers to a file of records, each record given back with its answer.

Answers are kept beside the result while they are made, one JSON line each: a killed run goes on behind
the last whole line. Its first line says what they are answers of. When all are there, the input is read
again and written out with them, in one step. Memory holds one block of records at a time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

from silotune.data.table import Table
from silotune.inference.errors import AnswersInTheWay
from silotune.inference.records import Given, examples_of
from silotune.inference.written import Answer, Columns, Revise, output_format, write
from silotune.models.adapter import read_adapter
from silotune.models.prediction import Prediction
from silotune.models.task import LoadedModel
from silotune.version import __version__


@dataclass(frozen=True, kw_only=True)
class Extra:
    """Further columns of an answer.

    Attributes
    ----------
    names : tuple of str
        What they are called.
    of : callable
        Their values, from an example by role and its prediction.
    """

    names: tuple[str, ...]
    of: Callable[[Mapping[str, str], Prediction], Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Answered:
    """What was done.

    Attributes
    ----------
    out : Path
        The file with all records and their answers.
    records, empty, before : int
        Records; those of them that are empty and have no answer; and those that an earlier call had
        answered.
    found : mapping of str to int
        How much was taken out of texts, by label; empty where they stay as they are.
    """

    out: Path
    records: int
    empty: int
    before: int
    found: Mapping[str, int] = field(default_factory=dict)


def fingerprint(model: LoadedModel) -> str:
    """Names a trained model: the plan, and every number that was trained."""
    return sha256(model.plan.sha256.encode() + read_adapter(model).tobytes()).hexdigest()


def answers_to(
    model: LoadedModel,
    examples: Sequence[Mapping[str, str]],
    *,
    extra: Extra | None = None,
) -> list[Answer | None]:
    """The answers to examples by role, one each; None to one of which nothing is given."""
    asked = [example for example in examples if _is_given(example)]
    made = iter(model.task.predict(model, asked) if asked else [])
    found: list[Answer | None] = []
    for example in examples:
        if not _is_given(example):
            found.append(None)
            continue
        answer = next(made)
        shares = dict(answer.probabilities)
        added = {"prediction": answer.output} | ({"probabilities": shares} if shares else {})
        found.append(added | dict(extra.of(example, answer) if extra else {}))
    return found


def _is_given(example: Mapping[str, str]) -> bool:
    return any(text.strip() for text in example.values())


def answer_file(
    model: LoadedModel,
    given: Given,
    out: Path,
    *,
    prefix: str = "",
    extra: Extra | None = None,
    options: Mapping[str, Any] | None = None,
    revise: Revise = lambda block, answers: block,
    force: bool = False,
    started: Callable[[int, int], None] = lambda total, done: None,
    advance: Callable[[int], None] = lambda records: None,
) -> Answered:
    """Write a file's records with the model's answers, in their order and with all their columns.

    Parameters
    ----------
    model : LoadedModel
        What answers.
    given : Given
        The records.
    out : Path
        Ends in .csv, .jsonl or .parquet; written at the end, for its owner only.
    prefix : str
        Before the names of the added columns.
    extra : Extra, optional
        Further columns.
    options : mapping, optional
        What else the answers depend on: those of an earlier call must have had the same.
    revise : callable
        Gives the records that are written, of those that were read and their answers.
    force : bool
        Begin anew, whatever is there.
    started, advance : callable
        Told how many records there are and how many have an answer already, then of each that gets one.

    Raises
    ------
    AnswersInTheWay
        `out` is there, or begun for another model, input or options; or a column would be there twice.
    DatasetUnreadable, ColumnMissing, RecordInvalid, TooFewRecords
        The records can't be read: before the first is answered.
    """
    kind = output_format(out)
    part = out.with_name(f"{out.name}.part")
    if force:
        part.unlink(missing_ok=True)
    elif out.exists():
        raise AnswersInTheWay(f"{out} is there already")
    outline, digest = given.outline(), given.digest
    columns = Columns(
        given=outline.columns,
        labels=() if model.plan.task.each_token else model.plan.model.labels,
        extra=extra.names if extra else (),
        prefix=prefix,
        nested=kind == "jsonl",
    )
    columns.require_new()
    head = {
        "version": __version__,
        "model": fingerprint(model),
        "input": digest,
        "roles": dict(given.roles),
        "images": None if given.images is None else str(given.images.resolve()),
        "options": dict(options or {}),
    }
    with _Begun(part, head) as begun:
        before = begun.answers
        started(outline.records, before)
        for table in _behind(given, before):
            examples = examples_of(table)
            found = answers_to(model, examples, extra=extra)
            begun.append(found)
            advance(len(found))
    if given.digest != digest:
        raise AnswersInTheWay(f"{given.path} was changed while it was answered")
    empty = sum(answer is None for answer in _answers(part))
    write(out, kind, given, columns, lambda: _answers(part), revise=revise)
    part.unlink()
    return Answered(out=out, records=outline.records, empty=empty, before=before)


def _behind(given: Given, answered: int) -> Iterator[Table]:
    """The records behind the first so many, by role."""
    for block in given.read():
        done = min(answered, len(block.rows))
        answered -= done
        if done < len(block.rows):
            table = given.table(block)
            columns = {role: values[done:] for role, values in table.columns.items()}
            yield Table(table.source, table.rows[done:], columns)


class _Begun:
    """The file of answers while they are made: what they are of, then one line each."""

    def __init__(self, path: Path, head: Mapping[str, Any]) -> None:
        self.path, self.answers = path, 0
        self._file: IO[bytes] = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b")
        first = self._file.readline()
        if not first.endswith(b"\n"):
            self._file.truncate(0)
            self._file.seek(0)
            self._file.write(json.dumps(head).encode() + b"\n")
            return
        self._require_same(json.loads(first), head)
        end = self._file.tell()
        for line in self._file:
            if line.endswith(b"\n"):
                self.answers, end = self.answers + 1, end + len(line)
        self._file.truncate(end)  # a killed writer leaves part of a line
        self._file.seek(end)

    def _require_same(self, found: Mapping[str, Any], head: Mapping[str, Any]) -> None:
        other = [key for key in head if found.get(key) != head[key]]
        if other:
            self._file.close()
            raise AnswersInTheWay(
                f"{self.path} was begun with another {' and another '.join(other)}"
            )

    def append(self, answers: Iterable[Answer | None]) -> None:
        for answer in answers:
            self._file.write(json.dumps(answer).encode() + b"\n")
        self._file.flush()

    def __enter__(self) -> _Begun:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _answers(part: Path) -> Iterator[Answer | None]:
    with part.open("rb") as lines:
        next(lines)
        yield from map(json.loads, lines)
