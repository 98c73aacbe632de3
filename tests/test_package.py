"""What importing the package does, and does not."""

import os
import subprocess
import sys


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


def test_a_coordinator_starts_without_the_libraries_of_training():
    """PyTorch alone would cost it 200 MB."""
    code = "import sys, silotune.server.coordinator; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {"silotune.server.coordinator", "torch", "transformers", "scipy", "pandas"} & set(
        found.stdout.split()
    )
    assert loaded == {"silotune.server.coordinator"}
