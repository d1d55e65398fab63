"""Which match a record is about, and on which machine. PURE.

The id of a match is a digest of what makes it unique: the boot, the rule, the event, the process or thread, and the
kernel's time of the event. Each daemon that reads the event finds the same values, so the id stays the same if a match
is reported again: after kill -9, by the next daemon, or by another route of the log.

A recovered exit has no event. Its exit record is then the same for every daemon that reads it, and the process's begin
and lifetime in it replace the kernel's time. Without a record, the start of the process does: only the daemon that
tracked the process can report its exit. If that is unknown as well, the id is unique: two such matches may be of two
processes that had one PID after another.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import NamedTuple

from cnprocd.rules.compile import Match

DIGEST_BYTES = 16


class Machine(NamedTuple):
    """The machine of a match. Ids are 32 hexadecimal digits, as in the journal's _MACHINE_ID and _BOOT_ID."""

    host: str | None = None
    machine_id: str | None = None
    boot_id: str | None = None


UNKNOWN_MACHINE = Machine()


def match_id(boot_id: str, match: Match, unique: str) -> str:
    """Return the id of a match: 32 hexadecimal digits. `unique` replaces a time that is unknown."""
    occurrence, process = match.occurrence, match.occurrence.process
    thread = f"/{occurrence.tid}" if occurrence.of_thread else ""
    moment, record = str(occurrence.kernel_time_ns), occurrence.usage
    if occurrence.kernel_time_ns is None:
        # The start time may differ: one daemon knows it from the fork event, the next one computes it.
        if record is not None:
            moment = f"begun {record.begin_time_s} lived {record.lifetime_us}"
        else:
            moment = f"unknown {unique}" if process.start_ns is None else f"started {process.start_ns}"
    key = ":".join((boot_id, f"{process.tgid}{thread}", moment, match.event, match.rule.name))
    return blake2b(key.encode("utf-8", "surrogateescape"), digest_size=DIGEST_BYTES).hexdigest()
