"""Parse the frames from the daemon to the runner: exactly those of wire.py, or WireError. PURE.

The runner is root and the daemon is not, so a compromised daemon may send anything. Types are taken as they are (text
never becomes a number), unknown keys are rejected, and every value is bounded, here or by the classes of wire.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from cnprocd.json_value import (
    JsonObject,
    as_dict,
    as_int,
    as_list,
    as_str,
    get_int,
    get_list,
    get_number,
    get_str,
    get_with,
)
from cnprocd.runner import wire


def _read_run(found: JsonObject) -> wire.Run:
    return wire.Run(
        attempt_id=get_str(found, "attempt_id"),
        attempt=get_int(found, "attempt", minimum=0, maximum=wire.MOST_COUNT),
        snapshot=get_str(found, "snapshot"),
        rule=get_str(found, "rule"),
        job_id=get_int(found, "job_id", minimum=0, maximum=wire.MOST_COUNT),
        limit_s=get_number(found, "limit_s"),
        kernel_time_ns=get_with(
            found, "kernel_time_ns", wire.nullable(lambda value: as_int(value, minimum=0, maximum=wire.MOST_COUNT))
        ),
        events_left_out=get_int(found, "events_left_out", minimum=0, maximum=wire.MOST_COUNT),
        events=get_list(found, "events", as_dict),
    )


def _read_terminate(found: JsonObject) -> wire.Terminate:
    return wire.Terminate(attempt_id=get_str(found, "attempt_id"), grace_s=get_number(found, "grace_s"))


def _read_resume(found: JsonObject) -> wire.Resume:
    return wire.Resume(attempt_id=get_str(found, "attempt_id"))


def _read_take_snapshot(found: JsonObject) -> wire.TakeSnapshot:
    keep = get_with(found, "keep", wire.nullable(lambda value: [as_str(one) for one in as_list(value)]))
    return wire.TakeSnapshot(wanted=get_str(found, "wanted"), keep=keep)


_FROM_DAEMON: Mapping[str, Callable[[JsonObject], wire.FromDaemon]] = {
    "hello": wire.read_hello,
    "run": _read_run,
    "terminate": _read_terminate,
    "resume": _read_resume,
    "take_snapshot": _read_take_snapshot,
}


def from_daemon(body: bytes) -> wire.FromDaemon:
    """Return the message of a body from the daemon. Raises WireError."""
    return wire.parse(body, _FROM_DAEMON)
