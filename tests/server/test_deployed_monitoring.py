"""The files in deploy/ speak of the metrics that there are."""

import json
import re
from pathlib import Path

from silotune.server.monitoring import _Families

DEPLOY = Path(__file__).parents[2] / "deploy"
OTHERS = {
    "silotune_runs",
    "silotune_enrolments_waiting",
    "silotune_site_online",
    "silotune_site_heartbeat_age_seconds",
}


def metrics():
    found = set(OTHERS)
    for family in _Families().all:
        found.add(family.name + ("_total" if family.type == "counter" else ""))
    return found


def named(text):
    return set(re.findall(r"silotune_[a-z_]+", text))


def test_rules_and_dashboard_name_only_metrics_that_exist():
    rules = (DEPLOY / "prometheus" / "silotune-alerts.yml").read_text()
    panels = json.loads((DEPLOY / "grafana" / "silotune.json").read_text())["panels"]
    queries = " ".join(target["expr"] for panel in panels for target in panel["targets"])
    expressions = " ".join(re.findall(r"expr: (.*)", rules))
    assert named(queries)
    assert named(queries) | named(expressions) <= metrics()


def test_the_documentation_lists_every_metric():
    text = (DEPLOY.parent / "docs" / "monitoring.md").read_text()
    assert metrics() <= named(text)
