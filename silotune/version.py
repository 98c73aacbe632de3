"""The version, where every module can read it: what `silotune` itself exports imports most of them."""

__version__ = "0.1.0"
