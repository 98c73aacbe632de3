"""The rounds of a run: the coordinator's ServerApp, the same in simulation and in deployment."""
