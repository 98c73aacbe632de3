"""A disk that is full: nothing is charged, nothing leaves, and afterwards all goes on."""

import resource
import signal
from contextlib import contextmanager

from silotune.protocol.envelope import refusal_code
from tests.client.coordinator_double import CoordinatorDouble
from tests.client.site_rig import Rig


@contextmanager
def no_file_beyond(size):
    """Writes past so many bytes of a file fail, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_stops_the_release_and_nothing_is_lost(tmp_path, bert_folder):
    double = CoordinatorDouble(tmp_path / "coordinator")
    with double, Rig(tmp_path / "sites", bert_folder, double) as rig:
        rig.approve()
        assert refusal_code(rig.ask("query.join")) is None
        before = rig.ledger_rows()
        with no_file_beyond(8192):  # room for a stored answer, none for the ledger
            assert (rig.state / "ledger.sqlite").stat().st_size > 8192
            assert refusal_code(rig.ask("train", 1)) == "ST-400"
        assert rig.ledger_rows() == before
        assert list((rig.state / "outbox").glob("*update*")) == []
        assert refusal_code(rig.ask("train", 1)) is None
        charges = [row for row in rig.ledger_rows() if row.entry.kind == "charge"]
        assert len(charges) == 1
        rig.audit.verify()
