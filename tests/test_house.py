"""The house: rooms, one subject a file, one way to go. Layers are held by ``lint-imports``."""

import ast
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import grimp
import pytest

import silotune

PACKAGE = Path(silotune.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
PUBLIC_FLOWER = ("flwr.app", "flwr.clientapp", "flwr.serverapp", "flwr.simulation")
# The envelope signs the bytes of Flower's records, and needs Flower's own rules for them.
READS_RECORDS = "protocol/envelope.py"


def of(path):
    return path.relative_to(PACKAGE).as_posix()


def test_no_module_imports_itself_through_others():
    """Imports inside functions and those for type checkers count."""
    graph = grimp.build_graph("silotune", exclude_type_checking_imports=False)
    imports = {name: graph.find_modules_directly_imported_by(name) for name in graph.modules}
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as exc:
        pytest.fail(f"a circle of imports: {' -> '.join(exc.args[1])}")


def test_no_class_name_stands_in_two_modules():
    found = defaultdict(list)
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                found[node.name].append(of(path))
    assert {name: paths for name, paths in found.items() if len(paths) > 1} == {}


def test_only_one_room_knows_flowers_insides():
    guests = set()
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            for name in names:
                public = any(f"{name}.".startswith(f"{package}.") for package in PUBLIC_FLOWER)
                inside = name.startswith("flwr.app.message.") or name.startswith("flwr.app.error.")
                if name.startswith("flwr.") and (inside or not public):
                    guests.add(of(path))
    assert {path for path in guests if not path.startswith("flower/")} == {READS_RECORDS}


@pytest.mark.parametrize("path", MODULES, ids=of)
def test_a_file_has_at_most_600_lines(path):
    assert len(path.read_text().splitlines()) <= 600
