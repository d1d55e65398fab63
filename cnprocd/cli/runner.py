"""cnprocd-runner: the service that runs hooks for the reader. Started by cnprocd-runner.socket.

Not for people: without a passed socket it says so and ends. Exit statuses as cnprocd's.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import pwd
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from cnprocd.dispatch import hook_specs
from cnprocd.errors import EX_OK, CnprocdError
from cnprocd.log import Log
from cnprocd.output.journal import is_journal_stream
from cnprocd.output.log import make_log, make_output
from cnprocd.rules.language.load import load
from cnprocd.rules.problems import LoadedRules
from cnprocd.runner.service import IDLE_S, Service, delegated_cgroup
from cnprocd.service import ServiceManager
from cnprocd.spool.job import HookSpec


class Rules:
    """The hooks of the root-owned rules, read again whenever a file or directory of theirs has changed."""

    def __init__(self, read: Callable[[], LoadedRules]) -> None:
        self._read = read
        self._seen: dict[Path, tuple[int, int, int] | None] = {}
        self._specs: Mapping[str, HookSpec] = {}

    def __call__(self) -> Mapping[str, HookSpec]:
        """Raises RulesError while the rules are wrong: then nothing is run, rather than something stale."""
        if not self._seen or any(stamp(path) != seen for path, seen in self._seen.items()):
            # Stamps first: a change while we read is seen the next time.
            before = {path: stamp(path) for path in self._seen}
            loaded = self._read()
            files = [*loaded.files, *(path.parent for path in loaded.files), *DIRECTORIES]
            self._seen = {path: before.get(path, stamp(path)) for path in files}
            self._specs = hook_specs(loaded.rules)
        return self._specs


DIRECTORIES = tuple(Path(top, "cnprocd/rules.d") for top in ("/usr/lib", "/run", "/etc"))


def stamp(path: Path) -> tuple[int, int, int] | None:
    """What changes when a file is written or replaced, or a directory gains or loses an entry."""
    try:
        status = path.stat()
    except OSError:
        return None
    return (status.st_ino, status.st_mtime_ns, status.st_size)


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(prog="cnprocd-runner", description="Run the hooks of cnprocd (a systemd service).")
    result.add_argument("--rules", type=Path, metavar="FILE", help="only this file, as for cnprocd")
    result.add_argument("--user", default="cnprocd", help="who may connect, besides root")
    result.add_argument(
        "--idle", type=float, default=IDLE_S, metavar="SECONDS", help="end after so long without a reader"
    )
    return result


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    sys.exit(run(arguments))


def run(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    manager = ServiceManager(os.environ)
    log = make_log(make_output("auto", sys.stdout, is_journal_stream(os.environ, sys.stderr.fileno())))
    try:
        listener = adopted_listener(manager)
        asyncio.run(serve(listener, options, manager, log))
    except CnprocdError as error:
        print(f"cnprocd-runner: {error}", file=sys.stderr)
        return error.exit_status
    return EX_OK


def adopted_listener(manager: ServiceManager) -> socket.socket:
    descriptors = manager.adopted("runner")
    if not descriptors:
        raise CnprocdError("no socket was passed", "it is started by cnprocd-runner.socket, not by hand")
    return socket.socket(fileno=descriptors[0])


def allowed_users(name: str) -> set[int]:
    try:
        return {0, pwd.getpwnam(name).pw_uid}
    except KeyError:
        raise CnprocdError(f"there is no user {name!r}", "systemd-sysusers makes it") from None


async def serve(listener: socket.socket, options: argparse.Namespace, manager: ServiceManager, log: Log) -> None:
    rules = Rules(lambda: load(options.rules))
    service = Service(listener, rules, allowed_users(options.user), log, delegated_cgroup())
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, service.stop)
    manager.ready("Waiting for the reader")
    await service.serve(options.idle)
    manager.stopping()


if __name__ == "__main__":
    main()
