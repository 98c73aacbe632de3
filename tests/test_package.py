"""What importing the package does, and does not; what its files say of versions and folders."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HOUSE = Path(__file__).parents[1]


def test_importing_the_package_turns_telemetry_off_and_loads_no_model_library():
    code = (
        "import silotune, sys, os;"
        "print(os.environ['FLWR_TELEMETRY_ENABLED'], os.environ['FLWR_DISABLE_UPDATE_CHECK'],"
        " 'torch' in sys.modules)"
    )
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("FLWR", "TOKENIZERS"))}
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=clean
    )
    assert found.stdout.split() == ["0", "1", "False"]


def test_the_command_line_starts_without_the_heavy_libraries():
    heavy = (
        "{'torch', 'transformers', 'flwr', 'scipy', 'dp_accounting', 'numpy', 'grpc', 'sqlalchemy'}"
    )
    code = f"import sys, silotune.cli; print(sorted({heavy} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "process", ["silotune.server.coordinator", "silotune.client.daemon.daemon"]
)
def test_a_daemon_starts_without_the_libraries_of_training(process):
    """PyTorch alone would cost a coordinator 200 MB; at a site it is loaded once the line is up."""
    code = f"import sys, {process}; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"torch", "transformers", "peft", "opacus", "scipy", "pandas"}
    assert ({process} | heavy) & set(found.stdout.split()) == {process}


def test_the_versions_that_are_tested_are_admitted():
    project = tomllib.loads((HOUSE / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["demo"], *extras["dev"], *extras["ray"]]
    lines = (HOUSE / "requirements.lock").read_text().split()
    locked = {
        canonicalize_name(name): found for name, _, found in (x.partition("==") for x in lines)
    }
    for requirement in map(Requirement, wanted):
        name = canonicalize_name(requirement.name)
        assert requirement.specifier.contains(locked[name]), (str(requirement), locked[name])


def test_the_folders_that_the_makefile_names_are_there():
    named = re.findall(r"\btests/[\w/.]+", (HOUSE / "Makefile").read_text())
    assert len(named) > 10
    assert [name for name in named if not (HOUSE / name).exists()] == []
