"""Runs over the real wire, in one process: proposals, quorum, pause, stop, restart."""

from collections import Counter

import numpy as np
import pytest
from flwr.app import ConfigRecord, RecordDict

from silotune.errors import AdapterMismatch, RunError
from silotune.models.layout import arrays_sha256, initial_adapter
from silotune.models.start import start_adapter
from silotune.protocol.envelope import refusal
from silotune.server.errors import NotPossibleNow
from silotune.strategies import strategy_for
from silotune.strategies.base import Terms
from tests.server.coordinator_material import LAYOUT, scripted, small_plan, town
from tests.server.fleet_site import approve_all, wait_for

__all__ = ["town"]


def state_of(town, run):
    return town.coordinator.run_control.runs.get(run)["state"]


def finished(town, run):
    over = {"finished", "failed", "stopped", "paused"}
    wait_for(lambda: state_of(town, run) in over, seconds=60, what="the end of the run")
    return state_of(town, run)


def events(town, run, kind):
    found = town.coordinator.run_control.runs.events(run)
    return [event.fields for event in found if event.event == kind]


def final_adapter(town, run):
    return LAYOUT.pack(town.coordinator.run_control.runs.newest_adapter(run)[2])


def expected_adapter(plan, names, *, late=(), since=0):
    """What the rounds come to, computed in a plain loop without messages; `late` sites come later."""
    strategy = strategy_for(plan, layout=LAYOUT)
    adapter = initial_adapter(LAYOUT, plan)
    for number in range(1, plan.rounds.number + 1):
        there = [*names, *late] if number >= since else names
        terms = [Terms(node=i, site=name, declared_units=100) for i, name in enumerate(there, 1)]
        strategy.cohort = {each.node: each for each in terms}
        strategy.begin(number, adapter)
        for each in terms:
            rng = np.random.default_rng([number, sum(each.site.encode())])
            strategy.fold(each, rng.normal(size=LAYOUT.size).astype(np.float32))
        adapter = strategy.finish(adapter, server_round=number)
    return adapter


def test_a_proposed_plan_runs_when_all_sites_approve_and_gives_the_expected_adapter(town):
    sites = town.serving("alpha", "beta", "gamma")
    plan = small_plan()
    run = town.coordinator.run_control.propose(plan)
    assert state_of(town, run) == "proposed"
    approve_all(town.coordinator, run, sites)
    assert finished(town, run) == "finished"
    names = ["alpha", "beta", "gamma"]
    assert final_adapter(town, run).tobytes() == expected_adapter(plan, names).tobytes()
    assert [e["round"] for e in events(town, run, "round_finished")] == [1, 2, 3]
    assert all(site.seen.count((run, n, "train")) == 1 for site in sites for n in (1, 2, 3))


def test_nothing_is_left_in_the_link_when_a_run_is_over(town):
    sites = town.serving("alpha", "beta")
    run = town.coordinator.run_control.propose(small_plan())
    approve_all(town.coordinator, run, sites)
    finished(town, run)
    link = town.coordinator.link
    wait_for(
        lambda: link.find_run(int(town.coordinator.run_control.runs.get(run)["link_run"])) is None
    )
    for table in ("silotune_instructions", "silotune_replies"):
        assert link._state.query(f"SELECT COUNT(*) AS n FROM {table}")[0]["n"] == 0
    assert list(town.home.link_database.with_suffix(".pieces").iterdir()) == []


def test_a_quorum_starts_without_the_undecided(town):
    sites = town.serving("alpha", "beta", "gamma")
    run = town.coordinator.run_control.propose(small_plan(), quorum=2)
    approve_all(town.coordinator, run, sites[:2])
    assert finished(town, run) == "finished"
    assert events(town, run, "round_started")[0]["cohort"] == ["alpha", "beta"]
    assert sites[2].seen == []


@pytest.mark.parametrize("online", [2, 3])
def test_a_site_that_approves_in_a_run_takes_part_from_the_next_round_on(town, online):
    """In round 2 gamma approves, and in that round or the next its daemon is there."""
    gamma = town.enrolled("gamma")

    def work(address, content):
        if (address.kind, address.round) == ("train", 2):
            approve_all(town.coordinator, run, [gamma])
        if (address.kind, address.round) == ("train", online):
            gamma.activate().serve(scripted("gamma"))
        return scripted("alpha")(address, content)

    plan = small_plan(**{"rounds.number": 5})
    alpha = town.enrolled("alpha").activate()
    (beta,) = town.serving("beta")
    run = town.coordinator.run_control.propose(plan, quorum=2)
    alpha.serve(work)
    approve_all(town.coordinator, run, [alpha, beta])
    assert finished(town, run) == "finished"
    rounds = {1, 2, 3, 4, 5}
    assert {n for _, n, kind in gamma.seen if kind == "train"} == rounds - set(range(1, online + 1))
    wanted = expected_adapter(plan, ["alpha", "beta"], late=["gamma"], since=online + 1)
    assert final_adapter(town, run).tobytes() == wanted.tobytes()
    for site in (alpha, beta):
        assert [site.seen.count((run, n, "train")) for n in sorted(rounds)] == [1] * 5


def test_a_site_that_refuses_to_join_is_not_asked_again_after_each_round(town):
    def refuses(address, content):
        return refusal("ST-501")

    gamma = town.enrolled("gamma").activate().serve(refuses)
    sites = town.serving("alpha", "beta")
    run = town.coordinator.run_control.propose(small_plan())
    approve_all(town.coordinator, run, [*sites, gamma])
    assert finished(town, run) == "finished"
    assert gamma.seen == [(run, 0, "query.join")]
    assert events(town, run, "run_resumed") == []


def test_a_run_with_too_many_rejections_fails_and_says_why(town):
    sites = town.serving("alpha", "beta", "gamma")
    run = town.coordinator.run_control.propose(small_plan())
    digest = town.coordinator.run_control.runs.get(run)["plan_sha256"]
    approve_all(town.coordinator, run, sites[:1])
    for site in sites[1:]:
        reply = site.decide(run, digest, "rejected", reason="epsilon is too large")
        assert reply.status_code == 200
    row = town.coordinator.run_control.runs.get(run)
    assert (row["state"], row["code"]) == ("failed", "ST-623")
    assert "beta: epsilon is too large; gamma: epsilon is too large" in row["detail"]


def test_a_decision_counts_only_for_its_plan_its_site_and_with_its_signature(town):
    alpha, beta = town.serving("alpha", "beta")
    run = town.coordinator.run_control.propose(small_plan())
    digest = town.coordinator.run_control.runs.get(run)["plan_sha256"]
    assert alpha.decide(run, "0" * 64).status_code == 409
    assert alpha.decide(run, digest, site="beta").status_code == 409
    assert alpha.decide("other-run", digest).status_code == 409
    alpha.signing, real = beta.signing, alpha.signing
    assert alpha.decide(run, digest).status_code == 409
    alpha.signing = real
    assert town.coordinator.run_control.runs.decisions(run) == {}
    assert alpha.decide(run, digest).status_code == 200


def test_plans_for_more_sites_than_there_are_are_not_proposed(town):
    town.enrolled("alpha")
    with pytest.raises(RunError, match="1 active sites, the plan needs 2"):
        town.coordinator.run_control.propose(small_plan())


def test_a_paused_run_stops_between_rounds_and_goes_on_to_the_same_adapter(town):
    sites = [town.enrolled(name).activate() for name in ("alpha", "beta")]
    plan = small_plan(**{"rounds.number": 4})
    run_control = town.coordinator.run_control
    run = run_control.propose(plan)
    pausing = {"done": False}

    def pause_in_round_two(name):
        plain = scripted(name)

        def work(address, content):
            if address.round == 2 and not pausing["done"]:
                pausing["done"] = True
                run_control.pause(run)
            return plain(address, content)

        return work

    for site in sites:
        site.serve(pause_in_round_two(site.name))
    approve_all(town.coordinator, run, sites)
    wait_for(lambda: run_control.runs.get(run)["round"] == 2, what="round 2")
    assert state_of(town, run) == "paused"
    assert {n for _, n, _ in sites[0].seen} == {0, 1, 2}
    run_control.resume(run)
    assert finished(town, run) == "finished"
    assert final_adapter(town, run).tobytes() == expected_adapter(plan, ["alpha", "beta"]).tobytes()


def test_a_stopped_run_ends_at_once_and_cannot_be_resumed(town):
    alpha, beta = town.serving("alpha"), town.enrolled("beta").activate()
    run = town.coordinator.run_control.propose(small_plan())
    approve_all(town.coordinator, run, [*alpha, beta])  # beta is there and never answers
    wait_for(lambda: alpha[0].seen, what="the first message")
    town.coordinator.run_control.stop(run)
    wait_for(lambda: run not in town.coordinator.run_control._active, seconds=5, what="the end")
    assert state_of(town, run) == "stopped"
    with pytest.raises(NotPossibleNow, match="is stopped"):
        town.coordinator.run_control.resume(run)


def test_a_restarted_coordinator_goes_on_and_asks_nobody_twice(town):
    sites = town.serving("alpha", "beta", "gamma")
    plan = small_plan(**{"rounds.number": 6})
    run = town.coordinator.run_control.propose(plan)
    approve_all(town.coordinator, run, sites)
    wait_for(lambda: town.coordinator.run_control.runs.get(run)["round"] >= 2, what="round 2")
    town.restart()
    assert finished(town, run) == "finished"
    names = ["alpha", "beta", "gamma"]
    assert final_adapter(town, run).tobytes() == expected_adapter(plan, names).tobytes()
    for site in sites:
        trained = Counter(n for _, n, kind in site.seen if kind == "train")
        assert set(trained) == {1, 2, 3, 4, 5, 6}
        # Only an answer that broke off with the coordinator's end is asked for once more.
        trained.subtract(n for _, n, kind in site.broken if kind == "train")
        assert max(trained.values()) == 1


def test_after_a_failed_round_the_sites_that_answered_are_not_asked_again(town):
    alpha, beta = town.enrolled("alpha").activate(), town.enrolled("beta").activate()
    refusing = {"on": True}

    def sometimes(address, content):
        if address.kind == "train" and refusing["on"]:
            return refusal("ST-401")
        return scripted("beta")(address, content)

    alpha.serve(scripted("alpha"))
    beta.serve(sometimes)
    plan = small_plan()
    run = town.coordinator.run_control.propose(plan)
    approve_all(town.coordinator, run, [alpha, beta])
    assert finished(town, run) == "failed"
    row = town.coordinator.run_control.runs.get(run)
    assert row["code"] == "ST-601" and "ST-401" in row["detail"]
    refusing["on"] = False
    town.coordinator.run_control.resume(run)
    assert finished(town, run) == "finished"
    assert [n for _, n, kind in alpha.seen if kind == "train"] == [1, 2, 3]
    assert [n for _, n, kind in beta.seen if kind == "train"] == [1, 1, 2, 3]
    assert final_adapter(town, run).tobytes() == expected_adapter(plan, ["alpha", "beta"]).tobytes()


def test_a_site_that_begins_a_new_session_in_a_round_is_asked_again_at_once(town):
    (alpha,) = town.serving("alpha")
    beta = town.enrolled("beta").activate()
    plan = small_plan()
    run = town.coordinator.run_control.propose(plan)
    approve_all(town.coordinator, run, [alpha, beta])
    assert wait_for(lambda: beta.step(scripted("beta"))).kind == "query.join"
    lost = wait_for(beta.pull)
    beta.get(lost)  # taken, and then the power fails
    beta.session = "f" * 32
    beta.activate().serve(scripted("beta"))
    assert finished(town, run) == "finished"
    assert final_adapter(town, run).tobytes() == expected_adapter(plan, ["alpha", "beta"]).tobytes()


def test_a_message_whose_delivery_was_lost_is_delivered_again(town):
    (alpha,) = town.serving("alpha")
    beta = town.enrolled("beta").activate()
    run = town.coordinator.run_control.propose(small_plan())
    approve_all(town.coordinator, run, [alpha, beta])
    lost = wait_for(beta.pull)  # the response never reached the site's disk
    assert wait_for(beta.pull).head == lost.head


def test_a_site_that_is_silent_too_long_is_left_out_with_its_code(town):
    text = town.home.config_path.read_text()
    town.home.config_path.write_text(text.replace("patience = 60.0", "patience = 0.5"))
    town.restart()
    alpha, beta = town.serving("alpha", "beta")
    gamma = town.enrolled("gamma").activate()
    run = town.coordinator.run_control.propose(small_plan())
    approve_all(town.coordinator, run, [alpha, beta, gamma])
    wait_for(lambda: gamma.step(scripted("gamma")), what="the join message")
    gamma.silent = True
    town.coordinator.link.deactivate(gamma.node)
    assert finished(town, run) == "finished"
    failed = events(town, run, "site_failed")
    assert [(e["round"], e["site"], e["code"]) for e in failed[:1]] == [(1, "gamma", "ST-620")]


def test_a_reply_that_its_site_did_not_sign_for_this_place_is_not_folded(town):
    (alpha,) = town.serving("alpha")
    beta = town.enrolled("beta").activate()
    run = town.coordinator.run_control.propose(small_plan())
    approve_all(town.coordinator, run, [alpha, beta])
    wait_for(lambda: beta.step(scripted("beta")), what="the join message")
    message = beta.get(wait_for(beta.pull))
    content = RecordDict({"released": ConfigRecord({"x": 1})})
    beta.send(beta.reply_to(message, content, round=2))
    assert finished(town, run) == "failed"
    failed = events(town, run, "site_failed")
    assert [(e["site"], e["code"]) for e in failed] == [("beta", "ST-804")]
    assert town.audit("alarm")[0]["what"] == "reply_not_trusted"


def test_a_run_goes_on_with_the_adapter_of_an_earlier_one_by_its_hash(town):
    sites = town.serving("alpha", "beta", "gamma")
    control = town.coordinator.run_control
    first = control.propose(small_plan())
    approve_all(town.coordinator, first, sites)
    assert finished(town, first) == "finished"
    sha256 = arrays_sha256(control.runs.newest_adapter(first)[2])
    start = {"adapter": first, "sha256": sha256}
    with pytest.raises(AdapterMismatch, match=sha256):
        control.propose(small_plan(**{"lora.start": start | {"sha256": "0" * 64}}))
    with pytest.raises(AdapterMismatch, match=r"lora\.alpha"):
        control.propose(small_plan(**{"lora.start": start, "lora.alpha": 3.0}))
    plan = small_plan(**{"lora.start": start})
    begun = start_adapter(LAYOUT, plan, find=control.runs.find_start)
    assert np.array_equal(begun, final_adapter(town, first))
    second = control.propose(plan)
    approve_all(town.coordinator, second, sites)
    assert finished(town, second) == "finished"
    fresh = initial_adapter(LAYOUT, plan)
    moved = expected_adapter(plan, ["alpha", "beta", "gamma"]) - fresh
    np.testing.assert_allclose(final_adapter(town, second), begun + moved, atol=1e-6)
