"""Differential privacy: per-unit clipping, noise, accounting, the ledger and certificates."""
