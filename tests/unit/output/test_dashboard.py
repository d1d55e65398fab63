"""The dashboard and the alerts use existing metrics, and promtool can read the alerts."""

import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from unit.output.test_metrics import status

from cnprocd.output.metrics import render

GRAFANA = Path(__file__).parents[3] / "packaging" / "grafana"
NAME = re.compile(r"\bcnprocd_[a-z_]+")
WRITTEN = {line.split()[2] for line in render(status()).splitlines() if line.startswith("# TYPE")}
KNOWN = WRITTEN | {f"{name}_{part}" for name in WRITTEN for part in ("bucket", "sum", "count")}


def test_the_dashboard_is_what_its_script_writes():
    spec = importlib.util.spec_from_file_location("dashboard", GRAFANA / "dashboard.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert json.loads((GRAFANA / "cnprocd.json").read_text()) == module.dashboard()


@pytest.mark.parametrize("file", ["cnprocd.json", "alerts.yaml"])
def test_every_metric_it_names_is_written(file):
    found = set(NAME.findall((GRAFANA / file).read_text()))
    assert found
    assert found <= KNOWN


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (apt install prometheus)")
@pytest.mark.parametrize("command", [["check", "rules", "alerts.yaml"], ["test", "rules", "alerts.test.yaml"]])
def test_promtool_takes_the_alerts(command):
    done = subprocess.run(["promtool", *command], cwd=GRAFANA, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
