"""Writes packaging/grafana/cnprocd.json, the Grafana dashboard: `python packaging/grafana/dashboard.py`.

The table below is what a person edits; the JSON around it (schema version 39, Grafana 10 and newer) is the same
for every panel. A test checks that every metric in it is one that cnprocd writes.
"""

from __future__ import annotations

import json
from pathlib import Path

HERE = Path(__file__).parent
WIDTH = 24
INSTANCE = 'instance=~"$instance"'
LATENCY = "sum by (le) (rate(cnprocd_hook_latency_seconds_bucket{%s}[$__rate_interval]))"

# title, kind, unit, width, height, [(expression, legend)], explanation
PANELS = (
    ("Matches", "timeseries", "short", 12, 8,
     [("sum by (rule) (increase(cnprocd_matches_total{%s}[$__rate_interval]))", "{{rule}}")],
     "Matches of each rule in each interval."),
    ("Hooks", "timeseries", "short", 12, 8,
     [("sum by (state) (cnprocd_jobs{%s,state!=\"done\"})", "{{state}}"),
      ("sum(increase(cnprocd_shed_jobs_total{%s}[$__rate_interval]))", "refused")],
     "Dead hooks have failed for good; refused ones found the queue full."),
    ("Events lost", "stat", "short", 6, 4,
     [("sum(increase(cnprocd_lost_events_total{%s}[$__range]))", "")],
     "Process events that the kernel could not deliver, over the time shown."),
    ("Queue on disk", "stat", "bool_yes_no", 6, 4,
     [("min(cnprocd_spool_durable{%s})", "")],
     "No: waiting hooks would not survive a crash."),
    ("Oldest waiting hook", "stat", "s", 6, 4,
     [("max(cnprocd_oldest_job_age_seconds{%s})", "")],
     "How long the oldest waiting hook waits."),
    ("Processes recovered", "stat", "short", 6, 4,
     [("sum(increase(cnprocd_recovered_processes_total{%s}[$__range]))", "")],
     "Processes that vanished while events were lost, and were handed to the rules all the same."),
    ("From the event to the hook", "timeseries", "s", 12, 8,
     [(f"histogram_quantile(0.5, {LATENCY})", "half"),
      (f"histogram_quantile(0.99, {LATENCY})", "99%")],
     "From the kernel's time stamp to the first instruction of the hook."),
    ("Messages from the kernel", "timeseries", "cps", 12, 8,
     [("sum by (source) (rate(cnprocd_datagrams_total{%s}[$__rate_interval]))", "{{source}}"),
      ("sum by (kind) (rate(cnprocd_events_total{%s}[$__rate_interval]))", "{{kind}} judged")],
     "What the rules make the kernel deliver; `cnprocctl explain` says which rule."),
)  # fmt: skip


def panel(number: int, x: int, y: int) -> dict[str, object]:
    title, kind, unit, width, height, targets, text = PANELS[number]
    return {
        "id": number + 1,
        "title": title,
        "description": text,
        "type": kind,
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "gridPos": {"x": x, "y": y, "w": width, "h": height},
        "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
        "targets": [
            {"refId": chr(65 + i), "expr": expression % INSTANCE, "legendFormat": legend}
            for i, (expression, legend) in enumerate(targets)
        ],
    }


def dashboard() -> dict[str, object]:
    """The whole dashboard."""
    panels = []
    x = y = 0
    for number, (_, _, _, width, height, *_) in enumerate(PANELS):
        panels.append(panel(number, x, y))
        x += width
        if x >= WIDTH:
            x, y = 0, y + height
    return {
        "title": "cnprocd",
        "uid": "cnprocd",
        "schemaVersion": 39,
        "version": 1,
        "tags": ["cnprocd"],
        "time": {"from": "now-6h", "to": "now"},
        "refresh": "30s",
        "templating": {
            "list": [
                {"name": "datasource", "type": "datasource", "query": "prometheus"},
                {
                    "name": "instance",
                    "type": "query",
                    "datasource": {"type": "prometheus", "uid": "${datasource}"},
                    "query": "label_values(cnprocd_build_info, instance)",
                    "multi": True,
                    "includeAll": True,
                },
            ]
        },
        "panels": panels,
    }


def main() -> None:
    (HERE / "cnprocd.json").write_text(json.dumps(dashboard(), indent=2) + "\n")


if __name__ == "__main__":
    main()
