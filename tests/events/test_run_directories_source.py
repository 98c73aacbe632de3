"""Run directories as a source of pages: events with growing ids, and files that may be read."""

import json

import pytest

from silotune.errors import FileNotOffered, RunDirectoryInvalid, RunNotFound
from silotune.events.source import RunDirectories, Views, held
from silotune.rounds.run_directory import RunDirectory
from tests.simulation.synthetic_run import Synthetic


@pytest.fixture
def run_dir(tmp_path):
    return Synthetic(stop_after=5, faults=False).write(tmp_path / "runs")


def test_ids_are_line_numbers_and_a_reader_goes_on_where_it_stopped(run_dir):
    source = RunDirectories(run_dir)
    lines = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    whole = source.events(run_dir.name)
    assert [row["id"] for row in whole] == list(range(1, len(lines) + 1))
    assert [{k: v for k, v in row.items() if k != "id"} for row in whole] == lines
    assert source.events(run_dir.name, after=7) == whole[7:]


def test_the_torn_line_of_a_killed_writer_is_not_an_event_yet(run_dir):
    source = RunDirectories(run_dir)
    before = source.events(run_dir.name)
    with (run_dir / "events.jsonl").open("a") as file:
        file.write('{"time": 1')
    assert source.events(run_dir.name) == before


def test_a_view_is_brought_up_to_date_by_new_lines_alone(run_dir):
    source = RunDirectories(run_dir)
    views = Views(source)
    assert views.get(run_dir.name).done == 5
    RunDirectory.open(run_dir).append_event("round_finished", round=6)
    assert views.get(run_dir.name).done == 6
    assert source.facts(run_dir.name).round == 6


def test_a_folder_of_runs_lists_them_all_and_says_their_state(tmp_path, run_dir):
    finished = Synthetic(rounds=4, faults=False).write(run_dir.parent)
    source = RunDirectories(run_dir.parent)
    states = {facts.run: (facts.state, facts.round) for facts in source.runs()}
    assert states == {run_dir.name: ("running", 5), finished.name: ("finished", 4)}


@pytest.mark.parametrize("name", ["../x", "..", "", "/etc", "nope", "a/b"])
def test_no_name_leads_out_of_the_folder(run_dir, name):
    with pytest.raises(RunNotFound):
        RunDirectories(run_dir.parent).events(name)


@pytest.mark.parametrize(
    "name", ["../plan.toml", "checkpoint.safetensors", "sites/a/ledger.sqlite"]
)
def test_only_offered_files_are_read(run_dir, name):
    with pytest.raises(FileNotOffered):
        RunDirectories(run_dir).read(run_dir.name, name)


def test_what_is_offered_can_be_read(run_dir):
    source = RunDirectories(run_dir)
    for offer in source.files(run_dir.name):
        assert source.read(run_dir.name, offer.name)


def test_a_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(RunDirectoryInvalid):
        RunDirectories(tmp_path)


def test_a_run_whose_process_died_is_interrupted_and_one_that_lives_is_running(run_dir):
    source = RunDirectories(run_dir)
    with held(run_dir):
        assert source.facts(run_dir.name).state == "running"
        with pytest.raises(RunDirectoryInvalid, match="another process"), held(run_dir):
            pass
    assert source.facts(run_dir.name).state == "interrupted"


@pytest.mark.parametrize(
    ("kind", "fields", "state"),
    [
        ("run_failed", {"code": "ST-604"}, "failed"),
        ("run_stopped", {"round": 5}, "stopped"),
        ("run_finished", {"rounds": 5}, "finished"),
    ],
)
def test_every_way_that_a_run_ends_is_its_state_until_it_goes_on(run_dir, kind, fields, state):
    run, source = RunDirectory.open(run_dir), RunDirectories(run_dir)
    run.append_event(kind, **fields)
    assert (source.facts(run_dir.name).state, source.facts(run_dir.name).round) == (state, 5)
    run.append_event("run_started", sites=["a"])
    assert source.facts(run_dir.name).state == "running"
