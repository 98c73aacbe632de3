"""Names in texts, by Presidio and a spaCy model in a folder: counts only, nothing from the network."""

import json
import socket
import sys

import pytest

from silotune.data.names import find_names
from silotune.errors import EnvironmentFault, ModelNotFound
from tests.commands.terminal import shown
from tests.commands.test_data_check import notes, site_of

NAME = "Jane Doe"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A spaCy model that knows one person and one town."""
    import spacy

    made = spacy.blank("en")
    ruler = made.add_pipe("entity_ruler")
    person = [{"LOWER": "jane"}, {"LOWER": "doe"}]
    ruler.add_patterns(
        [{"label": "PERSON", "pattern": person}, {"label": "GPE", "pattern": "Berlin"}]
    )
    folder = tmp_path_factory.mktemp("model")
    made.to_disk(folder)
    return folder


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    asked = []

    def refuse(*args, **rest):
        asked.append(args)
        raise OSError("no network in this test")

    for name in ("create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    yield
    assert asked == []


@pytest.mark.slow
def test_names_are_counted_by_records_and_units_and_never_shown(tmp_path, model):
    rows = notes(100)
    for row in rows[:10]:
        row[0] += f" {NAME} of Berlin, jane@clinic.example"
    path, page = site_of(tmp_path, rows), tmp_path / "page.html"
    result = shown("json", "data", "check", str(path), "--names", str(model), "--html", str(page))
    seen = {one["kind"]: one for one in result.facts["datasets"][0]["identifiers"]}
    assert (seen["person"]["records"], seen["person"]["units"]) == (10, 5)
    assert seen["location"]["records"] == 10
    assert seen["organization"]["records"] == 0
    for told in (result.text, result.errors, page.read_text()):
        assert NAME not in told
        assert "Berlin" not in told


@pytest.mark.parametrize("content", [None, "no JSON", json.dumps({"name": "x"})])
def test_what_is_no_folder_of_a_model_is_refused_and_never_downloaded(tmp_path, content):
    folder = tmp_path / "en_core_web_lg"
    if content is not None:
        folder.mkdir()
        (folder / "meta.json").write_text(content)
    with pytest.raises(ModelNotFound, match="no folder of a spaCy model"):
        find_names(["text"], [0], model=folder)


def test_without_presidio_the_extra_is_named(tmp_path, monkeypatch):
    (tmp_path / "meta.json").write_text('{"lang": "en"}')
    monkeypatch.setitem(sys.modules, "presidio_analyzer", None)
    with pytest.raises(EnvironmentFault) as caught:
        find_names(["text"], [0], model=tmp_path)
    assert caught.value.remedy == "pip install 'silotune[names]'"


@pytest.mark.slow
def test_a_model_that_spacy_can_not_load_is_told_by_its_kind(tmp_path):
    (tmp_path / "meta.json").write_text('{"lang": "en"}')
    with pytest.raises(ModelNotFound, match="spaCy can't load"):
        find_names(["text"], [0], model=tmp_path)
