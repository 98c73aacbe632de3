"""The admin socket of a coordinator whose folder has a longer path than an address of a socket."""

import json

from typer.testing import CliRunner

from silotune import cli
from tests.server.coordinator_material import Town


def test_a_coordinator_in_a_deep_folder_starts_and_answers_its_own_account(tmp_path):
    """The kernel takes 107 bytes as an address."""
    deep = tmp_path / ("x" * 60) / ("y" * 60)
    deep.mkdir(parents=True)
    town = Town(deep)
    try:
        asked = ["coordinator", "status", "--dir", str(town.home.root), "--json"]
        found = CliRunner().invoke(cli.app, asked)
        assert found.exit_code == 0, found.output
        assert json.loads(found.stdout)["federation"] == "demo"
    finally:
        town.close()
    assert not town.home.socket_path.exists()
    gone = CliRunner().invoke(cli.app, asked)
    assert gone.exception.code == "ST-721"
