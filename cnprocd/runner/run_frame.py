"""The frame that asks the runner for an attempt."""

from __future__ import annotations

from cnprocd.launch.program import HookRefusedError
from cnprocd.launch.request import LaunchRequest
from cnprocd.runner import wire


def run_of(request: LaunchRequest) -> wire.Run:
    """Return the frame for a request. Raises HookRefusedError: the runner would close the connection."""
    try:
        message = wire.Run(
            attempt_id=request.attempt_id,
            attempt=request.attempt,
            snapshot=request.snapshot,
            rule=request.rule,
            job_id=request.job_id,
            limit_s=request.limit_s,
            kernel_time_ns=request.kernel_time_ns,
            events_left_out=request.events_left_out,
            events=request.events,
        )
    except wire.WireError as error:
        raise HookRefusedError(f"the job cannot be sent to the runner: {error}") from error
    if len(wire.frame(message)) > wire.MOST_FRAME_BYTES:
        raise HookRefusedError(f"its newest event is longer than {wire.MOST_FRAME_BYTES} bytes")
    return message
