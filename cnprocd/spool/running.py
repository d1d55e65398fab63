"""What runs now and what has run, for `status`, metrics and `jobs log`. PURE."""

from __future__ import annotations

from dataclasses import dataclass

from cnprocd.json_value import JsonValue
from cnprocd.launch.render import message
from cnprocd.launch.request import AttemptResult
from cnprocd.rules.ruleset import RuleLog
from cnprocd.spool.job import Job

# An answer of the control socket has at most 1 MiB, and JSON may take three bytes for one of these.
MOST_KEPT_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True)
class RunningHook:
    """A hook that runs now, for `status`."""

    job_id: int
    rule: str
    hook_pid: int
    attempt: int
    running_s: float


@dataclass(slots=True)
class Totals:
    """Attempts since the start of the daemon, for `status` and metrics."""

    started: int = 0
    succeeded: int = 0
    failed: int = 0
    dead: int = 0
    interrupted: int = 0
    postponed: int = 0


def record_of_attempt(job: Job, hook_pid: int | None, result: AttemptResult) -> dict[str, JsonValue]:
    """Return the fields of a log record about an attempt."""
    return {
        "job_id": job.job_id,
        "rule": job.rule,
        "pid": job.events[0].get("pid") if job.events else None,
        "hook_pid": hook_pid,
        "attempt": job.attempts,
        "exit_code": result.exit_code,
        "signal": result.signal,
        "duration_ms": result.duration_ms,
        "latency_ms": result.latency_ms,
        "reason": result.reason,
    }


def record_of_death(job: Job, reason: str, on_failure: RuleLog | None) -> dict[str, JsonValue]:
    """Return the fields of a log record about a dead job."""
    pid = job.events[0].get("pid") if job.events else None
    fields: dict[str, JsonValue] = {"job_id": job.job_id, "rule": job.rule, "pid": pid, "reason": reason}
    if on_failure is not None and on_failure.message is not None and job.events:
        fields["message"] = message(on_failure.message, {**job.events[0], "job_id": job.job_id})
    return fields


class KeptOutput:
    """The output of one attempt that is kept with its job: whole lines from the start, up to a number of bytes."""

    def __init__(self, limit_bytes: int) -> None:
        self._left = min(limit_bytes, MOST_KEPT_BYTES)
        self._lines: list[str] = []
        self._full = False

    def add(self, line: str) -> None:
        """Keep a line, or note that lines are left out."""
        size = len(line.encode("utf-8", "replace")) + 1
        if size <= self._left:
            self._left -= size
            self._lines.append(line)
        elif not self._full:
            self._full, self._left = True, 0
            self._lines.append("[further output is not kept]")

    @property
    def text(self) -> str:
        """The lines, each with its newline; empty without output."""
        return "".join(f"{line}\n" for line in self._lines)
