"""Write packaging/grafana/cnprocd.json, the Grafana dashboard: `python packaging/grafana/dashboard.py`.

Edit the table below; the JSON around it (schema version 39, Grafana 10 and newer) is the same for every panel. A test
checks that cnprocd writes every metric in it.
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
      ("sum(increase(cnprocd_shed_jobs_total{%s}[$__rate_interval]))", "dropped")],
     "Dead jobs have no retries left. Dropped jobs found the queue full."),
    ("Events lost", "stat", "short", 6, 4,
     [("sum(increase(cnprocd_lost_events_total{%s}[$__range]))", "")],
     "Process events that the kernel discarded, over the time shown."),
    ("Queue on disk", "stat", "bool_yes_no", 6, 4,
     [("min(cnprocd_spool_durable{%s})", "")],
     "No: a crash would lose waiting jobs."),
    ("Oldest waiting hook", "stat", "s", 6, 4,
     [("max(cnprocd_oldest_job_age_seconds{%s})", "")],
     "Age of the oldest waiting job."),
    ("Processes recovered", "stat", "short", 6, 4,
     [("sum(increase(cnprocd_recovered_processes_total{%s}[$__range]))", "")],
     "Processes that disappeared while events were lost, and were evaluated against the rules."),
    ("Rules in force", "timeseries", "short", 12, 6,
     [("count by (hash) (cnprocd_rules_info{%s})", "{{hash}}")],
     "Hosts by the hash of their rules. One line: all hosts have the same rules."),
    ("Hosts whose last reload failed", "timeseries", "short", 12, 6,
     [("cnprocd_last_reload_successful{%s} == 0", "{{instance}}")],
     "They keep the rules that they accepted last. `cnprocctl status` shows the error."),
    ("Waiting hooks by rule", "timeseries", "short", 12, 8,
     [("sum by (rule) (cnprocd_rule_waiting_jobs{%s}) > 0", "{{rule}}"),
      ("sum by (rule) (increase(cnprocd_rule_shed_jobs_total{%s}[$__rate_interval])) > 0", "{{rule}}: dropped")],
     "The queue of each rule. When the whole queue is full, the rule with the longest one drops its newest job."),
    ("Oldest waiting hook by rule", "timeseries", "s", 12, 8,
     [("max by (rule) (cnprocd_rule_oldest_job_age_seconds{%s}) > 0", "{{rule}}")],
     "Rules take turns, so one rule's queue does not delay another's. `slots:` keeps slots free for a rule."),
    ("From the event to the hook", "timeseries", "s", 12, 8,
     [(f"histogram_quantile(0.5, {LATENCY})", "half"),
      (f"histogram_quantile(0.99, {LATENCY})", "99%")],
     "From the kernel's time stamp to the first instruction of the hook."),
    ("Events from the kernel", "timeseries", "cps", 12, 8,
     [("sum by (source) (rate(cnprocd_datagrams_total{%s}[$__rate_interval]))", "{{source}}"),
      ("sum by (kind) (rate(cnprocd_events_total{%s}[$__rate_interval]))", "{{kind}} evaluated")],
     "What the rules make the kernel deliver. `cnprocctl explain` shows the rule."),
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
    """Return the whole dashboard."""
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
