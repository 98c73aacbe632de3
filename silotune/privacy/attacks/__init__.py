"""Attacks on a run, and what they prove: pure functions from scores to lower bounds."""
