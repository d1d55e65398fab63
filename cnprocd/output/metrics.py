"""Render the daemon's counters as Prometheus text, for node_exporter's textfile collector and `metrics`. PURE.

`render` takes the JSON of `cnprocctl status --json`. Names and units follow the conventions of Prometheus:
base units (seconds, bytes), `_total` for counters, one name per quantity with labels for its kinds. No label has values
that a process can choose: a label for the comm would make a series per process name, a million from a hostile process.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from cnprocd.json_value import (
    JsonObject,
    as_dict,
    as_int,
    as_number,
    as_str,
    get_bool,
    get_dict,
    get_dict_or_none,
    get_int,
    get_int_or_none,
    get_list,
    get_map,
    get_number,
    get_number_or_none,
    get_str,
)


class _Metric(NamedTuple):
    name: str
    kind: str
    help: str
    samples: list[tuple[dict[str, str], float]]


def render(status: JsonObject) -> str:
    """Return the whole exposition, ending in a newline. Raises JsonError if `status` is not a status."""
    lines: list[str] = []
    for metric in _metrics(status):
        lines += [f"# HELP {metric.name} {metric.help}", f"# TYPE {metric.name} {metric.kind}"]
        lines += [f"{metric.name}{_labels(labels)} {_number(value)}" for labels, value in metric.samples]
    lines += _histogram(get_dict_or_none(get_dict(status, "jobs"), "latency"))
    return "\n".join(lines) + "\n"


def _metrics(status: JsonObject) -> Iterable[_Metric]:
    """Yield every metric, in the order of the page."""
    yield from _of_events(status)
    yield from _of_floods(status)
    yield from _of_reload(status)
    yield from _of_losses(status)
    yield from _of_jobs(status)
    yield from _of_stalls(status)
    yield from _of_log(status)
    yield from _of_edges(status)
    buffer_bytes = get_int(get_dict(status, "kernel"), "receive_buffer_bytes")
    yield _one("cnprocd_receive_buffer_bytes", "gauge", "Granted size of the receive buffer.", buffer_bytes)


def _of_events(status: JsonObject) -> Iterable[_Metric]:
    events, rules = get_dict(status, "events"), get_list(status, "rules", as_dict)
    yield _one("cnprocd_build_info", "gauge", "Version of the daemon.", 1, version=get_str(status, "version"))
    yield _one(
        "cnprocd_start_time_seconds",
        "gauge",
        "Start of the daemon, seconds since 1970.",
        get_int(status, "started_ns") / 1e9,
    )
    yield _Metric(
        "cnprocd_datagrams_total",
        "counter",
        "Messages that the kernel delivered, by source.",
        [
            ({"source": "connector"}, get_int(events, "delivered")),
            ({"source": "taskstats"}, get_int(events, "records_delivered")),
        ],
    )
    yield _Metric(
        "cnprocd_events_total",
        "counter",
        "Events that were evaluated by the rules, by kind.",
        [({"kind": kind}, count) for kind, count in sorted(get_map(events, "occurrences", as_int).items())],
    )
    yield _one(
        "cnprocd_event_failures_total",
        "counter",
        "Events or matches that an unexpected exception cost.",
        get_int(events, "failed", 0),
    )
    yield _Metric(
        "cnprocd_matches_total",
        "counter",
        "Matches by rule.",
        [({"rule": get_str(rule, "name")}, get_int(rule, "hits")) for rule in rules],
    )
    yield _Metric(
        "cnprocd_rule_last_match_timestamp_seconds",
        "gauge",
        "Time of the last match of a rule, seconds since 1970.",
        [
            ({"rule": get_str(rule, "name")}, last_hit_ns / 1e9)
            for rule in rules
            if (last_hit_ns := get_int_or_none(rule, "last_hit_ns"))
        ],
    )
    yield _one(
        "cnprocd_rules_info",
        "gauge",
        "Hash of the rules in force: the same on every host with the same rules.",
        1,
        hash=get_str(status, "rules_hash"),
    )
    yield _one("cnprocd_rules", "gauge", "Rules in force.", sum(get_bool(rule, "enabled") for rule in rules))


def _of_floods(status: JsonObject) -> Iterable[_Metric]:
    events, rules = get_dict(status, "events"), get_list(status, "rules", as_dict)
    yield _Metric(
        "cnprocd_counted_matches_total",
        "counter",
        "Matches that a flood left counted only, by rule.",
        [({"rule": get_str(rule, "name")}, get_int(rule, "counted", 0)) for rule in rules],
    )
    yield _one(
        "cnprocd_matches_not_remembered_total",
        "counter",
        "Matches that are not in the history, because there were too many.",
        get_int(events, "not_remembered", 0),
    )


def _of_reload(status: JsonObject) -> Iterable[_Metric]:
    reload = get_dict(status, "reload")
    yield _one(
        "cnprocd_last_reload_successful",
        "gauge",
        "1 if the last load of the rule files succeeded, else 0.",
        get_bool(reload, "ok"),
    )
    yield _one(
        "cnprocd_last_reload_timestamp_seconds",
        "gauge",
        "Time of the last load of the rule files, successful or not, seconds since 1970.",
        get_int(reload, "time_ns") / 1e9,
    )
    yield _one(
        "cnprocd_rules_loaded_timestamp_seconds",
        "gauge",
        "Since when the rules are in force, seconds since 1970.",
        get_int(reload, "loaded_ns") / 1e9,
    )
    if reload["changed_files"] is not None:  # else it is unknown
        yield _one(
            "cnprocd_rule_files_changed",
            "gauge",
            "Rule files that differ from the rules in force.",
            len(get_list(reload, "changed_files", as_str)),
        )


def _of_losses(status: JsonObject) -> Iterable[_Metric]:
    events, lost = get_dict(status, "events"), get_dict(status, "lost")
    yield _Metric(
        "cnprocd_lost_events_total",
        "counter",
        "Events that the kernel did not deliver, by how the loss was detected.",
        [({"source": name}, get_int(lost, name)) for name in ("connector_drops", "taskstats_drops", "sequence_gaps")],
    )
    yield _one(
        "cnprocd_overruns_total", "counter", "Number of times the receive buffer was full.", get_int(lost, "overruns")
    )
    yield _one(
        "cnprocd_recovered_processes_total",
        "counter",
        "Processes found gone after a loss and evaluated by the rules.",
        get_int(events, "recovered"),
    )
    yield _Metric(
        "cnprocd_identity_unknown_total",
        "counter",
        "Times that a rule could not be decided because an attribute of the process was unknown.",
        [
            ({"attribute": get_str(one, "attribute"), "reason": get_str(one, "reason")}, get_int(one, "count"))
            for one in get_list(events, "identity_unknown", as_dict, ())
        ],
    )
    yield _Metric(
        "cnprocd_rejected_datagrams_total",
        "counter",
        "Datagrams that were rejected, by reason.",
        [({"reason": reason}, count) for reason, count in sorted(get_map(events, "rejected", as_int).items())],
    )
    yield _one(
        "cnprocd_tracked_processes", "gauge", "Processes in the table.", get_int(get_dict(status, "table"), "processes")
    )


def _of_jobs(status: JsonObject) -> Iterable[_Metric]:
    jobs = get_dict(status, "jobs")
    yield _Metric(
        "cnprocd_jobs",
        "gauge",
        "Jobs by state.",
        [({"state": state}, get_int(jobs, state)) for state in ("waiting", "running", "done", "dead")],
    )
    yield _one(
        "cnprocd_oldest_job_age_seconds",
        "gauge",
        "Age of the oldest waiting job; 0 if none waits.",
        get_number_or_none(jobs, "oldest_waiting_s") or 0,
    )
    yield from _of_queues(status)
    yield _one("cnprocd_shed_jobs_total", "counter", "Jobs dropped because the queue was full.", get_int(jobs, "shed"))
    yield _one(
        "cnprocd_spool_durable",
        "gauge",
        "1 while waiting jobs would survive a crash, else 0.",
        get_bool(jobs, "durable"),
    )


def _of_stalls(status: JsonObject) -> Iterable[_Metric]:
    stalls = get_dict_or_none(status, "stalls")
    if stalls is None:
        return
    for quantity, words in (("worst", "Longest time"), ("p99", "99th percentile of the times")):
        yield _Metric(
            f"cnprocd_stall_{quantity}_seconds",
            "gauge",
            f"{words} in which the event loop did not wait for events.",
            [
                ({"since": "start"}, get_number(stalls, f"{quantity}_s")),
                ({"since": "last_minute"}, get_number(stalls, f"{quantity}_last_minute_s")),
            ],
        )


def _of_log(status: JsonObject) -> Iterable[_Metric]:
    log = get_dict_or_none(status, "log")
    if log is not None:
        yield _one(
            "cnprocd_log_queued_records", "gauge", "Log records that wait for the output.", get_int(log, "queued")
        )
        lost, matches = get_int(log, "lost"), get_int(log, "lost_matches")
        samples: list[tuple[dict[str, str], float]] = [
            ({"kind": "match"}, matches),
            ({"kind": "other"}, lost - matches),
        ]
        yield _Metric("cnprocd_log_lost_records_total", "counter", "Log records that were dropped, by kind.", samples)


def _of_edges(status: JsonObject) -> Iterable[_Metric]:
    """Yield the work beside the event loop, by edge. The names of edges are constants of the daemon."""
    edges = get_list(status, "edges", as_dict, ())
    ends = ("done", "late", "refused", "failed", "stopped")
    yield _Metric(
        "cnprocd_edge_pieces_total",
        "counter",
        "Pieces of work beside the event loop, by edge and end.",
        [({"edge": get_str(edge, "name"), "end": end}, get_int(edge, end)) for edge in edges for end in ends],
    )
    for name, kind, key, text in (
        ("cnprocd_edge_waiting_pieces", "gauge", "waiting", "Pieces of work that wait for a worker."),
        ("cnprocd_edge_stuck_workers", "gauge", "stuck", "Workers that do not answer."),
        ("cnprocd_edge_replaced_workers_total", "counter", "replaced", "Workers that were started in place of others."),
    ):
        yield _Metric(name, kind, text, [({"edge": get_str(edge, "name")}, get_int(edge, key)) for edge in edges])


def _of_queues(status: JsonObject) -> Iterable[_Metric]:
    """Yield what belongs to the queue of one rule, for every rule with a hook or a queue."""
    found = {get_str(queue, "rule"): queue for queue in get_list(get_dict(status, "jobs"), "queues", as_dict)}
    hooks = (get_str(rule, "name") for rule in get_list(status, "rules", as_dict) if get_bool(rule, "hook"))
    queues = [({"rule": rule}, found.get(rule, {})) for rule in dict.fromkeys((*hooks, *found))]
    for name, kind, key, text in (
        ("cnprocd_rule_waiting_jobs", "gauge", "waiting", "Waiting jobs by rule."),
        ("cnprocd_rule_running_hooks", "gauge", "running", "Running hooks by rule."),
        (
            "cnprocd_rule_oldest_job_age_seconds",
            "gauge",
            "oldest_waiting_s",
            "Age of a rule's oldest waiting job, or 0.",
        ),
        ("cnprocd_rule_shed_jobs_total", "counter", "shed", "Jobs of a rule that were dropped from a full queue."),
    ):
        samples = [(labels, (get_number_or_none(queue, key) if queue else None) or 0) for labels, queue in queues]
        yield _Metric(name, kind, text, samples)


def _one(name: str, kind: str, help_text: str, value: float, **labels: str) -> _Metric:
    return _Metric(name, kind, help_text, [(labels, value)])


def _histogram(latency: JsonObject | None) -> list[str]:
    """Return the histogram from the kernel's event to the first instruction of its hook; nothing without one."""
    if latency is None:
        return []
    name, seen = "cnprocd_hook_latency_seconds", 0
    lines = [
        f"# HELP {name} From the kernel's event to the first instruction of its hook.",
        f"# TYPE {name} histogram",
    ]
    for bound_ms, count in zip(
        [*get_list(latency, "bounds_ms", as_number), None], get_list(latency, "counts", as_int), strict=True
    ):
        seen += count
        bound = "+Inf" if bound_ms is None else _number(bound_ms / 1000)
        lines.append(f'{name}_bucket{{le="{bound}"}} {seen}')
    return [*lines, f"{name}_sum {_number(get_number(latency, 'sum_ms') / 1000)}", f"{name}_count {seen}"]


def _labels(labels: Mapping[str, str]) -> str:
    shown = ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items())
    return f"{{{shown}}}" if shown else ""


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(float(value))
