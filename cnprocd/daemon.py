"""The daemon's life: start order, signals, stop. wiring.py builds the parts, reload.py replaces the rules.

Start: rules, socket, LISTEN and its acknowledgement, narrow, scan /proc, drain, READY=1. A process that is started
after READY=1 is never missed.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal

from cnprocd.connector.source import REFUSED
from cnprocd.errors import CnprocdError, StateError
from cnprocd.handover import PROGRAM
from cnprocd.log import Log
from cnprocd.output.log import LOG_BOUND_S
from cnprocd.owner_lock import OwnedError, OwnerLock
from cnprocd.process.handed_on import HandedOn
from cnprocd.reload import log_receive_buffer
from cnprocd.rules.problems import LoadedRules
from cnprocd.surroundings import missing_of_host, missing_records
from cnprocd.wiring import Options, Outside, Parts, connect

ACCEPT_S = 2.0  # of a start, for the snapshot of the rules; 0 if the spool has waited that long for the same disk
STOP_BOUND_S = 10.0  # how long running hooks may go on after SIGTERM
COLLECTOR = (20_000, 20, 20)  # see gc.set_threshold


async def serve(options: Options, loaded: LoadedRules, outside: Outside) -> None:
    """Run a daemon until a signal stops it. Raises CnprocdError if it cannot start."""
    try:
        outside.output.attach(asyncio.get_running_loop())
        outside.manager.attach(asyncio.get_running_loop())
        own_directories(outside.owner, options, outside.log)
        parts = connect(options, loaded, outside)
        await start(parts, outside)
        await parts.stopping.wait()
        await stop(parts, outside)
    except OSError as error:
        raise CnprocdError(f"the connector failed: {error}", "see the journal, and `cnprocctl doctor`") from error


def own_directories(lock: OwnerLock, options: Options, log: Log) -> None:
    """Make and lock the state and runtime directories. Raises OwnedError: another daemon holds one.

    The daemon also works without them, for example on a read-only disk, so anything else is logged only.
    """
    for directory, mode in ((options.runtime_dir, 0o755), (options.state_dir, 0o700)):
        try:
            if not directory.is_dir():  # mkdir(2) of one that exists waits for a frozen disk (mnt_want_write)
                directory.mkdir(mode=mode, parents=True, exist_ok=True)
            lock.take([directory])
        except OwnedError:
            raise
        except (OSError, StateError) as error:
            log("warning", "directory_not_locked", path=str(directory), message=f"cannot lock {directory}: {error}")


async def start(parts: Parts, outside: Outside) -> None:
    """Take the signals, scan /proc, start everything, and report READY=1."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, parts.stopping.set)
    log_receive_buffer(parts.pipeline.source, parts.rules.loaded.settings.receive_buffer_bytes, outside.log)
    log_missing(parts.pipeline.source.no_taskstats_because, outside.log)
    known, hooks = parts.handover.take_processes(), parts.handover.take_hooks()
    known = known if parts.sockets_adopted else HandedOn()
    parts.handover.keep_files(parts.files.hand_on())
    parts.pipeline.recovery.report_handover()
    parts.pipeline.start(known, lambda scan: parts.follower.take_over(hooks, scan), parts.has_runner)
    loop.add_signal_handler(signal.SIGHUP, parts.rules.reload_soon)
    parts.dispatcher.start()
    parts.event_loop.start()
    parts.rules.enable_expired()
    parts.resolution.start()
    await parts.control.open()
    await parts.rules.accept_at_start(ACCEPT_S if parts.dispatcher.spool.durable else 0.0)
    # What start-up made stays, so the collector need not look at it again. It also runs less often, because reference
    # counts free what an event makes; 700 new objects are three milliseconds of a storm.
    gc.collect()
    gc.freeze()
    gc.set_threshold(*COLLECTOR)
    status = parts.rules.status_line()
    reload_ok = parts.rules.state.failed_load is None
    outside.log("notice", "started", **parts.rules.summary(), reload_ok=reload_ok, message=status)
    outside.manager.ready(status)
    outside.stalls.count()


async def stop(parts: Parts, outside: Outside) -> None:
    """Read what is queued, let running hooks finish within a bound, and unsubscribe unless the sockets are kept."""
    outside.manager.stopping()
    unread = await parts.event_loop.stop(parts.kept_by_manager)
    if parts.kept_by_manager:
        parts.handover.hand_on_processes(parts.pipeline.tracker)
        for number, fd in enumerate(parts.handover.hand_on_files(parts.files.hand_on())):
            outside.manager.store_fd(f"{PROGRAM}{number}", fd)
    else:
        unread += parts.pipeline.finish()
    parts.pipeline.flush_log()
    outside.stalls.flush()
    outside.log("notice", "stopping", unread=unread, message=_last_line(parts.rules.status_line(), unread))
    await parts.control.close()
    parts.hits.store_all()
    await parts.dispatcher.stop(STOP_BOUND_S)
    parts.handover.keep_hooks(parts.pipeline.tracker.family)
    parts.lookups.close()
    parts.resolution.stop()
    parts.names.close()
    await outside.output.close(LOG_BOUND_S)
    if not parts.kept_by_manager:
        with contextlib.suppress(OSError):
            parts.pipeline.source.close()


def log_missing(no_records_because: str, log: Log) -> None:
    """Log what this machine or container withholds."""
    found = missing_of_host()
    if no_records_because not in ("", REFUSED):
        found.append(missing_records(no_records_because))
    for one in found:
        log("warning", "limited", feature=one.feature, message=one.sentence)


def _last_line(status: str, unread: int) -> str:
    return f"{status}; {unread} events that were queued were not evaluated" if unread else status
