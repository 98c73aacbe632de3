"""The house: rooms, one subject a file, one way to go. Layers are held by ``lint-imports``."""

import ast
import re
import tomllib
from collections import Counter, defaultdict
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


def test_no_two_modules_of_tests_have_one_name():
    """pytest imports them without their folders: of two, it would take the first for both."""
    found = Counter(path.name for path in Path(__file__).parent.rglob("test_*.py"))
    assert [name for name, times in found.items() if times > 1] == []


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


def blocks():
    """The page's fenced blocks: the tree, the layers."""
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text()
    return re.findall(r"^```\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


def test_shares_become_percentages_in_one_place():
    """Rounded by themselves they say 100% of what is not all."""
    own = [of(p) for p in MODULES if re.search(r":[<>]?\d*\.0%", p.read_text())]
    assert own == ["percents.py"]
    pages = [p for p in PACKAGE.rglob("*.html") if re.search(r"format\(100 \*", p.read_text())]
    assert pages == []


def test_the_page_shows_every_room_and_no_other():
    shown, room = set(), ""
    for line in blocks()[0].splitlines()[1:]:
        indent, name = len(line) - len(line.lstrip()), line.split()[0]
        room = name if indent == 2 else room
        shown.add(name if indent == 2 else room + name)
    rooms = {f"{of(path.parent)}/" for path in MODULES if path.name == "__init__.py"} - {"./"}
    rooms = {name for name in rooms if not name.startswith("server/store/")} | {"server/store/"}
    single = {of(path) for path in PACKAGE.glob("*.py")} - {"__init__.py"}
    assert shown == rooms | single


def test_the_page_shows_the_layers_that_are_held():
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())
    held = project["tool"]["importlinter"]["contracts"][0]["layers"]
    assert blocks()[1].splitlines() == held


def test_every_path_that_the_page_names_is_there():
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text()
    named = set(re.findall(r"`([\w/]+(?:\.py|/))`", page))
    missing = {n for n in named if not (PACKAGE / n).exists() and not (PACKAGE.parent / n).exists()}
    assert len(named) > 40
    assert not missing


RUNS_MODELS = re.compile(
    r"silotune\.(rounds\.trained|models\.(tasks|task|trial)\b.*|serving\.batching|simulation(?!\.progress).*"
    r"|inference\.(answers|calibration|evaluation|explanation|held_out))$"
)
"""What loads, asks or trains models, and has its counterpart in ``silotune.api``."""


def imported(path):
    """Modules that a module imports when it runs, and the names that it takes of them."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):  # what is for type checkers runs nothing
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_the_command_line_runs_models_by_the_python_interface_alone():
    """What a command can do, a script can, and both by one way."""
    found = {
        (path.name, name)
        for path in (PACKAGE / "commands").glob("*.py")
        for name in imported(path)
        if RUNS_MODELS.fullmatch(name)
    }
    assert found == set()
    known = [n for path in (PACKAGE / "api").glob("*.py") for n in imported(path)]
    assert any(RUNS_MODELS.fullmatch(name) for name in known)  # the pattern means what there is
