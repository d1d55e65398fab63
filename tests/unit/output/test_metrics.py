"""The exposition: valid by promtool if that is installed, hostile labels escaped, the file never partial."""

import os
import shutil
import stat
import subprocess

import pytest

from cnprocd.output.metrics import render
from cnprocd.output.metrics_child import write
from cnprocd.spool.latency import Histogram


def status(**changes):
    histogram = Histogram()
    for value in (0.4, 3.2, 3.3, 9000.0):
        histogram.add(value)
    found = {
        "version": "1.0",
        "started_ns": 1_700_000_000_500_000_000,
        "rules_hash": "0123abcd",
        "reload": {
            "ok": True,
            "time_ns": 1_700_000_000_500_000_000,
            "loaded_ns": 1_700_000_000_500_000_000,
            "changed_files": [],
        },
        "rules": [
            {"name": "a", "hook": True, "enabled": True, "hits": 3, "last_hit_ns": 1_700_000_100_000_000_000},
            {"name": 'b"\\\n', "hook": True, "enabled": False, "hits": 0, "last_hit_ns": None},
        ],
        "events": {
            "delivered": 10,
            "records_delivered": 4,
            "occurrences": {"exit": 9, "fork": 1},
            "recovered": 0,
            "rejected": {"foreign_sender": 1},
        },
        "lost": {"connector_drops": 0, "taskstats_drops": 0, "sequence_gaps": 2, "overruns": 1},
        "table": {"processes": 5},
        "jobs": {
            "waiting": 1,
            "running": 0,
            "done": 7,
            "dead": 0,
            "oldest_waiting_s": 1.5,
            "shed": 0,
            "durable": True,
            "queues": [{"rule": "a", "waiting": 1, "running": 2, "oldest_waiting_s": 1.5, "shed": 7}],
            "latency": {"bounds_ms": list(histogram.bounds_ms), "counts": histogram.counts, "sum_ms": histogram.sum_ms},
        },
        "kernel": {"receive_buffer_bytes": 8 << 20},
    }
    return found | changes


def samples(text):
    return dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))


def test_values_are_in_base_units():
    found = samples(render(status()))
    assert found["cnprocd_start_time_seconds"] == "1700000000.5"
    assert found['cnprocd_matches_total{rule="a"}'] == "3"
    assert found['cnprocd_jobs{state="done"}'] == "7"
    assert found["cnprocd_rules"] == "1"


def test_every_rule_with_a_hook_has_the_metrics_of_its_queue():
    found = samples(render(status()))
    names = ("waiting_jobs", "running_hooks", "oldest_job_age_seconds", "shed_jobs_total")
    assert [found[f'cnprocd_rule_{name}{{rule="a"}}'] for name in names] == ["1", "2", "1.5", "7"]
    assert [found[f'cnprocd_rule_{name}{{rule="b\\"\\\\\\n"}}'] for name in names] == ["0"] * 4


def test_the_last_reload_is_a_metric():
    assert samples(render(status())).items() >= {
        ('cnprocd_rules_info{hash="0123abcd"}', "1"),
        ("cnprocd_rules_loaded_timestamp_seconds", "1700000000.5"),
        ("cnprocd_last_reload_successful", "1"),
        ("cnprocd_last_reload_timestamp_seconds", "1700000000.5"),
        ("cnprocd_rule_files_changed", "0"),
    }
    failed = {"ok": False, "time_ns": 5_000_000_000, "loaded_ns": 4_000_000_000, "changed_files": ["a", "b"]}
    found = samples(render(status(reload=failed)))
    assert (found["cnprocd_last_reload_successful"], found["cnprocd_rule_files_changed"]) == ("0", "2")
    assert found["cnprocd_last_reload_timestamp_seconds"] == "5"
    assert "cnprocd_rule_files_changed" not in samples(render(status(reload=failed | {"changed_files": None})))


def test_given_up_work_and_lost_records_are_counted():
    edge = {"name": "proc", "waiting": 1, "done": 5, "late": 2, "refused": 0, "failed": 0, "stopped": 0}
    log = {"queued": 3, "lost": 9, "lost_matches": 4}
    found = samples(render(status(edges=[{**edge, "stuck": 1, "replaced": 2}], log=log)))
    assert found['cnprocd_edge_pieces_total{edge="proc",end="late"}'] == "2"
    assert found['cnprocd_edge_stuck_workers{edge="proc"}'] == "1"
    assert found["cnprocd_log_queued_records"] == "3"
    assert found['cnprocd_log_lost_records_total{kind="match"}'] == "4"
    assert found['cnprocd_log_lost_records_total{kind="other"}'] == "5"
    assert found['cnprocd_counted_matches_total{rule="a"}'] == "0"


def test_the_histogram_is_cumulative_and_in_seconds():
    found = samples(render(status()))
    assert found['cnprocd_hook_latency_seconds_bucket{le="0.0005"}'] == "1"
    assert found['cnprocd_hook_latency_seconds_bucket{le="0.004"}'] == "3"
    assert found['cnprocd_hook_latency_seconds_bucket{le="5"}'] == "3"
    assert found['cnprocd_hook_latency_seconds_bucket{le="+Inf"}'] == found["cnprocd_hook_latency_seconds_count"] == "4"


def test_a_label_cannot_break_out():
    text = render(status())
    assert r'cnprocd_matches_total{rule="b\"\\\n"} 0' in text


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (apt install prometheus)")
def test_promtool_accepts_the_exposition():
    done = subprocess.run(["promtool", "check", "metrics"], input=render(status()), capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_file_is_replaced_whole_and_readable_by_all(tmp_path):
    file = tmp_path / "cnprocd.prom"
    file.write_text("old")
    before = os.stat(file).st_ino
    umask = os.umask(0o077)
    try:
        write(str(file), b"new\n")
    finally:
        os.umask(umask)
    assert file.read_text() == "new\n"
    assert os.stat(file).st_ino != before
    assert stat.S_IMODE(os.stat(file).st_mode) == 0o644
    assert [one.name for one in tmp_path.iterdir()] == ["cnprocd.prom"]


def test_a_place_that_cannot_be_written_leaves_nothing(tmp_path):
    with pytest.raises(OSError):
        write(str(tmp_path / "missing" / "cnprocd.prom"), b"x")
    (tmp_path / "is-a-directory").mkdir()
    with pytest.raises(OSError):
        write(str(tmp_path / "is-a-directory"), b"x")
    assert [one.name for one in tmp_path.iterdir()] == ["is-a-directory"]
