"""Promise 6: crash anywhere; nothing is lost, everything is counted."""

from silotune.privacy.ledger import Ledger
from silotune.simulation.run import Settings, simulate
from tests.federation import PRIVATE, SITES
from tests.forked import FORKS
from tests.whole_run import final, go_on


def _simulate(plan_path, runs, told):
    def listener(event):
        told.send((event["event"], event.get("round")))

    settings = Settings(workers=2)
    simulate(plan_path, runs=runs, settings=settings, listener=listener, overrides=PRIVATE)


def test_a_run_killed_in_a_round_is_resumed_to_the_same_adapter(federation, whole):
    runs = federation.folder / "killed"
    ours, theirs = FORKS.Pipe(duplex=False)
    process = FORKS.Process(target=_simulate, args=(federation.plan_path, runs, theirs))
    process.start()
    theirs.close()
    while ours.recv() != ("site_replied", 4):
        pass
    process.kill()
    process.join()
    (path,) = runs.iterdir()
    directory = go_on(path)
    assert final(directory) == final(whole[0])
    (again,) = [e for e in directory.events if e["event"] == "run_resumed"]
    assert again["from_round"] == 3
    # Sites that had answered before the kill answered from their outbox: one charge a round.
    for site in SITES:
        ledger = Ledger(directory.site(site) / "ledger.sqlite", create=False)
        assert len(ledger.events("notes")) == 5
        ledger.verify()
        ledger.close()
