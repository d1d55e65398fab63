"""Render the daemon's counters as Prometheus text, for node_exporter's textfile collector and `cnprocctl metrics`.

`render` is a pure function of what `cnprocctl status --json` shows. Names and units follow Prometheus' conventions:
base units (seconds, bytes), `_total` for counters, one name per quantity with labels for its kinds. No label has values
that a process can choose. A comm would make a series per process name, and a hostile process could make a million.

`write` replaces the file by rename, so that the collector never reads a partial one.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

Status = Mapping[str, Any]  # what view.status makes


class _Metric(NamedTuple):
    name: str
    kind: str
    help: str
    samples: list[tuple[dict[str, str], float]]


def render(status: Status) -> str:
    """Return the whole exposition, with a newline at its end."""
    lines: list[str] = []
    for metric in _metrics(status):
        lines += [f"# HELP {metric.name} {metric.help}", f"# TYPE {metric.name} {metric.kind}"]
        lines += [f"{metric.name}{_labels(labels)} {_number(value)}" for labels, value in metric.samples]
    lines += _histogram(status["jobs"].get("latency"))
    return "\n".join(lines) + "\n"


def _metrics(status: Status) -> Iterable[_Metric]:
    """Yield every metric in the order of the exposition."""
    yield from _of_events(status)
    yield from _of_losses(status)
    yield from _of_jobs(status)
    buffer_bytes = status["kernel"]["receive_buffer_bytes"]
    yield _one("cnprocd_receive_buffer_bytes", "gauge", "Receive buffer that was granted.", buffer_bytes)


def _of_events(status: Status) -> Iterable[_Metric]:
    events, rules = status["events"], status["rules"]
    yield _one("cnprocd_build_info", "gauge", "Version of the daemon.", 1, version=status["version"])
    yield _one(
        "cnprocd_start_time_seconds", "gauge", "Start of the daemon, seconds since 1970.", status["started_ns"] / 1e9
    )
    yield _Metric(
        "cnprocd_datagrams_total",
        "counter",
        "Events and exit records that the kernel delivered, by socket.",
        [
            ({"source": "connector"}, events["delivered"]),
            ({"source": "taskstats"}, events["records_delivered"]),
        ],
    )
    yield _Metric(
        "cnprocd_events_total",
        "counter",
        "Occurrences that were matched against the rules, by kind.",
        [({"kind": kind}, count) for kind, count in sorted(events["occurrences"].items())],
    )
    yield _Metric(
        "cnprocd_matches_total",
        "counter",
        "Matches by rule.",
        [({"rule": rule["name"]}, rule["hits"]) for rule in rules],
    )
    yield _Metric(
        "cnprocd_rule_last_match_timestamp_seconds",
        "gauge",
        "When a rule matched last, seconds since 1970.",
        [({"rule": rule["name"]}, rule["last_hit_ns"] / 1e9) for rule in rules if rule["last_hit_ns"]],
    )
    yield _one("cnprocd_rules", "gauge", "Rules in force.", sum(1 for rule in rules if rule["enabled"]))


def _of_losses(status: Status) -> Iterable[_Metric]:
    events, lost = status["events"], status["lost"]
    yield _Metric(
        "cnprocd_lost_events_total",
        "counter",
        "Events and exit records that the kernel dropped, by source of the count.",
        [({"source": name}, lost[name]) for name in ("connector_drops", "taskstats_drops", "sequence_gaps")],
    )
    yield _one("cnprocd_overruns_total", "counter", "How often the receive buffer was full.", lost["overruns"])
    yield _one(
        "cnprocd_recovered_processes_total",
        "counter",
        "Exits that were recovered after a loss and matched against the rules.",
        events["recovered"],
    )
    yield _Metric(
        "cnprocd_rejected_datagrams_total",
        "counter",
        "Datagrams that the kernel did not send, by reason.",
        [({"reason": reason}, count) for reason, count in sorted(events["rejected"].items())],
    )
    yield _one("cnprocd_tracked_processes", "gauge", "Processes in the table.", status["table"]["processes"])


def _of_jobs(status: Status) -> Iterable[_Metric]:
    jobs = status["jobs"]
    yield _Metric(
        "cnprocd_jobs",
        "gauge",
        "Jobs by state.",
        [({"state": state}, jobs[state]) for state in ("waiting", "running", "done", "dead")],
    )
    yield _one(
        "cnprocd_oldest_job_age_seconds",
        "gauge",
        "Age of the oldest waiting job; 0 when none waits.",
        jobs["oldest_waiting_s"] or 0,
    )
    yield _one("cnprocd_shed_jobs_total", "counter", "Jobs dropped because the queue was full.", jobs["shed"])
    yield _one(
        "cnprocd_spool_durable",
        "gauge",
        "1 while waiting jobs survive a crash of the daemon, else 0.",
        int(jobs["durable"]),
    )


def _one(name: str, kind: str, help_text: str, value: float, **labels: str) -> _Metric:
    return _Metric(name, kind, help_text, [(labels, value)])


def _histogram(latency: Status | None) -> list[str]:
    """Return the histogram from the kernel's event to the hook's first instruction; empty if nothing is measured."""
    if latency is None:
        return []
    name, seen = "cnprocd_hook_latency_seconds", 0
    lines = [
        f"# HELP {name} From the kernel's event to the first instruction of its hook.",
        f"# TYPE {name} histogram",
    ]
    for bound_ms, count in zip([*latency["bounds_ms"], None], latency["counts"], strict=True):
        seen += count
        bound = "+Inf" if bound_ms is None else _number(bound_ms / 1000)
        lines.append(f'{name}_bucket{{le="{bound}"}} {seen}')
    return [*lines, f"{name}_sum {_number(latency['sum_ms'] / 1000)}", f"{name}_count {seen}"]


def _labels(labels: Mapping[str, str]) -> str:
    shown = ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items())
    return f"{{{shown}}}" if shown else ""


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(float(value))


def write(path: Path, text: str) -> None:
    """Replace `path` by a file with this text, readable by all users. Raises OSError; leaves no temporary file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    try:
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            os.fchmod(file.fileno(), 0o644)  # the daemon's umask protects secrets; this file has none
            file.write(text)
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
