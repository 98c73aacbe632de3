"""Curves of runs, written for other tools: TensorBoard and MLflow."""
