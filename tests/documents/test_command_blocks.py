"""README and docs: every command in them is one that the command line takes, and does its work."""

import re
import shlex
import tomllib

import click
import pytest
from typer.main import get_command

from silotune.cli import app
from tests.documents.blocks import ROOT, blocks_of, commands_in_prose, documents
from tests.documents.reader import Reader, alternatives, played

ROOT_COMMAND = get_command(app)
BLOCKS = [block for path in documents() for block in blocks_of(path)]
COMMANDS = [block for block in BLOCKS if block.is_commands]
TOML = [
    b for b in BLOCKS if b.language == "toml" or (not b.language and b.lines[0].startswith("["))
]
PROSE = [(path, line, text) for path in documents() for line, text in commands_in_prose(path)]


def test_there_are_commands_to_read():
    assert {block.path for block in COMMANDS} >= set(played())
    assert len(PROSE) > 30


@pytest.mark.parametrize("block", COMMANDS, ids=lambda block: block.name)
def test_a_block_is_read_by_the_reader_or_says_why_not(block):
    if block.reason is None:
        assert block.path in played(), f"{block.name}: not run, and no <!-- not run: … --> says why"
    else:
        assert len(block.reason) > 20, f"{block.name}: the reason is no reason"


@pytest.mark.parametrize(
    "block", [b for b in BLOCKS if b.path in played()], ids=lambda block: block.name
)
def test_a_fenced_block_is_commands_or_says_its_language(block):
    fenced = block.path.read_text().split("\n")[block.line - 1].startswith("```")
    assert block.is_commands or block.language or block in TOML or not fenced, block.name


@pytest.mark.parametrize("block", TOML, ids=lambda block: block.name)
def test_a_block_of_toml_is_toml(block):
    assert tomllib.loads("\n".join(block.lines)) or True


def parsed(words):
    """Follow words through the command line, as far as they name commands and options."""
    command, words = ROOT_COMMAND, list(words)
    while isinstance(command, click.Group) and words:
        if words[0].startswith("-"):
            words.pop(0)
            continue
        assert words[0] in command.commands, f"no command {words[0]!r}"
        command = command.commands[words.pop(0)]
    known = {name for p in command.params for name in (*p.opts, *p.secondary_opts)} | {"--help"}
    wrong = [w for w in words if re.match(r"--?[a-z]", w) and w.partition("=")[0] not in known]
    assert not wrong, f"no option {wrong}"


def typed():
    """Every `silotune …` of blocks and prose: where it stands, and its words."""
    for block in COMMANDS:
        for line in block.commands:
            if match := re.search(r"(?:.*[\s/]|^)silotune (.*)", line):
                yield block.name, match[1]
    for path, line, text in PROSE:
        yield f"{path.relative_to(ROOT)}:{line}", text.removeprefix("silotune ")


@pytest.mark.parametrize("where, text", list(typed()), ids=lambda value: value[:60])
def test_a_command_that_is_written_down_exists_with_its_options(where, text):
    text = text.split(" > ")[0].split("`")[0]
    for one in alternatives(re.sub(r"\\\|", "|", text)):
        words = [w for w in shlex.split(one.replace("…", "X")) if w not in {"|", ";", "&&"}]
        try:
            parsed(words)
        except AssertionError as exc:
            raise AssertionError(f"{where}: silotune {one}: {exc}") from None


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("path", played(), ids=lambda path: path.name)
def test_every_command_of_a_document_works_in_its_order(path, tmp_path, bert_folder):
    reader = Reader(tmp_path / "reader", bert_folder)
    try:
        reader.read(blocks_of(path))
    finally:
        reader.close()
    assert reader.shown
