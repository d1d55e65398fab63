"""Verbs that ask the running daemon: reload, status, metrics. They import no pydantic, so they start at once."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from cnprocd.cli.grammar import Options
from cnprocd.cli.problem_text import painted, problem_of
from cnprocd.cli.terminal import Style, ago, clock, columns, counted, duration, print_json, size, state_text
from cnprocd.control.client import Client
from cnprocd.control.problems import problem_value
from cnprocd.errors import EX_OK
from cnprocd.json_value import (
    JsonObject,
    JsonValue,
    as_dict,
    as_int,
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
    get_str_or_none,
)
from cnprocd.rules.problems import Problem, RulesError

MOST_QUEUES = 5  # that are shown
RELOAD_TIMEOUT_S = 120.0  # a large rule file on a busy machine; systemd's own limit for ExecReload is 90 s


def reload(options: Options) -> int:
    """Load the rule files. If one is invalid, show the problems; the daemon keeps the current rules."""
    with Client(options.runtime_dir, RELOAD_TIMEOUT_S) as client:
        done = client.ask("reload")
    warnings = _warnings(done)
    if options.json:
        print_json({**done, "warnings": [{"kind": kind, **problem_value(problem)} for kind, problem in warnings]})
        return EX_OK
    style = Style(sys.stderr)
    for kind, problem in warnings:
        print(painted(problem, "yellow", f"warning ({kind})", style), file=sys.stderr)
    print(f"{counted(get_int(done, 'rules'), 'rule')} in force, from {', '.join(get_list(done, 'files', as_str))}")
    return EX_OK


def _warnings(done: JsonObject) -> list[tuple[str, Problem]]:
    """Return the warnings that `check` gives about the files that the daemon loaded.

    If they cannot be read here, the daemon's own warnings remain: it knows nothing of hooks, which only root can check.
    """
    from cnprocd.cli.ruleset import warnings_of_files  # imports pydantic

    try:
        return warnings_of_files([Path(file) for file in get_list(done, "files", as_str)])
    except (RulesError, OSError):
        return [("advice", problem_of(value)) for value in get_list(done, "warnings", as_dict)]


def metrics(options: Options) -> int:
    """Print the counters as Prometheus text, as in the metrics file."""
    with Client(options.runtime_dir) as client:
        found = get_str(client.ask("metrics"), "text")
    if options.json:
        print_json({"metrics": found})
    else:
        print(found, end="")
    return EX_OK


def status(options: Options) -> int:
    """Show daemon health, and the hits of each rule."""
    with Client(options.runtime_dir) as client:
        found = client.ask("status")
    if options.json:
        print_json(found)
        return EX_OK
    style = Style()
    for line in (*_head(found, style), "", *_rules(found, style)):
        print(line)
    return EX_OK


def _head(found: JsonObject, style: Style) -> list[str]:
    events, jobs, table = get_dict(found, "events"), get_dict(found, "jobs"), get_dict(found, "table")
    version, pid, uptime_s = get_str(found, "version"), get_int(found, "pid"), get_number(found, "uptime_s")
    durable = get_bool(jobs, "durable")
    lines = [
        ("daemon", f"cnprocd {version}, PID {pid}, up {duration(uptime_s)}"),
        ("rules", ", ".join(get_list(found, "files", as_str))),
        ("hash", f"{get_str(found, 'rules_hash')}, loaded {ago(get_int(get_dict(found, 'reload'), 'loaded_ns'))}"),
        ("owner", _owner(get_list(found, "owned_directories", as_str, ()), style)),
        *_reload(get_dict(found, "reload"), style),
        ("requested", " ".join(get_list(events, "asked", as_str)) or "nothing"),
        (
            "delivered",
            f"{counted(get_int(events, 'delivered'), 'event')}, "
            f"{counted(get_int(events, 'records_delivered'), 'exit record')}; "
            f"{counted(get_int(events, 'matches'), 'match', 'es')}",
        ),
        ("lost", _lost(get_map(found, "lost", as_int), get_int(events, "recovered"), style)),
        (
            "table",
            f"{get_int(table, 'processes')} processes" if get_bool(table, "kept") else "not needed by these rules",
        ),
        ("hits", f"counted since {clock(get_int(found, 'hits_since_ns'))}, across restarts"),
        ("jobs", _jobs(jobs)),
        *(("queue", text) for text in _queues(get_list(jobs, "queues", as_dict), style)),
        ("durable", style("green", "yes") if durable else style("red", f"NO: {get_str(jobs, 'why_not_durable')}")),
        ("latency", _latency(get_dict_or_none(jobs, "latency"))),
        ("stalls", _stalls(get_dict_or_none(found, "stalls"))),
        *(("edges", text) for text in _edges(get_list(found, "edges", as_dict, ()), style)),
        *_log(get_dict_or_none(found, "log"), style),
        ("kernel", _kernel(get_dict(found, "kernel"))),
    ]
    unknown = get_list(events, "identity_unknown", as_dict)
    if unknown:
        lines.append(("unknown", style("yellow", ", ".join(map(_unknown, unknown)))))
    if counted_only := get_int(events, "counted", 0):
        rules = [(get_int(rule, "counted", 0), get_str(rule, "name")) for rule in get_list(found, "rules", as_dict)]
        lines.append(("flood", style("yellow", _counted(counted_only, rules))))
    if deferred := get_int(events, "deferred", 0):
        lines.append(("flood", f"{deferred} matches wait to be reported, until no events wait"))
    if postponed := get_int(jobs, "deferred", 0):
        lines.append(("flood", f"{postponed} matches wait until their jobs are made"))
    if forgotten := get_int(events, "not_remembered", 0):
        lines.append(("history", style("yellow", f"{forgotten} matches are not in the history: there were too many")))
    if failed := get_int(events, "failed", 0):
        lines.append(("failed", style("red", f"{failed} events or matches, by unexpected exceptions: see the log")))
    rejected = sum(get_map(events, "rejected", as_int).values())
    if rejected:
        lines.append(("spoofed", style("red", f"{rejected} datagrams that the kernel did not send")))
    return [f"{style('bold', name.rjust(10))}  {text}" for name, text in lines]


def _counted(total: int, rules: list[tuple[int, str]]) -> str:
    """Return the matches that were counted and not reported, with the rules that have most of them."""
    shown = [(count, name) for count, name in sorted(rules, reverse=True)[:MOST_QUEUES] if count]
    parts = [f"{name} {count}" for count, name in shown]
    known, listed = sum(count for count, _ in rules), sum(count for count, _ in shown)
    parts += [f"other rules {known - listed}"] if known > listed else []
    parts += [f"removed rules {total - known}"] if total > known else []
    return f"{total} matches were counted and not reported: {', '.join(parts)}"


def _owner(directories: list[str], style: Style) -> str:
    if not directories:
        return style("yellow", "no directory is locked: another daemon could use the same ones")
    return f"holds {', '.join(directories)}"


def _edges(edges: list[JsonObject], style: Style) -> Iterator[str]:
    """Return one line for each edge where work was given up, or is stuck."""
    for edge in edges:
        counts = ((get_int(edge, key), key) for key in ("late", "refused", "failed", "replaced", "waiting"))
        found = [f"{count} {key}" for count, key in counts if count]
        if stuck := get_int(edge, "stuck"):
            found.insert(0, style("red", f"{stuck} STUCK"))
        if found:
            yield f"{get_str(edge, 'name')}: {', '.join(found)}; {get_int(edge, 'done')} done"


def _log(log: JsonObject | None, style: Style) -> list[tuple[str, str]]:
    """Return the records that wait for the output and those that were dropped, if there are any."""
    if log is None or not (get_int(log, "queued") or get_int(log, "lost")):
        return []
    lost, matches = get_int(log, "lost"), get_int(log, "lost_matches")
    text = f"{counted(get_int(log, 'queued'), 'record')} waiting"
    return [("log", text + (style("red", f"; {lost} LOST, {matches} of them matches") if lost else ""))]


def _reload(reload: JsonObject, style: Style) -> list[tuple[str, str]]:
    """Return the outcome of the last reload, if the files differ from the rules in force."""
    loaded = ago(get_int(reload, "loaded_ns"))
    if not get_bool(reload, "ok"):
        text = f"FAILED {ago(get_int(reload, 'time_ns'))}: {get_str(reload, 'error')}; these rules are from {loaded}"
        if get_bool(reload, "at_start"):
            text = f"the rule files are INVALID, and the rules accepted last are in force: {get_str(reload, 'error')}"
        if not get_bool(reload, "accepted", True):
            text = f"the rules are in force and NOT ACCEPTED: {get_str(reload, 'error')}; this is tried again"
        return [("reload", style("red", text))]
    if reload["changed_files"] is None:
        return [("reload", style("yellow", "unknown: the daemon cannot read the rule files at present"))]
    changed = get_list(reload, "changed_files", as_str)
    text = f"NOT LOADED: {', '.join(changed)}; these rules are from {loaded}"
    return [("reload", style("yellow", text))] if changed else []


def _lost(lost: dict[str, int], recovered: int, style: Style) -> str:
    total = lost.pop("total")
    if not total:
        return style("green", "nothing")
    known = ", ".join(f"{count} {key.replace('_', ' ')}" for key, count in lost.items() if key != "overruns" and count)
    return style("red", f"{total} events ({known}), {recovered} processes recovered")


def _unknown(one: JsonObject) -> str:
    """Return an attribute that rules needed and could not have."""
    return f"{get_int(one, 'count')} {get_str(one, 'attribute')} ({get_str(one, 'reason')})"


def _jobs(jobs: JsonObject) -> str:
    counts = ", ".join(f"{get_int(jobs, state)} {state}" for state in ("waiting", "running", "dead", "done"))
    if get_int(jobs, "waiting"):
        counts += f"; the oldest waits for {duration(get_number_or_none(jobs, 'oldest_waiting_s'))}"
    if get_bool(jobs, "runner_silent", False):
        counts += "; the RUNNER DOES NOT ANSWER"
    if get_bool(jobs, "hooks_refused", False):
        counts += "; hooks are refused (--observe-only)"
    dropped = get_int(jobs, "shed")
    return f"{counts}; {dropped} DROPPED" if dropped else counts


def _queues(queues: list[JsonObject], style: Style) -> Iterator[str]:
    """Return the queues of the rules with the most waiting jobs, and of those that dropped jobs."""
    for queue in [one for one in queues if get_int(one, "waiting") or get_int(one, "shed")][:MOST_QUEUES]:
        waiting, dropped = get_int(queue, "waiting"), get_int(queue, "shed")
        oldest = f"; the oldest waits for {duration(get_number(queue, 'oldest_waiting_s'))}" if waiting else ""
        lost = style("red", f"; {dropped} DROPPED") if dropped else ""
        yield f"{get_str(queue, 'rule')}: {waiting} waiting, {get_int(queue, 'running')} running{oldest}{lost}"


def _latency(latency: JsonObject | None) -> str:
    count = sum(get_list(latency, "counts", as_int)) if latency is not None else 0
    if latency is None or not count:
        return "not measured yet: no job of an event with a time was started for the first time"
    p50_ms, p99_ms = get_number(latency, "p50_ms"), get_number(latency, "p99_ms")
    return (
        f"half of {count} hooks started within {duration(p50_ms / 1000)} of their event, "
        f"99% within {duration(p99_ms / 1000)}"
    )


def _stalls(stalls: JsonObject | None) -> str:
    if stalls is None:
        return "not measured by this daemon"
    worst_s, p99_s = get_number(stalls, "worst_s"), get_number(stalls, "p99_s")
    cause = get_str_or_none(stalls, "worst_cause")
    return (
        f"at most {duration(worst_s)}{f' ({cause})' if cause else ''}, 99% within {duration(p99_s)}; last minute: "
        f"{duration(get_number(stalls, 'worst_last_minute_s'))}, {duration(get_number(stalls, 'p99_last_minute_s'))}"
    )


def _kernel(kernel: JsonObject) -> str:
    mask = "event mask" if get_bool(kernel, "event_mask") else "no event mask (before 6.6)"
    taskstats = "exit records"
    if not get_bool(kernel, "taskstats"):
        taskstats = f"no exit records ({get_str_or_none(kernel, 'no_taskstats_because')})"
    buffer = (
        f"buffer {size(get_int(kernel, 'receive_buffer_bytes'))} = {get_int(kernel, 'receive_buffer_events')} events"
    )
    kernel_log = get_str_or_none(kernel, "no_kernel_log_because")
    oom = f"; oom_killed is unknown ({kernel_log})" if kernel_log is not None else ""
    kept = "; socket kept by systemd" if get_bool(kernel, "socket_kept_by_manager") else ""
    return f"{get_str(kernel, 'release')}: {mask}, {taskstats}; {buffer}{oom}{kept}"


def _rules(found: JsonObject, style: Style) -> list[str]:
    rows = get_list(found, "rules", _rule_row)
    if not rows:
        return ["no rules"]
    return list(columns(rows, ["RULE", "STATE", "HITS", "LAST HIT", "EVENTS", "IDENTITY", "DESCRIPTION"], style))


def _rule_row(value: JsonValue) -> list[str]:
    rule = as_dict(value)
    return [
        get_str(rule, "name"),
        state_text(get_bool(rule, "enabled"), get_int_or_none(rule, "disabled_until_ns")),
        str(get_int(rule, "hits")),
        ago(get_int_or_none(rule, "last_hit_ns")),
        " ".join(get_list(rule, "events", as_str)),
        get_str_or_none(rule, "identity") or "-",
        get_str(rule, "description"),
    ]
