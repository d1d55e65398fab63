"""The exit status of a process whose exit records are missing: the best of its threads' statuses. PURE."""

from __future__ import annotations

from typing import NamedTuple

from cnprocd.connector.event import Exit
from cnprocd.connector.status import CORE_FLAG

_TOGETHER_NS = 5_000_000  # threads of a group exit end within a few milliseconds of each other


class StatusEvidence(NamedTuple):
    """The best exit status among a process's threads so far, if no exit record marks the last thread."""

    status: int
    at_ns: int
    of_leader: bool

    @classmethod
    def of(cls, event: Exit) -> StatusEvidence:
        return cls(event.exit_code, event.timestamp_ns, event.process_pid == event.process_tgid)

    def after(self, event: Exit) -> StatusEvidence:
        """Return the better evidence: this one, or the exit of another thread.

        A signal ends all threads, so it wins, with its core flag, which only one of them shows. Of two exit codes the
        later one wins, unless they came together. Then one of them belongs to exit_group: not the 0 of a thread that
        was ending anyway, and the leader's rather than another thread's.
        """
        other = StatusEvidence.of(event)
        if self.status & 0x7F or other.status & 0x7F:
            first, second = (self, other) if self.status & 0x7F else (other, self)
            same_signal = first.status & 0x7F == second.status & 0x7F
            return first._replace(status=first.status | second.status & CORE_FLAG) if same_signal else first
        if abs(other.at_ns - self.at_ns) > _TOGETHER_NS:
            return max(self, other, key=_when)
        return max(self, other, key=_weight)


def _when(evidence: StatusEvidence) -> int:
    return evidence.at_ns


def _weight(evidence: StatusEvidence) -> tuple[bool, bool, int]:
    return evidence.status != 0, evidence.of_leader, evidence.at_ns
