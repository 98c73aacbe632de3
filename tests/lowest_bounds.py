"""Run by `make test-lowest`, in its environment: which lower bounds of pyproject.toml nothing meets.

A bound below what other packages allow is never installed, so never tested, and promises too much.
"""

import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

PROJECT = Path(__file__).parents[1] / "pyproject.toml"
INSTALLED_EXTRAS = ("demo", "dev")


def main() -> int:
    """0 if each bound is the version that is installed."""
    project = tomllib.loads(PROJECT.read_text())["project"]
    extras = project["optional-dependencies"]
    lines = [
        *project["dependencies"],
        *(line for name in INSTALLED_EXTRAS for line in extras[name]),
    ]
    untrue = 0
    for requirement in map(Requirement, lines):
        bound = min(Version(part.version) for part in requirement.specifier if part.operator != "<")
        found = Version(version(requirement.name)).release
        # "2" is met by 2.0.0 and by 2.0.1, where a 2.0.0 was withdrawn; not by 2.1.
        most = max(len(bound.release), 2)
        if found[:most] != (*bound.release, 0)[:most]:
            print(f"{requirement}: the lowest that can be installed is {version(requirement.name)}")
            untrue += 1
    return int(untrue > 0)


if __name__ == "__main__":
    sys.exit(main())
