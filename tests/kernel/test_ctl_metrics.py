"""A metric from daemon to query: text file, node_exporter and Prometheus, with the packages of Debian."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from kernel.harness import PATIENCE_S, child, rename, running, wait_status

from cnprocd.control.client import Client

NEEDED = ("prometheus", "prometheus-node-exporter")
ALERTS = Path(__file__).parents[2] / "packaging" / "grafana" / "alerts.yaml"
pytestmark = pytest.mark.skipif(
    any(shutil.which(name) is None for name in NEEDED), reason=f"needs {' and '.join(NEEDED)}"
)

RULES = """
settings: {metrics_file: $FILE}
rules:
$MARKER
  - {name: failed, events: [nonzero_exit], match: {comm: cnpmetric}}
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def serving(*command: str) -> Iterator[None]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        process.wait()


def answer(url: str, enough) -> object:
    """Return the answer of a server as soon as it is complete."""
    deadline = time.monotonic() + PATIENCE_S
    said = None
    while time.monotonic() < deadline:
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            said = urllib.request.urlopen(url, timeout=PATIENCE_S).read().decode()
            if enough(said):
                return said
        time.sleep(0.1)  # between two requests to a program that does not signal completion
    raise AssertionError(f"{url}: {said}")


def test_a_match_can_be_asked_of_prometheus(tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    exporter, server = free_port(), free_port()
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(ALERTS)],
        "scrape_configs": [{"job_name": "node", "static_configs": [{"targets": [f"127.0.0.1:{exporter}"]}]}],
    }
    (tmp_path / "prometheus.yml").write_text(json.dumps(config))
    with running(tmp_path, RULES.replace("$FILE", str(texts / "cnprocd.prom"))) as daemon:
        for _ in range(7):
            wait_status(child(lambda: (rename("cnpmetric"), os._exit(3))))
        daemon.mark()
        with Client(tmp_path / "run") as client:
            client.ask("reload")  # writes the file at once, instead of within 15 s
        with (
            serving(
                "prometheus-node-exporter",
                "--collector.disable-defaults",
                "--collector.textfile",
                f"--collector.textfile.directory={texts}",
                f"--web.listen-address=127.0.0.1:{exporter}",
            ),
            serving(
                "prometheus",
                f"--config.file={tmp_path / 'prometheus.yml'}",
                f"--storage.tsdb.path={tmp_path / 'data'}",
                f"--web.listen-address=127.0.0.1:{server}",
            ),
        ):
            exposed = answer(f"http://127.0.0.1:{exporter}/metrics", lambda said: "cnprocd_matches_total" in said)
            assert "node_textfile_scrape_error 0" in exposed
            query = urllib.parse.quote('cnprocd_matches_total{rule="failed"}')
            url = f"http://127.0.0.1:{server}/api/v1/query?query={query}"
            said = json.loads(answer(url, lambda text: json.loads(text)["data"]["result"]))
            assert said["data"]["result"][0]["value"][1] == "7"
            rules = json.loads(
                answer(f"http://127.0.0.1:{server}/api/v1/rules", lambda text: "CnprocdEventsLost" in text)
            )
            assert len(rules["data"]["groups"][0]["rules"]) == ALERTS.read_text().count("- alert:")
