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
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from cnprocd.cli.snapshots import load_former, not_stored
from cnprocd.cli.standard_files import STDERR, STDOUT, fill_missing
from cnprocd.errors import EX_OK, CnprocdError
from cnprocd.log import Log
from cnprocd.names import Names, NameServiceSilentError
from cnprocd.output.journal import is_journal_stream
from cnprocd.output.log import LOG_BOUND_S, LogOutput, make_log, make_output
from cnprocd.rules import snapshot_files
from cnprocd.rules.loader_process import LoaderProcess
from cnprocd.rules.rule_files import MAIN_FILE
from cnprocd.rules.ruleset import hooks_of
from cnprocd.rules.snapshot_files import DIRECTORY_NAME
from cnprocd.runner.rule_snapshots import FilesRead, Hooks, RuleSnapshots
from cnprocd.runner.service import IDLE_S, Service, delegated_cgroup
from cnprocd.service import ServiceManager

PATIENCE_S, AGAIN_S = 10.0, 0.2  # how long, and how often, to ask the name service at start


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(prog="cnprocd-runner", description="Run the hooks of cnprocd (a systemd service).")
    result.add_argument("--rules", type=Path, metavar="FILE", help="Read only this rule file, as cnprocd --rules does")
    result.add_argument(
        "--state-dir",
        type=Path,
        default=Path("/var/lib/cnprocd-runner"),
        metavar="DIR",
        help="Directory of the accepted rules and of results (default: /var/lib/cnprocd-runner)",
    )
    result.add_argument("--user", default="cnprocd", help="User that may connect, besides root (default: cnprocd)")
    result.add_argument(
        "--idle",
        type=float,
        default=IDLE_S,
        metavar="SECONDS",
        help="Exit after this time without a connection (default: 30)",
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


@dataclass(frozen=True, slots=True)
class Reader:
    """The runner's reader (rule_snapshots.SnapshotReader). `gid` is the daemon's group, which may read snapshots."""

    rules: Path | None
    directory: Path
    gid: int | None

    async def stored(self, digest: str) -> Hooks | None:
        return (await load_former(self.directory, [digest])).get(digest)

    async def files(self, wanted: str) -> FilesRead:
        return await LoaderProcess(lambda: self._read(wanted), self.rules or MAIN_FILE).wait()

    async def accept(self, wanted: str, keep: Collection[str] | None) -> FilesRead:
        def put_in_force() -> None:
            snapshot_files.accept(self.directory, wanted, keep, self.gid)

        return await LoaderProcess(lambda: self._read(wanted, put_in_force), self.rules or MAIN_FILE).wait()

    def _read(self, wanted: str, put_in_force: Callable[[], None] = lambda: None) -> FilesRead:
        from cnprocd.rules.language.disabled import load_with_snapshot

        loaded, snapshot = load_with_snapshot(self.rules)
        if snapshot.digest != wanted:
            return FilesRead(snapshot.digest, None)
        try:
            snapshot_files.store(self.directory, snapshot, self.gid)
            put_in_force()
        except OSError as error:
            raise not_stored(self.directory, error) from error
        return FilesRead(wanted, hooks_of(loaded.rules))


@dataclass(frozen=True, slots=True)
class Peer:
    """The user of the daemon: it may connect, as root may, and its group may read the accepted rules."""

    uid: int
    gid: int


def find_peer(name: str) -> Peer:
    try:
        found = pwd.getpwnam(name)
        return Peer(found.pw_uid, found.pw_gid)
    except KeyError:
        raise CnprocdError(f"unknown user {name!r}", "run systemd-sysusers to create it") from None


async def serve(
    listener: socket.socket, options: argparse.Namespace, manager: ServiceManager, log: Log, output: LogOutput
) -> None:
    loop = asyncio.get_running_loop()
    output.attach(loop)
    manager.attach(loop)
    names = Names(loop, log)
    peer = await patiently(lambda: names.resolve(options.user, lambda: find_peer(options.user)))
    snapshots = RuleSnapshots(Reader(options.rules, options.state_dir / DIRECTORY_NAME, peer.gid))
    service = Service(
        listener,
        snapshots,
        {0, peer.uid},
        log,
        delegated_cgroup(),
        names.hook_user,
        results_dir=options.state_dir / "results",
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, service.stop)
    loop.add_signal_handler(signal.SIGHUP, service.retire)
    manager.ready("Waiting for the daemon")
    await service.serve(options.idle)
    manager.stopping()
    names.close()
    await output.close(LOG_BOUND_S)


async def patiently(resolve: Callable[[], Peer]) -> Peer:
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
