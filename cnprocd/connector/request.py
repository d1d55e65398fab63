"""What a kernel offers and what is asked of it, as values for the plan and the source. PURE."""

from __future__ import annotations

from dataclasses import dataclass, replace

from cnprocd.connector.filter import ConnectorFilter, TaskstatsFilter


@dataclass(frozen=True, slots=True)
class Features:
    """What this kernel offers beyond the oldest one. `--refuse` disables each, to behave as on an older kernel."""

    event_mask: bool = True  # struct proc_input (6.6)
    taskstats: bool = True  # exit records that mark the last thread (5.19, if configured)
    socket_filter: bool = True  # SO_ATTACH_FILTER was accepted

    def without_taskstats(self) -> Features:
        return replace(self, taskstats=False)


@dataclass(frozen=True, slots=True)
class Request:
    """One subscription: the event mask, the filter of either socket, and whether sequence gaps mean loss.

    `taskstats` None: no exit records. A kernel without event masks sends everything; then only the filters narrow.
    """

    mask: int
    connector: ConnectorFilter
    taskstats: TaskstatsFilter | None
    sequence: bool
