"""All listeners while nothing happens: wake-ups, CPU time and memory."""

from __future__ import annotations

import contextlib
import json
import socket
import tempfile
import time
from typing import Any

import competitors
from competitors import Competitor
from workloads import Reading

WATCHDOG_S = 30.0  # of systemd/cnprocd.service


class Manager:
    """A service manager that counts watchdog pings, which are expected wake-ups."""

    def __init__(self, watchdog_s: float) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="cnprocd-bench-")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._socket.bind(f"{self._directory.name}/notify")
        self.env = {"NOTIFY_SOCKET": f"{self._directory.name}/notify", "WATCHDOG_USEC": str(round(watchdog_s * 1e6))}

    def pings(self) -> int:
        """Return the number of pings since the last call."""
        found = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                found += b"WATCHDOG=1" in self._socket.recv(4096)
        return found

    def close(self) -> None:
        self._socket.close()
        self._directory.cleanup()


def idle(those: list[Competitor], seconds: float) -> list[dict[str, Any]]:
    """Run all listeners at once and idle. Measure each, and count the events of other programs meanwhile.

    cnprocd runs as under systemd, with the watchdog of its unit. Wake-ups for a ping are counted apart.
    """
    managers = {one.name: Manager(WATCHDOG_S) for one in those if one.rules is not None}
    running = {one.name: one.start(managers[one.name].env if one.name in managers else {}) for one in those}
    try:
        time.sleep(3.0)  # a housekeeping tick of cnprocd follows the last event
        witness = competitors.C_LISTENER.start()
        for manager in managers.values():
            manager.pings()
        before = {name: Reading(listener, is_idle=True) for name, listener in running.items()}
        pings, until = dict.fromkeys(managers, 0), time.monotonic() + seconds
        while time.monotonic() < until:
            time.sleep(min(5.0, seconds))  # a manager that does not read would block the daemon's pings
            for name, manager in managers.items():
                pings[name] += manager.pings()
        alive = {name: one for name, one in running.items() if one.process.poll() is None}  # pyroute2 dies of odd names
        found = [{"competitor": name, **before[name].since(listener)} for name, listener in alive.items()]
        told = json.loads(witness.stop().splitlines()[-1])
        heard = sum(told[kind] for kind in ("forks", "execs", "exits", "others"))
        return [
            one | {"seconds": seconds, "events": heard, "pings": pings.get(str(one["competitor"]))} for one in found
        ]
    finally:
        for listener in running.values():
            listener.stop()
        for manager in managers.values():
            manager.close()
