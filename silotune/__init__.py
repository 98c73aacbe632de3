"""Fine-tune one language model across organisations that may not pool their records."""

import os

# Before any library reads them: silotune never phones home and never downloads unasked.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from silotune.version import __version__ as __version__
