"""All that shows and steers a running daemon, as one object that the daemon holds: socket, tap and metrics file.

It is opened when the daemon is ready and closed first when the daemon stops. Nothing in here can stop the daemon: if
the socket or the metrics file is unavailable, the daemon logs that once and runs without.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from cnprocd.control import view
from cnprocd.control.server import ControlServer
from cnprocd.control.tap import Tap
from cnprocd.control.verbs import verbs_of
from cnprocd.log import Log
from cnprocd.output import metrics
from cnprocd.output.metrics_file import MetricsFile

METRICS_EVERY_S = 15.0  # the usual scrape interval of Prometheus


class ControlRoom:
    """The socket, the tap and the metrics file."""

    def __init__(
        self, daemon: view.DaemonView, tap: Tap, runtime_dir: Path, log: Log, readers_group: Callable[[], int | None]
    ) -> None:
        self._daemon = daemon
        self._loop = asyncio.get_running_loop()
        self._metrics_timer: asyncio.TimerHandle | None = None
        self.metrics = MetricsFile(self._loop, log)
        self.server = ControlServer(runtime_dir, verbs_of(daemon), log, readers_group=readers_group)
        tap.observe(self.server.publish, self.server.wanted)

    async def open(self) -> None:
        """Listen on the socket, and begin to write metrics."""
        await self.server.start()
        self.reloaded()

    def reloaded(self) -> None:
        """Begin, continue or end writing metrics, as the settings in force want it."""
        if self._metrics_timer is not None:
            self._metrics_timer.cancel()
        self._metrics_timer = None
        self._write_metrics()

    async def close(self) -> None:
        """Close every connection and the socket."""
        if self._metrics_timer is not None:
            self._metrics_timer.cancel()
        self.metrics.close()
        await self.server.stop()

    def _write_metrics(self) -> None:
        """Write the metrics file now and every METRICS_EVERY_S, if the settings name one."""
        path = self._daemon.loaded.settings.metrics_file
        if path is None:
            return
        with self._daemon.stalls.running("metrics"):
            self.metrics.write(path, metrics.render(view.status(self._daemon)))
        self._metrics_timer = self._loop.call_later(METRICS_EVERY_S, self._write_metrics)
