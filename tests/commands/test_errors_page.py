"""docs/errors.md is complete, generated and current."""

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from silotune.commands.reference import errors, errors_page, families
from silotune.errors import SilotuneError, catalogue

DOCS = Path(__file__).parents[2] / "docs" / "errors.md"

app = typer.Typer()
app.command()(errors)


def test_the_page_in_docs_is_up_to_date():
    assert DOCS.read_text() == errors_page(), "run: silotune errors --markdown > docs/errors.md"


def test_every_error_is_on_the_page_once_with_its_cause_and_remedy():
    page = errors_page()
    for error in catalogue():
        assert page.count(f"**{error.code} ") == 1
        assert error.title in page
        for text in (error.cause, error.advice):
            assert text.replace("<", "&lt;").replace("|", "\\|") in page


def test_codes_are_unique_and_exit_codes_belong_to_one_family():
    codes = [error.code for error in catalogue()]
    assert len(set(codes)) == len(codes)
    exits = [family.exit_code for family in families()]
    assert len(set(exits)) == len(exits)
    for family in families():
        if family is SilotuneError:
            continue
        below = [error for error in catalogue() if issubclass(error, family)]
        assert {error.exit_code for error in below} == {family.exit_code}
        assert {error.code[:4] for error in below} == {family.code[:4]}


def test_each_error_says_its_own_title_cause_and_advice():
    for error in catalogue():
        assert {"code", "title", "cause", "advice"} <= vars(error).keys(), error.__name__


def test_one_code_is_explained_and_an_unknown_one_refused():
    explained = CliRunner().invoke(app, ["ST-401"])
    assert explained.exit_code == 0
    assert "The privacy budget does not allow this" in explained.output
    assert "ST-402" not in explained.output
    assert CliRunner().invoke(app, ["ST-999"]).exit_code == 2


@pytest.mark.parametrize("arguments", [[], ["ST-205"]])
def test_json_has_what_the_page_has(arguments):
    rows = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).output)
    expected = [e for e in catalogue() if not arguments or e.code == arguments[0]]
    assert [(row["code"], row["cause"]) for row in rows] == [(e.code, e.cause) for e in expected]
