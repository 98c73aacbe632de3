"""Claims about the gate: what fails is not signed, and what was signed can't be changed unnoticed."""

import json

import pytest
from typer.testing import CliRunner

from silotune.cli import app
from silotune.errors import SilotuneError
from silotune.release import hashes_of
from tests.whole_run import play


@pytest.fixture(scope="module")
def run(federation):
    """A finished private run: unseeded, three sites, with attacks that found little."""
    return play(
        federation,
        "released",
        **{"plan.seed": None, "rounds.number": 2, "rounds.evaluate_every": 0},
    )


@pytest.fixture
def attacked(run):
    """Write what the attacks found."""

    def write(**change):
        found = {
            "adapter": hashes_of(run.final_adapter),
            "audit": {"claimed": 8.0, "lower_bound": 4.0, "violated": False},
            "membership": {"lower_bound": 0.2},
            "memorisation": None,
        }
        run.write_json("attacks.json", found | change)

    write()
    yield write
    for name in ("attacks.json", "release.json"):
        (run.root / name).unlink(missing_ok=True)


def call(*arguments):
    """The command as typed: its output and how it ended."""
    found = CliRunner().invoke(app, ["release", *map(str, arguments)])
    return found.output, found.exception


def controls(run):
    output, _ = call(run.root, "--json")
    return {control["name"]: control for control in json.loads(output.splitlines()[0])["controls"]}


def refused(run, *arguments):
    _, error = call(run.root, *arguments)
    assert isinstance(error, SilotuneError)
    assert error.code == "ST-415"
    assert error.exit_code == 40
    assert not (run.root / "release.json").exists()
    return error.detail


def signing(tmp_path):
    return ("--by", "Ada Smith", "--role", "output checker", "--key", tmp_path / "ada.pem")


def test_a_run_that_passes_is_signed_by_a_named_person_and_verifies(run, attacked, tmp_path):
    output, error = call(run.root, *signing(tmp_path))
    assert error is None, output
    document = json.loads((run.root / "release.json").read_text())["release"]
    assert (document["person"], document["role"]) == ("Ada Smith", "output checker")
    assert document["files"] == hashes_of(run.final_adapter)
    assert set(document["certificates"]) == {"alpha", "beta", "gamma"}
    assert (tmp_path / "ada.pem").stat().st_mode & 0o777 == 0o600
    output, error = call(run.root, "--verify")
    assert error is None
    assert "Ada Smith" in output


def test_without_a_person_nothing_is_signed(run, attacked):
    output, error = call(run.root)
    assert error is None
    assert "To sign" in output
    assert not (run.root / "release.json").exists()


def test_every_control_says_who_holds_it_and_what_was_compared(run, attacked):
    found = controls(run)
    assert list(found) == ["adapter", "plan", "certificates", "audit", "membership", "memorisation"]
    assert found["certificates"]["figures"]["certified"] == 3
    assert found["audit"]["figures"] == {"lower_bound": 4.0, "claimed": 8.0}
    assert found["memorisation"]["passed"] is None  # no canaries in a classifier
    assert all(control["held_by"] for control in found.values())


def test_attacks_that_were_not_run_are_not_passed(run, attacked, tmp_path):
    (run.root / "attacks.json").unlink()
    assert refused(run, *signing(tmp_path)) == "not passed: audit, membership"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"audit": {"claimed": 8.0, "lower_bound": 8.5, "violated": True}}, "audit"),
        ({"audit": {"claimed": 8.0, "lower_bound": 1.0, "violated": True}}, "audit"),
        ({"membership": {"lower_bound": 9.0}}, "membership"),
        ({"membership": None}, "membership"),
        ({"adapter": {"adapter_model.safetensors": "00" * 32}}, "audit, membership"),
    ],
)
def test_an_attack_that_wins_or_was_made_on_another_adapter_stops_it(
    run, attacked, tmp_path, change, named
):
    attacked(**change)
    assert refused(run, *signing(tmp_path)) == f"not passed: {named}"


def test_a_site_without_a_certificate_or_with_a_forged_one_stops_it(run, attacked, tmp_path):
    path = run.site("beta") / "certificate.json"
    honest = path.read_text()
    try:
        path.unlink()
        assert refused(run, *signing(tmp_path)) == "not passed: certificates"
        path.write_text(honest.replace('"epsilon": ', '"epsilon": 0.5, "x": '))
        assert refused(run, *signing(tmp_path)) == "not passed: certificates"
        path.write_text((run.site("alpha") / "certificate.json").read_text())  # another site's
        assert refused(run, *signing(tmp_path)) == "not passed: certificates"
    finally:
        path.write_text(honest)


def test_an_adapter_with_a_file_that_could_run_is_stopped(run, attacked, tmp_path):
    extra = run.final_adapter / "weights.bin"
    extra.write_bytes(b"x")
    try:
        attacked()  # the attacks were made on just this folder
        assert refused(run, *signing(tmp_path)) == "not passed: adapter"
    finally:
        extra.unlink()


def test_a_seeded_run_does_not_pass(whole, tmp_path):
    _, error = call(whole[0].root, *signing(tmp_path))
    assert error.code == "ST-415"
    assert error.detail.startswith("not passed: plan, certificates")


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "README.md"])
def test_what_was_changed_after_signing_is_named(run, attacked, tmp_path, name):
    call(run.root, *signing(tmp_path))
    path = run.final_adapter / name
    honest = path.read_bytes()
    try:
        path.write_bytes(honest + b" ")
        _, error = call(run.root, "--verify")
        assert error.code == "ST-416"
        assert name in error.detail
    finally:
        path.write_bytes(honest)


def test_a_statement_that_was_changed_does_not_verify(run, attacked, tmp_path):
    call(run.root, *signing(tmp_path))
    path = run.root / "release.json"
    path.write_text(path.read_text().replace("Ada Smith", "Eve Jones"))
    _, error = call(run.root, "--verify")
    assert error.code == "ST-416"
    assert "signature" in error.detail


def test_signing_takes_name_role_and_key(run, attacked, tmp_path):
    output, error = call(run.root, "--by", "Ada Smith")
    assert "--role" in output
    assert isinstance(error, SystemExit)
