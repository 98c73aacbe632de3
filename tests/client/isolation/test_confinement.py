"""What this machine puts up, and what it says of it."""

import pytest

from silotune.client.errors import IsolationMissing
from silotune.client.isolation.confinement import (
    MEANINGS,
    Confinement,
    Protection,
    offered,
    require,
)


@pytest.fixture(scope="module")
def found():
    return {p.name: p for p in offered(Confinement(memory=2_000_000_000))}


def test_each_protection_is_in_force_or_says_why_not(found):
    assert set(found) == set(MEANINGS)
    assert all(bool(p.reason) != p.in_force for p in found.values())
    always = ("no_new_privileges", "capabilities", "memory_hidden", "memory_limit", "seccomp")
    assert all(found[name].in_force for name in always)
    assert found["process_limit"].reason == "none is set"


def test_what_is_required_and_not_in_force_is_named_with_its_reason():
    met = Protection(name="seccomp", in_force=True)
    missed = Protection(name="landlock_files", in_force=False, reason="the kernel has none")
    require([met, missed], ["seccomp"])
    with pytest.raises(IsolationMissing, match="landlock_files: the kernel has none"):
        require([met, missed], ["seccomp", "landlock_files"])
