"""Alert rules and dashboard: accepted by Prometheus, and about metrics that Ray has."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import ray
import yaml

FOLDER = Path(__file__).resolve().parents[2] / "cluster" / "components" / "monitoring"
GROUPS = yaml.safe_load((FOLDER / "alerts.yaml").read_text())["spec"]["groups"]
PANELS = [panel for panel in json.loads((FOLDER / "dashboard.json").read_text())["panels"] if panel["type"] != "row"]
EXPRESSIONS = [rule["expr"] for group in GROUPS for rule in group["rules"]] + [
    target["expr"] for panel in PANELS for target in panel["targets"]
]


def test_every_metric_is_one_that_ray_itself_charts():
    charts = Path(ray.__file__).parent / "dashboard" / "modules" / "metrics" / "dashboards"
    known = set(re.findall(r"ray_[a-z_]+", "".join(path.read_text() for path in charts.glob("*_panels.py"))))
    labels = {"ray_io_cluster"}
    used = {name for text in EXPRESSIONS for name in re.findall(r"ray_[a-z_]+", text)} - labels
    assert used
    assert used <= known, used - known


def test_prometheus_accepts_the_rules(tmp_path):
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian: prometheus)")
    rules = tmp_path / "rules.yaml"
    queries = [{"record": f"panel:{place}", "expr": text} for place, text in enumerate(EXPRESSIONS)]
    rules.write_text(yaml.safe_dump({"groups": [*GROUPS, {"name": "dashboard", "rules": queries}]}))
    done = subprocess.run([promtool, "check", "rules", str(rules)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_says_how_bad_and_what():
    for group in GROUPS:
        for rule in group["rules"]:
            assert rule["labels"]["severity"] in {"warning", "critical"}
            assert len(rule["annotations"]["summary"]) > 20
