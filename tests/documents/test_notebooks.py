"""The notebooks of examples/ run as they are written, with a tiny model; no output is stored."""

import json
import os
import sys

import nbformat
import pytest
from nbclient import NotebookClient

from tests.documents.blocks import ROOT

NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
TINY = {
    "simulate": {"RECORDS": 240, "ROUNDS": 3},
    "results": {"EPSILONS": (2.0, 8.0), "SETTINGS": {"rounds.number": 2}},
    "predict": {},
}


def read(path):
    return nbformat.read(path, as_version=4)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_nothing_that_a_run_left_is_stored(path):
    book = json.loads(path.read_text())
    nbformat.validate(read(path))
    code = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert [cell["metadata"].get("tags") for cell in code].count(["parameters"]) == 1


def played(path, folder, **parameters):
    """Run a notebook in a folder, with other values after its parameters."""
    book = read(path)
    at = next(n for n, c in enumerate(book.cells) if "parameters" in c.metadata.get("tags", []))
    given = "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
    book.cells.insert(at + 1, nbformat.v4.new_code_cell(given))
    client = NotebookClient(book, timeout=500, resources={"metadata": {"path": str(folder)}})
    client.execute(env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    return [out for cell in book.cells for out in cell.get("outputs", [])]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_its_first_cell_to_its_last(
    path, workspace, bert_folder, tmp_path, monkeypatch
):
    (tmp_path / "hospitals").symlink_to(workspace / "hospitals")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "small").symlink_to(workspace / "runs" / "small")
    base = {"BASE": str(bert_folder)} if path.stem == "simulate" else {}
    shown = played(path, tmp_path, **base, **TINY[path.stem])
    kinds = [kind for out in shown for kind in out.get("data", {})]
    assert "text/html" in kinds, "a data frame was shown"
    assert ("image/png" in kinds) == (path.stem != "predict"), "and a picture"
    assert not [out for out in shown if out.output_type == "error"]
