"""What went wrong with a site's work, for its own people: it never leaves, in no form.

The audit log and the ledger would not do: the coordinator sees their lengths and hashes.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from silotune.errors import SilotuneError
from silotune.trust.files import require_private

_log = logging.getLogger(__name__)

TROUBLES_FILE = "troubles.jsonl"

_MOST_BLANK, _MOST_DEATHS = 3, 1
_IN_WORDS = {
    "unprepared": "the records could not be made ready",
    "blank": "could not be computed, noise alone was sent",
    "died": "the process died after the charge; the round was done again",
}


class Troubles:
    """The troubles of one run, in a file that all runs share.

    Parameters
    ----------
    state : Path
        The site's state folder.
    run : str
        The run's id.
    """

    def __init__(self, state: Path, *, run: str) -> None:
        self._path, self._run = state / TROUBLES_FILE, run

    def add(self, kind: str, *, round: int, error: BaseException | None = None) -> None:
        """Write one down, durably.

        Parameters
        ----------
        kind : str
            ``unprepared`` (records could not be made ready), ``blank`` (noise alone was sent), or
            ``died`` (a process that worked on a charged round).
        round : int
            Of the run; 0 before the first.
        error : BaseException, optional
            What happened.
        """
        code = error.code if isinstance(error, SilotuneError) else type(error).__name__
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "run": self._run,
            "round": round,
            "kind": kind,
            "error": "" if error is None else code,
            "detail": "" if error is None else str(error)[:500],
        }
        _log.error("round %d: %s", round, kind, exc_info=error)
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            os.write(descriptor, (json.dumps(line) + "\n").encode())
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    @property
    def too_many(self) -> bool:
        """Whether the run has stopped at this site: it failed, or its process died, too often."""
        rounds = {kind: self._count(kind) for kind in ("blank", "died")}
        return rounds["blank"] >= _MOST_BLANK or rounds["died"] > _MOST_DEATHS

    def _count(self, kind: str) -> int:
        found = _lines(self._path)
        return sum((one["run"], one["kind"]) == (self._run, kind) for one in found)


def latest_troubles(state: Path, *, most: int = 5) -> list[dict[str, Any]]:
    """The newest troubles of all runs, oldest first: time, run, round, kind, error, detail."""
    return _lines(state / TROUBLES_FILE)[-most:]


def in_words(trouble: Mapping[str, Any]) -> str:
    """A trouble as the site's people read it."""
    what = _IN_WORDS[trouble["kind"]]
    where = f"round {trouble['round']} of {trouble['run']}" if trouble["round"] else trouble["run"]
    error = f" ({trouble['error']})" if trouble["error"] else ""
    return f"{trouble['time'][:16]}Z, {where}: {what}{error}"


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    require_private(path)
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]
