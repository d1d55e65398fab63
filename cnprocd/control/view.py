"""The state of the daemon as JSON values, for `status` and metrics. Reads counters only: changes nothing, never blocks.

Times in nanoseconds are of the wall clock, since 1970; durations are in seconds.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Protocol

from cnprocd import __version__
from cnprocd.connector import uapi
from cnprocd.connector.request import Features
from cnprocd.dispatch import Dispatcher
from cnprocd.edge import EdgeState
from cnprocd.hits import Hits
from cnprocd.json_value import JsonDict, get_int
from cnprocd.load_state import LoadState
from cnprocd.output.log import LogOutput
from cnprocd.owner_lock import OwnerLock
from cnprocd.pipeline import Pipeline
from cnprocd.rules.compile import CompiledRule
from cnprocd.rules.plan import Plan, identity_of
from cnprocd.rules.problems import LoadedRules, RulesError
from cnprocd.stall_meter import Figures
from cnprocd.stalls import Stalls

NS = 1_000_000_000
MOST_QUEUES = 1000  # an answer of the control socket has at most 1 MiB


class DaemonView(Protocol):
    """The parts of the daemon that the control socket shows and steers."""

    @property
    def loaded(self) -> LoadedRules: ...
    @property
    def plan(self) -> Plan: ...
    @property
    def features(self) -> Features: ...
    @property
    def unwatched(self) -> frozenset[str]: ...
    @property
    def pipeline(self) -> Pipeline: ...
    @property
    def dispatcher(self) -> Dispatcher: ...
    @property
    def load_state(self) -> LoadState: ...
    @property
    def hits(self) -> Hits: ...
    @property
    def stalls(self) -> Stalls: ...
    @property
    def started_ns(self) -> int: ...
    @property
    def output(self) -> LogOutput: ...
    @property
    def owner(self) -> OwnerLock: ...
    @property
    def edges(self) -> Sequence[EdgeState]: ...
    @property
    def kept_by_manager(self) -> bool: ...

    async def reload(self) -> RulesError | None: ...


def status(daemon: DaemonView) -> JsonDict:
    """Return all that `cnprocctl status` shows."""
    return {
        "version": __version__,
        "pid": os.getpid(),
        "started_ns": daemon.started_ns,
        "uptime_s": (time.time_ns() - daemon.started_ns) / NS,
        "owned_directories": [str(path) for path in daemon.owner.directories],
        "files": [str(path) for path in daemon.loaded.files],
        "rules_hash": daemon.loaded.rules_hash,
        "reload": _reload(daemon.load_state),
        "hits_since_ns": daemon.hits.since_ns,
        "rules": rules(daemon),
        "events": _events(daemon),
        "lost": _lost(daemon),
        "table": {
            "kept": daemon.plan.tracking.table,
            "processes": len(daemon.pipeline.tracker.table),
            "hooks_alive": daemon.pipeline.tracker.family.alive,
        },
        "jobs": jobs(daemon),
        "log": _log(daemon.output),
        "stalls": _stalls(daemon.stalls.figures()),
        "edges": [{"name": edge.name, "waiting": edge.waiting, **asdict(edge.counters)} for edge in daemon.edges],
        "kernel": _kernel(daemon),
    }


def _reload(state: LoadState) -> JsonDict:
    """Return the outcome of the last load of the rules, and the files that differ from them (None: unknown)."""
    failed, changed = state.failed_load, state.changed_files
    return {
        "ok": failed is None,
        "at_start": failed is not None and failed.step == "start",
        "accepted": failed is None or failed.step != "acceptance",
        "time_ns": state.time_ns,
        "error": None if failed is None else failed.error.what,
        "loaded_ns": state.loaded_ns,
        "changed_files": None if changed is None else [str(path) for path in changed],
    }


def rules(daemon: DaemonView) -> list[JsonDict]:
    """Return every rule of the files with its hits, including disabled rules."""
    counts = daemon.pipeline.counts
    compiled = {rule.name: rule for rule in daemon.pipeline.matcher.rules}
    return [
        {
            "name": rule.name,
            "description": rule.description,
            "enabled": rule.enabled,
            "disabled_until_ns": daemon.loaded.disabled.get(rule.name),
            "events": list(rule.events),
            "hits": counts.rules[rule.name],
            "last_hit_ns": counts.rule_last_ns.get(rule.name),
            "counted": daemon.pipeline.flood.counted[rule.name],
            "hook": rule.run is not None,
            "identity": _identity(compiled.get(rule.name), daemon),
        }
        for rule in daemon.loaded.rules
    ]


def _identity(rule: CompiledRule | None, daemon: DaemonView) -> str | None:
    return None if rule is None else identity_of(rule, daemon.features, daemon.unwatched)


def _events(daemon: DaemonView) -> JsonDict:
    counts, source = daemon.pipeline.counts, daemon.pipeline.source
    return {
        "asked": mask_names(daemon.plan.request.mask),
        "delivered": source.events_seen,
        "records_delivered": source.records_seen,
        "occurrences": dict(counts.kinds),
        "matches": counts.matches,
        "counted": daemon.pipeline.flood.counted.total(),
        "deferred": daemon.pipeline.crowd.waiting,
        "not_remembered": daemon.dispatcher.not_remembered,
        "failed": daemon.pipeline.failures.count,
        "recovered": daemon.pipeline.recovery.recovered,
        "identity_unknown": [
            {"attribute": attribute, "reason": reason, "count": count}
            for (attribute, reason), count in sorted(counts.unknown.items())
        ],
        "resyncs": daemon.pipeline.recovery.resyncs,
        "rejected": {
            "foreign_sender": source.rejects.foreign_sender,
            "wrong_length": source.rejects.wrong_length,
            "truncated": source.rejects.truncated,
            "wrong_id": source.rejects.wrong_id,
            "unknown_event": source.rejects.unknown_event,
        },
    }


def _lost(daemon: DaemonView) -> JsonDict:
    losses = daemon.pipeline.source.losses
    return {
        "total": losses.total(),
        "connector_drops": losses.connector_drops,
        "taskstats_drops": losses.taskstats_drops,
        "sequence_gaps": losses.sequence_gaps,
        "overruns": losses.overruns,
    }


def jobs(daemon: DaemonView) -> JsonDict:
    """Return the counts of the queue, and the hooks that run now."""
    counts, launcher = daemon.dispatcher.spool.counts(), daemon.dispatcher.scheduler.launcher
    return {
        "waiting": counts.waiting,
        "running": counts.running,
        "done": counts.done,
        "dead": counts.dead,
        "oldest_waiting_s": counts.oldest_waiting_s,
        "duplicates": counts.duplicates,
        "shed": counts.shed,
        "deferred": len(daemon.dispatcher.postponing.backlog),
        "durable": counts.durable,
        "why_not_durable": counts.why,
        "runner_silent": not launcher.ready and not launcher.observes_only,
        "hooks_refused": launcher.observes_only,
        "latency": _latency(daemon),
        "queues": _queues(daemon),
        "hooks": [
            {
                "job_id": hook.job_id,
                "rule": hook.rule,
                "pid": hook.hook_pid,
                "attempt": hook.attempt,
                "running_s": hook.running_s,
            }
            for hook in daemon.dispatcher.scheduler.running()
        ],
    }


def _queues(daemon: DaemonView) -> list[JsonDict]:
    """Return the queue of each rule that has waiting, running or dropped jobs, the longest first, up to a bound."""
    spool = daemon.dispatcher.spool
    running = Counter(hook.rule for hook in daemon.dispatcher.scheduler.running())
    queues = spool.queues()
    found: list[JsonDict] = [
        {
            "rule": rule,
            "waiting": queues[rule].waiting if rule in queues else 0,
            "running": running[rule],
            "oldest_waiting_s": queues[rule].oldest_waiting_s if rule in queues else None,
            "shed": spool.shedding.by_rule[rule],
        }
        for rule in sorted({*queues, *running, *spool.shedding.by_rule})
    ]
    return sorted(found, key=lambda queue: -get_int(queue, "waiting"))[:MOST_QUEUES]


def _latency(daemon: DaemonView) -> JsonDict:
    """Return the histogram of times from the kernel's event to the first instruction of its hook."""
    histogram = daemon.dispatcher.scheduler.latency
    return {
        "bounds_ms": list(histogram.bounds_ms),
        "counts": list(histogram.counts),
        "sum_ms": histogram.sum_ms,
        "max_ms": histogram.max_ms,
        "p50_ms": histogram.quantile_ms(0.5),
        "p99_ms": histogram.quantile_ms(0.99),
    }


def _log(output: LogOutput) -> JsonDict:
    """Return the records that wait for the log output, and those that were dropped."""
    lost = output.lost
    return {
        "queued": output.queued,
        "lost": lost.records,
        "lost_matches": lost.matches,
        "lost_by_rule": dict(lost.by_rule),
    }


def _stalls(figures: Figures) -> JsonDict:
    """Return how long the event loop did not wait for events, since start and in the last minute."""
    return {
        "worst_s": figures.worst_s,
        "p99_s": figures.p99_s,
        "worst_last_minute_s": figures.worst_last_minute_s,
        "p99_last_minute_s": figures.p99_last_minute_s,
        "worst_cause": figures.worst_cause,
    }


def _kernel(daemon: DaemonView) -> JsonDict:
    source, features = daemon.pipeline.source, daemon.features
    return {
        "release": os.uname().release,
        "event_mask": features.event_mask,
        "taskstats": features.taskstats,
        "no_taskstats_because": source.no_taskstats_because or None,
        "socket_filter": features.socket_filter,
        "receive_buffer_bytes": source.granted_buffer_bytes,
        "receive_buffer_events": source.granted_buffer_bytes // uapi.QUEUED_EVENT_BYTES,
        "kernel_log": not daemon.pipeline.kernel_log.why_unreadable,
        "no_kernel_log_because": daemon.pipeline.kernel_log.why_unreadable or None,
        "socket_kept_by_manager": daemon.kept_by_manager,
    }


def mask_names(mask: int) -> list[str]:
    """Return the events of a mask by their names in the rule language."""
    return [name for bit, name in uapi.EVENT_NAMES.items() if mask & bit]
