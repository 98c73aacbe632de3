"""Settings that hold for every test: offline, one thread, quiet libraries."""

import gc
import os

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"  # before NumPy is imported
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from hypothesis import settings

# Other work may share the machine: no claim here is about the time of one example.
settings.register_profile("silotune", deadline=None)
settings.load_profile("silotune")

pytest_plugins = ["tests.small_models", "tests.whole_run", "tests.api.workspace"]


def pytest_collection_finish():
    """What was imported stays: no collection of garbage need look at a million objects of it again."""
    gc.collect()
    gc.freeze()
