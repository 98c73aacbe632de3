"""The progress display follows the events: live in a terminal, a line a round elsewhere."""

import re

import pytest

from silotune.rounds.run_directory import RunDirectory
from silotune.simulation.progress import Progress
from tests.consoles import console
from tests.simulation.synthetic_run import VARIANTS, Synthetic


@pytest.fixture(scope="module")
def events(tmp_path_factory):
    """Events of a variant, their times made to be two seconds a round."""

    def get(name, **more):
        root = Synthetic(**{**VARIANTS[name], **more}).write(tmp_path_factory.mktemp(name))
        clock, told = 1000.0, []
        for event in RunDirectory(root).events:
            clock += 2.0 if event["event"] == "round_finished" else 0.0
            told.append({**event, "time": clock})
        return told

    return get


def lines_of(events):
    with Progress(plain := console()) as progress:
        for event in events:
            progress(event)
    return plain.file.getvalue().splitlines()


def shown(events, *, width=80):
    """The live display after these events."""
    progress = Progress(console(width=width))
    for event in events:
        progress(event)
    drawn = console(width=width)
    drawn.print(progress.render())
    return drawn.file.getvalue().splitlines()


def until(events, kind, number):
    """Events up to the first of this kind and round."""
    for place, event in enumerate(events):
        if event["event"] == kind and event.get("round") == number:
            return events[: place + 1]
    raise AssertionError


def test_outside_a_terminal_every_round_has_one_line_in_order(events):
    rounds = [line for line in lines_of(events("private")) if line.startswith("round ")]
    assert [line.split()[1] for line in rounds] == [f"{n}/72" for n in range(1, 73)]


def test_a_rounds_line_has_its_own_sites_scores_and_epsilon(events):
    told = events("private")
    lines = {line.split()[1]: line for line in lines_of(told) if line.startswith("round ")}
    score = next(e for e in told if e["event"] == "evaluated" and e["round"] == 12)
    finished = next(e for e in told if e["event"] == "round_finished" and e["round"] == 12)
    assert "5/6 sites" in lines["12/72"]
    assert f"macro-F1 {score['pooled']['macro_f1']:.3f} (simulator's view)" in lines["12/72"]
    assert f"eps {max(finished['epsilon'].values()):.2f}" in lines["12/72"]
    assert "6/6 sites" in lines["11/72"]
    assert "macro-F1" not in lines["11/72"]


def test_the_time_left_is_the_pace_of_the_phase_and_a_lower_bound_before_the_adapter(events):
    lines = {line.split()[1]: line for line in lines_of(events("private")) if line[:6] == "round "}
    assert "at least 2:04 left" in lines["10/72"]  # 62 rounds of 2 s
    assert "about 0:44 left" in lines["50/72"]
    assert "left" not in lines["72/72"]


def test_trouble_has_a_line_with_code_and_title(events):
    lines = lines_of(events("private"))
    assert "Orthopaedics refused to join: ST-401 The privacy budget does not allow this" in lines
    assert "Eye & ENT failed in round 12: ST-603 A site's update was rejected" in lines
    assert "resumed after round 30" in lines
    assert "72 rounds finished in 1:11" in lines


def test_the_last_round_is_not_lost_when_a_run_breaks_off(events):
    told = until(events("private"), "round_finished", 9)
    assert lines_of(told)[-1].startswith("round 9/72")


def test_baselines_are_told_as_they_finish(events):
    told = events("private")
    more = {"event": "baseline_finished", "time": told[-1]["time"], "title": "Own: [red]Eye"}
    told = [*told, {**more, "number": 2, "of": 10, "seconds": 61.0}]
    assert lines_of(told)[-1] == "baseline 2 of 10: Own: [red]Eye, after 1:01"
    assert shown(told)[0].startswith("baseline 2 of 10: Own: [red]Eye")


def test_the_display_shows_round_phase_score_epsilon_and_each_sites_state(events):
    told = events("private")
    text = "\n".join(shown(until(told, "round_started", 13)))
    assert "round 13 of 72, head only" in text
    assert re.search(r"validation macro-F1 0\.\d{3}, simulator's view", text)
    assert "ε at most" in text
    assert re.search(r"Orthopaedics +refused ST-401", text)
    assert re.search(r"Neuro & mental +training", text)
    failed = "\n".join(shown(until(told, "site_failed", 13)))
    assert re.search(r"Eye & ENT +failed ST-603", failed)


@pytest.mark.parametrize("width", [80, 60, 120])
@pytest.mark.parametrize("variant", ["private", "many", "hostile", "causal"])
def test_the_display_fits_its_width(events, variant, width):
    told = events(variant, rounds=16)
    for number in (0, 3, len(told) // 2, len(told)):
        lines = shown(told[:number], width=width)
        assert all(len(line) <= width for line in lines)
        assert len(lines) <= 20  # fits a terminal of 24 lines


def test_of_many_sites_those_in_trouble_are_shown_and_the_rest_counted(events):
    told = [*events("many", rounds=2)]
    told += [
        {
            "event": "round_started",
            "time": 9e3,
            "round": 3,
            "phase": "head",
            "cohort": ["site-059"],
        },
        {"event": "site_failed", "time": 9e3, "round": 3, "site": "site-059", "code": "ST-603"},
    ]
    text = "\n".join(shown(told))
    assert "site-059" in text
    assert re.search(r"and 48 done", text)


def test_a_terminal_gets_the_live_display_and_only_trouble_as_lines(events):
    terminal = console(force_terminal=True, color_system=None)
    with Progress(terminal) as progress:
        for event in events("private"):
            progress(event)
    text = terminal.file.getvalue()
    assert "\x1b[" in text
    assert "Eye & ENT failed in round 12" in text
    assert "round 12/72" not in text


def test_markup_and_escapes_in_names_are_only_text(events):
    name = "[bold]x[/] \x1b[31m"
    told = [
        {"event": "run_started", "time": 0.0, "run": "r", "sites": [name], "rounds": 1},
        {"event": "site_refused", "time": 0.0, "site": name, "code": "ST-401"},
    ]
    for lines in (lines_of(told), shown(told)):
        assert "[bold]x[/]" in "\n".join(lines)
        assert "\x1b" not in "\n".join(lines)


def test_events_it_does_not_know_change_nothing():
    told = [{"event": "run_started", "time": 0.0, "run": "r", "sites": ["a"], "rounds": 1}]
    assert lines_of([*told, {"event": "newer_kind", "time": 1.0}]) == lines_of(told)


def before_the_first_round(sites=("a", "b")):
    ready = {"event": "worker_ready", "time": 2.0, "worker": 0, "sites": ["a"], "seconds": 1.25}
    return [
        {"event": "run_started", "time": 1.0, "run": "r", "sites": list(sites), "rounds": 3},
        ready,
        {"event": "site_joined", "time": 3.0, "site": sites[0], "declared_units": 10},
    ]


def test_the_wait_before_the_first_round_says_what_it_waits_for(events):
    started, ready, joined = before_the_first_round()
    assert any("workers are starting" in line for line in shown([started]))
    assert any("0 of 2 joined" in line for line in shown([started, ready]))
    assert any("1 of 2 joined" in line for line in shown([started, ready, joined]))
    assert lines_of([started, ready, joined])[1:] == [
        "worker 1 ready after 1.2 s",
        "a joined, 1 of 2",
    ]


def test_a_hundred_sites_do_not_fill_a_log_with_their_joining():
    told = before_the_first_round([f"site-{n}" for n in range(100)])
    assert not any("joined" in line for line in lines_of(told))
