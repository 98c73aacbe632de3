"""Messages under way as builds before this one stored them: rows of Flower's, and a file an object.

A link database outlives an upgrade. What it holds is read once, kept anew by
`silotune.flower.link_messages`, and removed.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import Message, RecordDict
from flwr.app.message.message import make_message
from flwr.app.metadata import Metadata
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.supercore.utils import int64_to_uint64

from silotune.errors import SilotuneError
from silotune.flower import messages
from silotune.flower.link_messages import Instruction, Seals
from silotune.flower.message_frames import Parts, apart

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EarlierMessages:
    """Iterate to read them; `remove` them once they are kept elsewhere."""

    state: Any
    folder: Path
    vault: Seals

    def __iter__(self) -> Iterator[tuple[Instruction, Parts, Parts | None]]:
        rows = self.state.query("SELECT * FROM message_ins ORDER BY created_at")
        if not rows:
            return
        objects = self._objects()
        answers = {
            row["reply_to_message_id"]: row["message_id"]
            for row in self.state.query("SELECT message_id, reply_to_message_id FROM message_res")
        }
        for row in rows:
            told = _told(row)
            asked = _inflated(told.message_id, objects)
            answer = _inflated(answers.get(told.message_id, ""), objects)
            if asked is None and answer is None:
                continue  # fetched and not answered: it is sent again, and recalled if worked out
            message = make_message(_metadata(told), asked.content if asked else RecordDict())
            yield told, apart(message), apart(answer) if answer else None

    def remove(self) -> None:
        """Leave nothing of them."""
        self.state.query("DELETE FROM message_res")
        self.state.query("DELETE FROM message_ins")
        if self.folder.exists():
            shutil.rmtree(self.folder)

    def _objects(self) -> Mapping[str, bytes]:
        found = dict[str, bytes]()
        for path in self.folder.iterdir() if self.folder.exists() else ():
            name = path.name.partition("-")[2]
            try:
                found[name] = self.vault.unseal(path.read_bytes(), name=name)
            except SilotuneError:
                _log.info("an object under way was cut off by a crash: it is asked for again")
        return found


def _told(row: Mapping[str, Any]) -> Instruction:
    return Instruction(
        message_id=row["message_id"],
        run_id=int64_to_uint64(row["run_id"]),
        node=int64_to_uint64(row["dst_node_id"]),
        kind=row["message_type"],
        group=row["group_id"],
        created_at=row["created_at"],
        ttl=row["ttl"],
    )


def _metadata(told: Instruction) -> Metadata:
    ids = (told.run_id, told.message_id, SUPERLINK_NODE_ID, told.node, "")
    return Metadata(*ids, told.group, told.created_at, told.ttl, told.kind)


def _inflated(root: str, objects: Mapping[str, bytes]) -> Message | None:
    """A message of objects; None if parts of it are missing."""
    try:
        return messages.unpack(root, objects)
    except Exception:  # Flower raises whatever it meets; all of it means that this is no message
        return None
