"""What went wrong with a site's work, for its own people: it never leaves, in no form.

The audit log and the ledger would not do: the coordinator sees their lengths and hashes.
"""

from __future__ import annotations

import json
import logging
import os
from datetime import UTC, datetime
from pathlib import Path

from silotune.errors import SilotuneError
from silotune.privacy.durable import require_private

_log = logging.getLogger(__name__)

TROUBLES_FILE = "troubles.jsonl"

_MOST_BLANK, _MOST_DEATHS = 3, 1


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
        if not self._path.exists():
            return 0
        require_private(self._path)
        lines = self._path.read_text(encoding="utf-8").splitlines()
        found = [json.loads(line) for line in lines if line.endswith("}")]
        return sum((one["run"], one["kind"]) == (self._run, kind) for one in found)
