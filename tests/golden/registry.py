"""Which function made a golden file and which reads it, by the name of the file or folder."""

import json
import shutil
from pathlib import Path

GOLDEN = Path(__file__).parent
READERS, WRITERS = {}, {}


def reads(name):
    """Register a reader.

    It is given a copy, with the modes that private files have, and may write to it. What it says, as
    plain JSON data, was written down in ``expected.json`` when the file was made.
    """
    return _register(READERS, name)


def makes(name):
    """Register a writer: it is given the path to write to, which exists if it is a folder."""
    return _register(WRITERS, name)


def _register(table, name):
    def register(function):
        table[name] = function
        return function

    return register


def given(model, **options):
    """What a document says itself: settings that came later are not in it."""
    return json.loads(model.model_dump_json(exclude_unset=True, **options))


def private_copy(source, target):
    """Copy a golden file or folder, with the modes that state has: git keeps none of them."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, copy_function=shutil.copyfile)
    else:
        shutil.copyfile(source, target)
    for path in (target.parent, target, *target.rglob("*")):
        path.chmod(0o700 if path.is_dir() else 0o600)
    return target


def told_by(name, source, folder, *, change=lambda copy: None):
    """What a golden file says, as plain JSON data, after something is done to a copy of it."""
    copy = private_copy(source, folder / name)
    change(copy)
    return json.loads(json.dumps(READERS[name](copy)))
