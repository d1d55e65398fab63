"""packaging/fleet/cnprocd-textfile.*: the service replaces the file of metrics as a whole, or leaves it as it is."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

FLEET = Path(__file__).parents[2] / "packaging/fleet"
SERVICE = (FLEET / "cnprocd-textfile.service").read_text()


def run(tmp_path, script):
    """Run ExecStart= of the unit with `script` as cnprocctl, and return its status."""
    (tmp_path / "cnprocctl").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "cnprocctl").chmod(0o755)
    (line,) = (line for line in SERVICE.splitlines() if line.startswith("ExecStart="))
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "DIRECTORY": str(tmp_path / "texts")}
    return subprocess.run(shlex.split(line.removeprefix("ExecStart=")), env=environment).returncode


@pytest.fixture
def texts(tmp_path):
    (tmp_path / "texts").mkdir()
    return tmp_path / "texts"


def collected(texts):
    """Return what node_exporter reads: every file whose name ends in .prom, hidden ones too (collector/textfile.go)."""
    return {name: (texts / name).read_text() for name in os.listdir(texts) if name.endswith(".prom")}


def test_the_metrics_are_replaced_as_a_whole(tmp_path, texts):
    assert run(tmp_path, "[ $1 = metrics ] && echo cnprocd_up 1") == 0
    assert run(tmp_path, "echo cnprocd_up 2") == 0
    assert collected(texts) == {"cnprocd.prom": "cnprocd_up 2\n"}


def test_a_daemon_that_does_not_answer_leaves_the_file(tmp_path, texts):
    """node_exporter then shows its age, and an alert fires."""
    run(tmp_path, "echo cnprocd_up 1")
    assert run(tmp_path, "echo half; exit 69") == 69
    assert collected(texts) == {"cnprocd.prom": "cnprocd_up 1\n"}


def test_the_unit_writes_as_root_into_a_directory_of_root():
    """Debian's prometheus-node-exporter makes the directory root:root 0755, so the user prometheus cannot write."""
    names = {line.partition("=")[0] for line in SERVICE.splitlines()}
    assert not names & {"User", "DynamicUser"}
    assert "CapabilityBoundingSet=CAP_DAC_OVERRIDE" in SERVICE.splitlines()


def test_the_alert_that_the_unit_names_exists():
    assert "CnprocdMetricsStale" in SERVICE
    assert "alert: CnprocdMetricsStale" in (FLEET.parent / "grafana/alerts.yaml").read_text()
