"""cnprocd-runner: the service that runs hooks for the daemon. Started by cnprocd-runner.socket.

It cannot be started by hand: without a passed socket it exits. Exit statuses are those of cnprocd.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import pwd
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from cnprocd.cli.standard_files import STDERR, STDOUT, fill_missing
from cnprocd.errors import EX_OK, CnprocdError
from cnprocd.log import Log
from cnprocd.names import Names, NameServiceSilentError
from cnprocd.output.journal import is_journal_stream
from cnprocd.output.log import LOG_BOUND_S, LogOutput, make_log, make_output
from cnprocd.rules.language.load import load
from cnprocd.rules.problems import LoadedRules
from cnprocd.rules.rule_files import DROPIN_DIRS
from cnprocd.rules.ruleset import Hook, hooks_of
from cnprocd.runner.service import IDLE_S, Service, delegated_cgroup
from cnprocd.service import ServiceManager

PATIENCE_S, AGAIN_S = 10.0, 0.2  # how long, and how often, to ask the name service at start


class Rules:
    """The hooks of the root-owned rules. They are read again when one of the files or directories has changed."""

    def __init__(self, read: Callable[[], LoadedRules]) -> None:
        self._read = read
        self._seen: dict[Path, tuple[int, int, int] | None] = {}
        self._hooks: Mapping[str, Hook] = {}

    def __call__(self) -> Mapping[str, Hook]:
        """Return the hooks by rule. Raises RulesError while a file is invalid: outdated hooks are never run."""
        if not self._seen or any(stamp(path) != seen for path, seen in self._seen.items()):
            # Stamps first: a change during the read is detected the next time.
            before = {path: stamp(path) for path in self._seen}
            loaded = self._read()
            files = [*loaded.files, *(path.parent for path in loaded.files), *DROPIN_DIRS]
            self._seen = {path: before.get(path, stamp(path)) for path in files}
            self._hooks = hooks_of(loaded.rules)
        return self._hooks


def stamp(path: Path) -> tuple[int, int, int] | None:
    """Return values that change when a file is written or replaced, or a directory gains or loses an entry."""
    try:
        status = path.stat()
    except OSError:
        return None
    return (status.st_ino, status.st_mtime_ns, status.st_size)


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(prog="cnprocd-runner", description="Run the hooks of cnprocd (a systemd service).")
    result.add_argument("--rules", type=Path, metavar="FILE", help="load only this file, like cnprocd --rules")
    result.add_argument("--user", default="cnprocd", help="the user that may connect, besides root (default: cnprocd)")
    result.add_argument(
        "--idle",
        type=float,
        default=IDLE_S,
        metavar="SECONDS",
        help="exit after so long without a connection (default: 30)",
    )
    return result


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    sys.exit(run(arguments))


def run(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    manager = ServiceManager(os.environ)
    fill_missing()
    try:
        output = make_output("auto", STDOUT, is_journal_stream(os.environ, STDERR))
        log = make_log(output)
        listener = adopted_listener(manager)
        asyncio.run(serve(listener, options, manager, log, output))
    except CnprocdError as error:
        print(f"cnprocd-runner: {error}", file=sys.stderr)
        return error.exit_status
    return EX_OK


def adopted_listener(manager: ServiceManager) -> socket.socket:
    descriptors = manager.adopted("runner")
    if not descriptors:
        raise CnprocdError("no socket was passed", "start cnprocd-runner.socket; systemd then starts the runner")
    return socket.socket(fileno=descriptors[0])


def allowed_users(name: str) -> set[int]:
    try:
        return {0, pwd.getpwnam(name).pw_uid}
    except KeyError:
        raise CnprocdError(f"unknown user {name!r}", "run systemd-sysusers to create it") from None


async def serve(
    listener: socket.socket, options: argparse.Namespace, manager: ServiceManager, log: Log, output: LogOutput
) -> None:
    loop = asyncio.get_running_loop()
    output.attach(loop)
    manager.attach(loop)
    names = Names(loop, log)
    rules = Rules(lambda: load(options.rules))
    allowed = await patiently(lambda: names.resolve(options.user, lambda: allowed_users(options.user)))
    service = Service(listener, rules, allowed, log, delegated_cgroup(), names.hook_user)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, service.stop)
    manager.ready("Waiting for the daemon")
    await service.serve(options.idle)
    manager.stopping()
    names.close()
    await output.close(LOG_BOUND_S)


async def patiently(resolve: Callable[[], set[int]]) -> set[int]:
    """Return the answer of the name service, asked for PATIENCE_S. Raises CnprocdError: there is none."""
    for _ in range(int(PATIENCE_S / AGAIN_S)):
        with contextlib.suppress(NameServiceSilentError):
            return resolve()
        await asyncio.sleep(AGAIN_S)
    raise CnprocdError(
        "cannot resolve the user of the daemon: the name service does not answer", "see nsswitch.conf(5)"
    )


if __name__ == "__main__":
    main()
