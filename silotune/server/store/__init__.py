"""The coordinator's durable store, and what is written to it."""
