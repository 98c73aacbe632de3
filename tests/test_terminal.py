"""The terminal: nothing of what was written is read as markup and left out."""

import ast
import inspect
import io
from pathlib import Path

import pytest
from rich.table import Table
from rich.text import Text
from typer.models import ArgumentInfo, DefaultPlaceholder, OptionInfo
from typer.testing import CliRunner
from typer.utils import get_params_from_function

import silotune
from silotune import cli
from silotune.errors import catalogue
from silotune.terminal import headed, say, terminal

SOURCES = sorted(Path(silotune.__file__).parent.rglob("*.py"))
BRACKETS = (
    "a site.toml with [policy], [datasets.NAME], [/], [bold], [red on blue] and :x: and \\[a]"
)


def squeezed(text):
    """Without white space and the lines of boxes: a text may be broken anywhere."""
    return "".join(c for c in text if not c.isspace() and c not in "│╭╮╰╯─")


def commands(app, words=()):
    """Every group and command: its words, and the texts that its help has to show."""
    info = app.info
    yield words, ([] if isinstance(info.help, DefaultPlaceholder) else [info.help or ""])
    for command in app.registered_commands:
        texts = [inspect.getdoc(command.callback)]
        for parameter in get_params_from_function(command.callback).values():
            if isinstance(parameter.default, (ArgumentInfo, OptionInfo)):
                texts.append(parameter.default.help or "")
        yield (*words, command.name or command.callback.__name__.replace("_", "-")), texts
    for group in app.registered_groups:
        name = group.typer_instance.info.name
        own = group.name if not isinstance(group.name, DefaultPlaceholder) else name
        yield from commands(group.typer_instance, (*words, own))


ALL = list(commands(cli.app))


@pytest.mark.parametrize("words, texts", ALL, ids=[" ".join(w) or "silotune" for w, _ in ALL])
def test_help_shows_every_text_as_it_was_written(words, texts, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")  # in a narrow box a line is broken between columns
    monkeypatch.setenv("TERMINAL_WIDTH", "300")
    result = CliRunner().invoke(cli.app, [*words, "--help"])
    assert result.exit_code == 0, result.output
    shown = squeezed(result.output)
    for text in texts:
        for paragraph in inspect.cleandoc(text).split("\n\n"):
            assert squeezed(paragraph) in shown, paragraph


def test_every_argument_and_option_explains_itself():
    for words, texts in ALL:
        for text in texts:
            assert text, f"silotune {' '.join(words)} has a parameter without help"


def shown_error(error):
    console = terminal()
    console.file = io.StringIO()
    cli.show_error(error, console)
    return console.file.getvalue()


@pytest.mark.parametrize("kind", catalogue(), ids=lambda kind: kind.code)
def test_an_error_is_shown_word_for_word(kind):
    shown = shown_error(kind(BRACKETS))
    for text in (kind.code, kind.title, BRACKETS, kind.cause, kind.advice):
        assert text in shown


def test_a_line_of_styled_and_plain_words_and_a_table_keep_their_brackets():
    console = terminal()
    console.file = io.StringIO()
    table = Table("column [x]")
    table.add_row("cell [y]")
    console.print(headed("[a]", "[b] :x:"), table, Text("[c]"))
    for text in ("[a] [b] :x:", "column [x]", "cell [y]", "[c]"):
        assert text in console.file.getvalue()


def test_a_sentence_is_one_line_where_there_is_no_terminal(capsys):
    say("word " * 60 + "[end]")
    assert capsys.readouterr().out.count("\n") == 1


def test_every_console_of_the_product_comes_from_one_place():
    """A console of Rich's own would read markup again."""
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        if path.name == "terminal.py":
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                called = getattr(node.func, "id", getattr(node.func, "attr", ""))
                assert called != "Console", f"{path}:{node.lineno}: use silotune.terminal.terminal"
                assert called != "from_markup", f"{path}:{node.lineno}: use a Text with a style"
            if isinstance(node, ast.ImportFrom):
                assert node.module not in {"rich", "rich.markup"}, f"{path}:{node.lineno}"
