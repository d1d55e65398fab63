"""The control socket as other programs use it: Varlink, without any code of cnprocd."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import pytest
from kernel.harness import PATIENCE_S, child, rename, running, wait_status
from unit.control.varlink_idl import Interface, parse, wrong

RULES = """
rules:
  - {name: failed, events: [nonzero_exit], match: {comm: "cnptest-varl*"}}
  - {name: hooked, events: [nonzero_exit], match: {comm: cnptest-hooked}, run: {command: [/bin/false], retries: 0}}
$MARKER
"""
ODD = b"cnptest-varl\xff"


def fail(comm: str | bytes = "cnptest-hooked") -> int:
    pid = child(lambda: (rename(comm), os._exit(3)))
    wait_status(pid)
    return pid


class Peer:
    """A program that subscribes to matches: the example of cnprocctl(1), as it stands there."""

    def __init__(self, path: Any) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(PATIENCE_S)
        self._socket.connect(str(path))
        self._file = self._socket.makefile("rb")

    def replies(self, method: str, more: bool = False, **parameters: Any) -> Iterator[dict[str, Any]]:
        call = {"method": method, "parameters": parameters, "more": more}
        self._socket.sendall(json.dumps(call).encode() + b"\0")
        while True:
            message = b""
            while not message.endswith(b"\0"):
                message += self._file.read(1)
            reply = json.loads(message[:-1])
            yield reply
            if not reply.get("continues"):
                return

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        (reply,) = self.replies(f"io.cnprocd.{method}", **parameters)
        return reply


def test_every_reply_is_as_the_interface_describes_it(tmp_path):
    with running(tmp_path, RULES) as daemon:
        peer = Peer(tmp_path / "run" / "control.sock")
        info = next(peer.replies("org.varlink.service.GetInfo"))["parameters"]
        assert info["interfaces"] == ["io.cnprocd", "org.varlink.service"]
        name = {"interface": "io.cnprocd"}
        described = next(peer.replies("org.varlink.service.GetInterfaceDescription", **name))["parameters"]
        interface = parse(described["description"])
        fail()
        job = daemon.wait_for("job_dead")["job_id"]
        calls = {
            "Rule": {"name": "failed"},
            "Jobs": {"limit": 5, "state": "dead"},
            "History": {"rule": "hooked", "after": ""},
            "Counts": {"by": "kind", "per_s": 60},
            **{name: {"job_id": job} for name in ("Job", "Output", "Retry")},
        }
        endless = {"Kill", "Drop", "Watch"}  # of no such job, or without end
        _fails(peer, interface, "NotFound", "Job", job_id=1 << 40)
        _fails(peer, interface, "WrongState", "Drop", job_id=job)
        for method in sorted(interface.methods.keys() - endless):  # Retry while the job is dead
            reply = peer.call(method, **calls.get(method, {}))
            assert wrong(interface, interface.methods[method][1], reply["parameters"]) == [], method
        daemon.rules.write_text("rules: [{}]")
        _fails(peer, interface, "RulesRejected", "Reload")


def _fails(peer: Peer, interface: Interface, error: str, method: str, **parameters: Any) -> None:
    reply = peer.call(method, **parameters)
    assert reply["error"] == f"io.cnprocd.{error}"
    assert wrong(interface, interface.errors[error], reply["parameters"]) == []


def test_a_program_gets_each_match_as_it_happens(tmp_path):
    with running(tmp_path, RULES):
        peer = Peer(tmp_path / "run" / "control.sock")
        stream = peer.replies("io.cnprocd.Watch", more=True)
        assert next(stream) == {"parameters": {"ready": True}, "continues": True}
        for _ in range(3):
            pid = fail(ODD)
            found = next(reply for reply in stream if reply["parameters"]["match"]["pid"] == pid)["parameters"]
            assert (found["match"]["rule"], found["match"]["signal"], found["skipped"]) == ("failed", None, 0)


@pytest.mark.skipif(shutil.which("varlinkctl") is None, reason="varlinkctl is not installed (systemd 255 or newer)")
def test_varlinkctl_prints_a_live_match(tmp_path):
    with running(tmp_path, RULES):
        path = str(tmp_path / "run" / "control.sock")

        def varlinkctl(*words: str) -> str:
            done = subprocess.run(["varlinkctl", *words], capture_output=True, text=True, timeout=PATIENCE_S)
            assert done.returncode == 0, done.stderr
            return done.stdout

        assert "io.cnprocd" in varlinkctl("info", path)
        assert "method Watch" in varlinkctl("introspect", path, "io.cnprocd")
        assert json.loads(varlinkctl("call", "-j", path, "io.cnprocd.Status", "{}"))["pid"] > 0
        watching = subprocess.Popen(
            ["varlinkctl", "call", "--more", "-j", path, "io.cnprocd.Watch", "{}"], stdout=subprocess.PIPE, text=True
        )
        assert watching.stdout is not None
        try:  # each line begins with a record separator (RFC 7464)
            assert json.loads(watching.stdout.readline().lstrip("\x1e")) == {"ready": True}
            pid, at_ns = fail(ODD), time.time_ns()
            match = json.loads(watching.stdout.readline().lstrip("\x1e"))["match"]
            assert (match["pid"], match["comm"], match["comm_hex"]) == (pid, "cnptest-varl\\xff", ODD.hex())
            assert abs(match["time_ns"] - at_ns) < PATIENCE_S * 1e9, "an integer, not rounded"
        finally:
            watching.kill()
            watching.wait()
