"""The error taxonomy is complete, stable in form and safe to print."""

import re
import subprocess
import sys

import pytest

from silotune import errors

CLASSES = errors.catalogue()


def test_codes_are_unique_and_well_formed():
    codes = [cls.code for cls in CLASSES]
    assert len(set(codes)) == len(codes)
    assert all(re.fullmatch(r"ST-\d{3}", code) for code in codes)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.code)
def test_every_class_explains_itself(cls):
    assert cls.__dict__["title"]
    assert cls.__dict__["cause"].endswith(".")
    assert cls.__dict__["advice"].endswith(".")


def test_a_family_shares_its_hundred_and_its_exit_code():
    for cls in CLASSES:
        if cls is not errors.SilotuneError:
            assert cls.exit_code == int(cls.code[3]) * 10


def test_an_error_prints_its_code_and_detail():
    error = errors.ColumnMissing("notes.csv has no column 'text'", remedy="Name it.")
    assert str(error) == "ST-204 notes.csv has no column 'text'"
    assert error.remedy == "Name it."
    assert errors.ColumnMissing().detail == errors.ColumnMissing.title


def test_a_subclass_without_a_code_of_its_own_is_no_entry():
    class Internal(errors.WorkerDied):
        """Raised inside one module only."""

    assert Internal not in errors.catalogue()
    assert errors.WorkerDied in errors.catalogue()


def test_the_catalogue_is_read_without_loading_pytorch():
    code = (
        "import sys; from silotune.errors import catalogue;"
        " print(len(catalogue()), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(len(CLASSES)), "False"]
