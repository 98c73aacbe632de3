"""The round loop: quorum, deadlines, sites that fail, and going on after a crash."""

import json

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from silotune.errors import QuorumLost, RunDirectoryInvalid, SiteReportedError
from silotune.models.layout import ArrayEntry, Layout
from silotune.plan.plan import Plan
from silotune.rounds.rounds import RoundLoop
from silotune.rounds.run_directory import RunDirectory
from silotune.simulation.grid import WorkerGrid
from silotune.simulation.pool import SiteSlot

LAYOUT = Layout(
    (
        ArrayEntry("base_model.model.layer.0.lora_A.weight", (2, 6), "adapter"),
        ArrayEntry("base_model.model.layer.0.lora_B.weight", (6, 2), "adapter"),
        ArrayEntry("head.weight", (2, 6), "head"),
        ArrayEntry("head.bias", (2,), "head"),
    )
)


class ScriptedError(Exception):
    code = "ST-401"


def scripted(payload):
    """Sites that answer as the test says: `faults` maps "site:round" to a kind of trouble."""

    class Program:
        client_app = ClientApp()

        def inspect(self, site_index, request, arrays):
            return {}, {}

    faults = payload["faults"]

    def trouble(context, number):
        kind = faults.get(f"{context.node_config['site']}:{number}")
        if kind == "error":
            raise ScriptedError
        return kind

    @Program.client_app.query("join")
    def join(message, context):
        kind = trouble(context, 0)
        layout = LAYOUT if kind != "layout" else Layout(LAYOUT.entries[:2])
        released = {
            "site": context.node_config["site"],
            "declared_units": 100,
            "layout": layout.to_json(),
        }
        return Message(RecordDict({"released": ConfigRecord(released)}), reply_to=message)

    @Program.client_app.train()
    def train(message, context):
        number = int(message.content["config"]["round"])
        kind = trouble(context, number)
        size = LAYOUT.size if number > payload["head_rounds"] else 14
        rng = np.random.default_rng([number, context.node_config["partition-id"]])
        flat = rng.normal(size=size).astype(np.float32)
        if kind == "nan":
            flat[3] = np.nan
        if kind == "huge":
            flat *= 1e3
        if kind == "short":
            flat = flat[:-1]
        reply = {"update": ArrayRecord({"flat": Array(flat)}), "released": MetricRecord({})}
        return Message(RecordDict(reply), reply_to=message)

    @Program.client_app.evaluate()
    def evaluate(message, context):
        number = int(message.content["config"]["round"])
        trouble(context, f"scores {number}")
        right = float(10 * number + context.node_config["partition-id"])
        counts = Array(np.array([[right, 1.0], [2.0, right]]))
        return Message(RecordDict({"counts": ArrayRecord({"flat": counts})}), reply_to=message)

    return Program()


@pytest.fixture
def play(tmp_path):
    """Run a plan with scripted sites; returns the run directory and what was raised."""

    def run(
        name="run", *, faults=None, rounds=4, min_sites=2, sites=3, stop_after=None, **settings
    ):
        raw = {
            "plan": {"name": "t", "purpose": "t", "seed": 1},
            "model": {"base": "x", "task": "text_classification", "labels": ["a", "b"]},
            "data": {"dataset": "d"},
            "rounds": {"number": rounds, "min_sites": min_sites, "deadline": 20.0},
            "optimizer": {"site": {"head_rounds": 2}},
            "privacy": {"mode": "none", "rate": 0.1},
        }
        plan = Plan.from_mapping(raw).override(settings)
        folder = tmp_path / name
        directory = (
            RunDirectory.open(folder)
            if folder.exists()
            else RunDirectory.create(tmp_path, name, plan_toml="")
        )
        if not folder.exists():
            directory.root.rename(folder)
            directory = RunDirectory(folder)
            directory.write_json("resolved.json", {})
        with WorkerGrid(
            f"{__name__}:scripted",
            {"faults": faults or {}, "head_rounds": plan.optimizer.site.head_rounds},
            [SiteSlot(f"s{i}") for i in range(sites)],
            workers=0,
        ) as grid:

            class Stop:
                def after_round(self, server_round, adapter, *, seconds):
                    if server_round == stop_after:
                        raise KeyboardInterrupt

            loop = RoundLoop(plan=plan, run=name, grid=grid, store=directory, observer=Stop())
            return directory, loop.execute()

    return run


def events(directory, kind):
    return [event for event in directory.events if event["event"] == kind]


def test_an_update_unlike_the_others_gets_a_high_score_and_three_sites_get_none(play):
    directory, _ = play("five", sites=5, faults={"s3:2": "huge"}, rounds=3)
    first, second, _ = [event["anomaly"] for event in events(directory, "round_finished")]
    assert set(first) == {f"s{i}" for i in range(5)}
    assert max(first.values()) < 5.0
    assert second["s3"] > 5.0
    assert max(score for site, score in second.items() if site != "s3") < 5.0
    few, _ = play("three", rounds=3)
    assert "anomaly" not in events(few, "round_finished")[0]


def test_a_run_keeps_every_round_and_ends_with_its_adapter(play):
    directory, adapter = play()
    assert directory.adapter_rounds() == [1, 2, 3, 4]
    saved = LAYOUT.pack(directory.load_adapter(4))
    assert saved.tobytes() == adapter.tobytes()
    assert [e["phase"] for e in events(directory, "round_started")] == ["head"] * 2 + [
        "adapter"
    ] * 2
    (end,) = events(directory, "run_finished")
    assert end["rounds"] == 4
    assert len(events(directory, "site_replied")) == 12


def test_bytes_and_times_of_a_round_add_up(play):
    directory, _ = play()
    for event in events(directory, "round_finished"):
        values = 14 if event["round"] <= 2 else LAYOUT.size
        assert event["bytes_up"] == 3 * 4 * values
        assert event["bytes_down"] == 3 * LAYOUT.nbytes
        assert event["wait_seconds"] + event["aggregate_seconds"] == pytest.approx(
            event["seconds"], rel=1e-6
        )


def test_an_interrupted_run_goes_on_to_the_same_adapter_bit_for_bit(play):
    _, whole = play("whole")
    with pytest.raises(KeyboardInterrupt):
        play("halved", stop_after=2)
    directory, adapter = play("halved")
    assert adapter.tobytes() == whole.tobytes()
    (resumed,) = events(directory, "run_resumed")
    assert resumed["from_round"] == 2
    assert [e["round"] for e in events(directory, "round_started")] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("instant", "number"), [("round_finished", 2), ("evaluated", 4), ("round_started", 3)]
)
def test_metrics_that_a_crash_took_are_asked_again_and_others_are_not(
    play, monkeypatch, instant, number
):
    """The loop dies before it writes an event; the last instant comes after round 2's metrics."""
    settings = {"rounds.evaluate_every": 2}
    whole, _ = play("whole", **settings)
    write = RunDirectory.append_event

    def dying(self, kind, **fields):
        if (kind, fields.get("round")) == (instant, number):
            raise KeyboardInterrupt
        return write(self, kind, **fields)

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "append_event", dying)
        with pytest.raises(KeyboardInterrupt):
            play("halved", **settings)
    halved, _ = play("halved", **settings)
    wanted = [(e["round"], e["pooled"]) for e in events(whole, "evaluated")]
    assert [number for number, _ in wanted] == [2, 4]
    assert [(e["round"], e["pooled"]) for e in events(halved, "evaluated")] == wanted


def test_a_checkpoint_of_another_plan_is_refused(play):
    with pytest.raises(KeyboardInterrupt):
        play("mixed", stop_after=2)
    with pytest.raises(RunDirectoryInvalid, match="another plan"):
        play("mixed", **{"lora.r": 3})


def test_a_failing_site_is_left_out_of_the_round_and_asked_again_in_the_next(play):
    directory, _ = play(faults={"s1:2": "error"})
    (failed,) = events(directory, "site_failed")
    assert (failed["site"], failed["round"], failed["code"]) == ("s1", 2, "ST-401")
    assert sum(e["site"] == "s1" for e in events(directory, "site_replied")) == 3


@pytest.mark.parametrize("kind", ["nan", "short"])
def test_a_bad_update_counts_as_a_failure_and_names_the_site(play, kind):
    directory, adapter = play(faults={"s2:3": kind})
    (failed,) = events(directory, "site_failed")
    assert (failed["site"], failed["code"]) == ("s2", "ST-603")
    assert np.isfinite(adapter).all()


def test_below_the_quorum_the_run_stops_and_can_be_resumed(play):
    faults = {"s1:3": "error", "s2:3": "error"}
    with pytest.raises(QuorumLost, match=r"1 of 3 sites.*ST-401, ST-401"):
        play("quorum", faults=faults)
    directory, adapter = play("quorum")
    _, whole = play("whole")
    assert adapter.tobytes() == whole.tobytes()
    assert events(directory, "run_resumed")


def test_a_site_that_refuses_to_join_is_not_waited_for(play):
    directory, _ = play(faults={"s0:0": "error"})
    (refused,) = events(directory, "site_refused")
    assert refused["code"] == "ST-401"
    assert events(directory, "round_started")[0]["cohort"] == ["s1", "s2"]


def test_if_all_refuse_for_one_reason_that_reason_is_the_error(play):
    faults = {f"s{i}:0": "error" for i in range(3)}
    with pytest.raises(SiteReportedError, match="every site refused to join with ST-401"):
        play(faults=faults)


def test_sites_with_another_model_are_found_out_before_the_first_round(play):
    with pytest.raises(SiteReportedError, match="different adapter layouts"):
        play(faults={"s1:0": "layout"})


def test_the_adapter_does_not_depend_on_which_message_comes_first(play):
    _, one = play("one", sites=5)
    _, other = play("other", sites=5)
    assert one.tobytes() == other.tobytes()


def test_events_are_json_lines_that_survive_reading(play):
    directory, _ = play()
    lines = (directory.root / "events.jsonl").read_text().splitlines()
    assert all(json.loads(line)["time"] > 0 for line in lines)


def test_a_site_that_refused_or_gave_no_scores_is_left_out_of_that_figure_and_the_run_finishes(
    play,
):
    faults = {"s0:0": "error", "s2:scores 2": "error"}
    directory, _ = play(faults=faults, sites=4, **{"rounds.evaluate_every": 2})
    second, fourth = events(directory, "evaluated")
    assert second["left_out"] == ["s2"]
    assert "left_out" not in fourth
    right = 2 * (21.0 + 23.0)  # of sites s1 and s3, which have three wrong each
    assert second["pooled"]["accuracy"] == pytest.approx(right / (right + 6.0))
    assert events(directory, "run_finished")


def test_a_round_asks_the_sites_that_are_drawn_for_it_and_no_other(play):
    settings = {"rounds.sites": 3, "rounds.evaluate_every": 2}
    directory, _ = play(sites=7, rounds=6, **settings)
    cohorts = [set(e["cohort"]) for e in events(directory, "round_started")]
    assert [len(cohort) for cohort in cohorts] == [3] * 6
    assert len(set().union(*cohorts)) > 3
    for number, cohort in enumerate(cohorts, start=1):
        replied = {e["site"] for e in events(directory, "site_replied") if e["round"] == number}
        assert replied == cohort
    for event in events(directory, "evaluated"):
        asked = cohorts[event["round"] - 1]
        right = sum(2 * (10.0 * event["round"] + int(site[1:])) for site in asked)
        assert event["pooled"]["accuracy"] == pytest.approx(right / (right + 9.0))


def test_with_drawn_sites_an_interrupted_run_goes_on_to_the_same_adapter_bit_for_bit(play):
    settings = {"rounds.sites": 2, "plan.seed": None}
    whole, adapter = play("same", sites=5, **settings)
    wanted = [e["cohort"] for e in events(whole, "round_started")]
    whole.root.rename(whole.root.with_name("before"))
    with pytest.raises(KeyboardInterrupt):
        play("same", sites=5, stop_after=2, **settings)
    directory, again = play("same", sites=5, **settings)
    assert [e["cohort"] for e in events(directory, "round_started")] == wanted
    assert again.tobytes() == adapter.tobytes()


def test_a_drawn_site_that_fails_is_not_made_up_for_and_min_sites_holds_for_those_that_answer(play):
    drawn = {"rounds.sites": 2}
    cohort = events(play("probe", sites=5, rounds=2, **drawn)[0], "round_started")[0]["cohort"]
    faults = {f"{cohort[0]}:1": "error"}
    directory, _ = play("one", sites=5, min_sites=1, faults=faults, **drawn)
    assert [e["site"] for e in events(directory, "site_replied") if e["round"] == 1] == cohort[1:]
    with pytest.raises(QuorumLost, match="1 of 2 sites"):
        play("none", sites=5, min_sites=2, faults=faults, **drawn)


def test_with_fewer_sites_in_the_run_than_a_round_may_ask_all_are_asked(play):
    directory, _ = play(sites=4, faults={"s0:0": "error"}, **{"rounds.sites": 4})
    assert [e["cohort"] for e in events(directory, "round_started")] == [["s1", "s2", "s3"]] * 4
