"""Logs: text for people, one JSON object a line for machines."""

import json
import logging

import pytest

from silotune.logs import configure


@pytest.fixture(autouse=True)
def restore():
    root = logging.getLogger()
    before = (root.handlers[:], root.level)
    yield
    root.handlers[:], root.level = before


def test_json_lines_hold_what_was_said_and_what_was_raised(capsys):
    configure(style="json", level="info")
    log = logging.getLogger("silotune.test")
    log.info("round %d\nof two", 3)
    try:
        raise ValueError("no such thing")
    except ValueError:
        log.exception("failed")
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["message"] for line in lines] == ["round 3\nof two", "failed"]
    assert [line["level"] for line in lines] == ["info", "error"]
    assert "ValueError: no such thing" in lines[1]["exception"]


def test_the_level_holds_and_libraries_are_quiet(capsys):
    configure(style="text", level="warning")
    logging.getLogger("silotune.test").info("hidden")
    logging.getLogger("httpx").info("hidden too")
    logging.getLogger("silotune.test").warning("shown")
    assert capsys.readouterr().err.splitlines()[0].endswith("WARNING silotune.test: shown")
