"""The control room: everything that lets people see and steer a running daemon, as the daemon holds it.

One object, opened when the daemon is ready and closed first when
it stops. Nothing in here can fail the daemon: a socket that cannot be had and a metrics file that cannot be written are
said once and done without.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from cnprocd.control import view
from cnprocd.control.server import ControlServer
from cnprocd.control.tap import Tap
from cnprocd.control.verbs import verbs_of
from cnprocd.log import Log
from cnprocd.output import metrics

METRICS_EVERY_S = 15.0  # Prometheus' usual scrape interval


class ControlRoom:
    """The socket, the tap and the metrics file."""

    def __init__(self, daemon: view.Daemon, tap: Tap, runtime_dir: Path, log: Log) -> None:
        self._daemon = daemon
        self._log = log
        self._loop = asyncio.get_running_loop()
        self._metrics_timer: asyncio.TimerHandle | None = None
        self._metrics_failed = False
        self.server = ControlServer(runtime_dir, verbs_of(daemon), log)
        tap.observe(self.server.publish, self.server.wanted)

    async def open(self) -> None:
        await self.server.start()
        self.reloaded()

    def reloaded(self) -> None:
        """Rules and settings may be others: begin, or go on, or end writing metrics."""
        if self._metrics_timer is not None:
            self._metrics_timer.cancel()
        self._metrics_timer = None
        self._write_metrics()

    async def close(self) -> None:
        """Hang up on everybody."""
        if self._metrics_timer is not None:
            self._metrics_timer.cancel()
        await self.server.stop()

    def _write_metrics(self) -> None:
        """Now and every so often, where the settings name a file."""
        path = self._daemon.loaded.settings.metrics_file
        if path is None:
            return
        try:
            metrics.write(Path(path), metrics.render(view.status(self._daemon)))
            self._metrics_failed = False
        except OSError as error:
            if not self._metrics_failed:
                self._log("warning", "metrics_unwritable", path=path, message=f"{path}: {error.strerror}")
            self._metrics_failed = True
        self._metrics_timer = self._loop.call_later(METRICS_EVERY_S, self._write_metrics)
