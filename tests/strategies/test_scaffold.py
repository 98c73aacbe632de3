"""SCAFFOLD at the coordinator is a mean of changes; the rest is in tests/client/test_control.py."""

from tests.strategies.contract import FollowsOneSite, Streaming


class TestScaffold(FollowsOneSite, Streaming):
    changes = {
        "aggregation.strategy": "scaffold",
        "rounds.local_steps": 4,
        "optimizer.server.name": "none",
        "optimizer.site.local": "sgd",
    }
