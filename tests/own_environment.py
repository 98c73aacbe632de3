"""An environment of its own for a library that is compared with, and is no dependency."""

import json
import subprocess
import venv


def python_in(folder, *installs):
    """A new environment's Python, after pip had each of these lists of words."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    for words in installs:
        _done([python, "-m", "pip", "install", "-q", *words])
    return python


def answered(python, script, *words, given):
    """The JSON that a script prints, which has some JSON on its standard input."""
    return json.loads(_done([python, "-c", script, *words], given=json.dumps(given)))


def _done(command, *, given=None):
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
