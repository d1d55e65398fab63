"""What is asked of the running daemon: reload, status, metrics. No pydantic, so they start at once."""

from __future__ import annotations

from typing import Any

from cnprocd.cli.grammar import Options
from cnprocd.cli.terminal import Style, ago, columns, duration, print_json, size
from cnprocd.control.client import Client
from cnprocd.errors import EX_OK

Status = dict[str, Any]
RELOAD_TIMEOUT_S = 120.0  # a large rule file on a busy machine; systemd's own limit for ExecReload is 90 s


def reload(options: Options) -> int:
    """Returns when the new rules are in force; else the mistakes are shown, and the old ones stay."""
    with Client(options.runtime_dir, RELOAD_TIMEOUT_S) as client:
        done: Any = client.ask("reload")
    if options.json:
        print_json(done)
        return EX_OK
    for warning in done["warnings"]:
        print(warning)
    count = done["rules"]
    print(f"{count} rule{'' if count == 1 else 's'} in force, from {', '.join(done['files'])}")
    return EX_OK


def metrics(options: Options) -> int:
    """Prometheus text, as it would be written to the metrics file."""
    with Client(options.runtime_dir) as client:
        found = client.ask("metrics")
    if options.json:
        print_json({"metrics": found})
    else:
        print(found, end="")
    return EX_OK


def status(options: Options) -> int:
    """How the daemon is."""
    with Client(options.runtime_dir) as client:
        found: Any = client.ask("status")
    if options.json:
        print_json(found)
        return EX_OK
    style = Style()
    for line in (*_head(found, style), "", *_rules(found, style)):
        print(line)
    return EX_OK


def _head(found: Status, style: Style) -> list[str]:
    events, lost, jobs = found["events"], found["lost"], found["jobs"]
    lines = [
        ("daemon", f"cnprocd {found['version']}, PID {found['pid']}, up {duration(found['uptime_s'])}"),
        ("rules", ", ".join(found["files"])),
        ("asked for", " ".join(events["asked"]) or "nothing"),
        (
            "delivered",
            f"{events['delivered']} events, {events['records_delivered']} exit records; {events['matches']} matches",
        ),
        ("lost", _lost(lost, events, style)),
        (
            "table",
            f"{found['table']['processes']} processes" if found["table"]["kept"] else "not needed by these rules",
        ),
        ("jobs", _jobs(jobs)),
        ("durable", style("green", "yes") if jobs["durable"] else style("red", f"NO: {jobs['why_not_durable']}")),
        ("latency", _latency(jobs["latency"])),
        ("kernel", _kernel(found["kernel"])),
    ]
    rejected = sum(events["rejected"].values())
    if rejected:
        lines.append(("spoofed", style("red", f"{rejected} datagrams that the kernel did not send")))
    return [f"{style('bold', name.rjust(10))}  {text}" for name, text in lines]


def _lost(lost: Status, events: Status, style: Style) -> str:
    if not lost["total"]:
        return style("green", "nothing")
    known = ", ".join(
        f"{lost[key]} {key.replace('_', ' ')}" for key in lost if key not in ("total", "overruns") and lost[key]
    )
    return style("red", f"{lost['total']} events ({known}), {events['recovered']} processes recovered")


def _jobs(jobs: Status) -> str:
    said = f"{jobs['waiting']} waiting, {jobs['running']} running, {jobs['dead']} dead, {jobs['done']} done"
    if jobs["waiting"]:
        said += f"; the oldest waits for {duration(jobs['oldest_waiting_s'])}"
    return f"{said}; {jobs['shed']} SHED" if jobs["shed"] else said


def _latency(latency: Status | None) -> str:
    if latency is None or not sum(latency["counts"]):
        return "no hook has run yet"
    count = sum(latency["counts"])
    return (
        f"half of {count} hooks started within {duration(latency['p50_ms'] / 1000)} of their event, "
        f"99% within {duration(latency['p99_ms'] / 1000)}"
    )


def _kernel(kernel: Status) -> str:
    mask = "event mask" if kernel["event_mask"] else "no event mask (before 6.6)"
    taskstats = "exit records" if kernel["taskstats"] else f"no exit records ({kernel['no_taskstats_because']})"
    buffer = f"buffer {size(kernel['receive_buffer_bytes'])} = {kernel['receive_buffer_events']} events"
    kept = "; socket kept by systemd" if kernel["socket_kept_by_manager"] else ""
    return f"{kernel['release']}: {mask}, {taskstats}; {buffer}{kept}"


def _rules(found: Status, style: Style) -> list[str]:
    rows = [
        [
            rule["name"],
            str(rule["hits"]),
            ago(rule["last_hit_ns"]),
            " ".join(rule["events"]),
            (rule["identity"] or "") if rule["enabled"] else "DISABLED",
            rule["description"],
        ]
        for rule in found["rules"]
    ]
    if not rows:
        return ["no rules"]
    return list(columns(rows, ["RULE", "HITS", "LAST HIT", "EVENTS", "IDENTITY", "DESCRIPTION"], style))
