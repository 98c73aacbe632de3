"""Base models, adapters on them, and the tasks they are tuned for."""
