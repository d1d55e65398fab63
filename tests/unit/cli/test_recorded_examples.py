"""Every example, and the demo, on a recording of real deaths: exactly the expected matches, and nothing else.

tests/recordings/make.py describes each recording, including the failures that no rule may match.
"""

import contextlib
import importlib.util
import io
import json
from pathlib import Path

import pytest

from cnprocd.cli.cnprocctl import run
from cnprocd.cli.event_from_options import Accounts
from cnprocd.cli.verbs import recording

ROOT = Path(__file__).parents[3]
RECORDINGS = ROOT / "tests" / "recordings"
EXAMPLES = ROOT / "config" / "examples"
LOOPING = ("crash-loop", "worker", "exit code 1")

# Rule, comm, status, and what held it back.
EXPECTED = {
    # sudo, its own change of user IDs, the command that it runs, and su, which runs none.
    "became-root": [
        ("became-root", None, None, None),
        ("became-root", "sudo", None, None),
        ("root-command", "sh", None, None),
        ("became-root", None, None, None),
    ],
    "core-dump-notice": [("core-dumped", "firefox", "SIGSEGV (core dumped)", None)],
    # Five services fail once each. Then another one loops, and is reported alone.
    "crash-loop": [*[(*LOOPING, "after")] * 5, *[(*LOOPING, "after")] * 4, (*LOOPING, None), (*LOOPING, "after")],
    "cron-failures": [
        ("cron-job-failed", "sh", "exit code 127", None),
        ("cron-job-failed", "backup", "exit code 1", None),
    ],
    "failed-units": [
        ("unit-failed", "app", "exit code 1", None),
        ("unit-failed", "app", "exit code 2", "cooldown"),
        ("unit-failed", "app", "exit code 3", None),
    ],
    "lock-files": [("jobrunner-left-locks", "jobrunner", "SIGKILL", None)],
    "notify-mail": [("mail-crash", "app", "SIGSEGV", None)] * 3,
    "notify-webhook": [("webhook-killed", "app", "SIGKILL", None)],
    "oom-killed-helper": [("helper-killed-for-memory", "indexer", "SIGKILL", None)],
    "oracle-shared-memory": [
        ("oracle-process-died", "ora_p000_PROD", "exit code 3", None),
        ("oracle-process-died", "ora_pmon_PROD", "SIGKILL", None),
        ("oracle-process-died", "tnslsnr", "SIGTERM", None),
    ],
    "postgresql-crash": [
        ("postgres-backend-crashed", "postgres", "SIGSEGV", None),
        ("postgres-server-ended", "postgres", "SIGKILL", None),
        *[("postgres-server-ended", "postgres", "exit code 1", "cooldown")] * 5,  # its orphans
    ],
    "restart-worker": [
        *[("restart-worker", "worker", "exit code 1", None), ("worker-given-up", "worker", "exit code 1", "after")] * 5,
        ("restart-worker", "worker", "exit code 1", "rate_limit"),
        ("worker-given-up", "worker", "exit code 1", None),
        ("restart-worker", "worker", "exit code 1", "rate_limit"),
        ("worker-given-up", "worker", "exit code 1", "after"),
        ("restart-worker", "worker", "exit code 2", None),
        ("worker-given-up", "worker", "exit code 2", "after"),
    ],
    "worker-crash": [
        ("worker-crashed", "nginx", "SIGSEGV", None),
        ("worker-crashed", "nginx", "SIGSEGV", "cooldown"),
        ("worker-crashed", "php-fpm8.4", "SIGSEGV", None),
        ("worker-crashed", "php-fpm8.4", "SIGSEGV", "cooldown"),
    ],
}


def replay(name: str, rules: Path):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert run(["--json", "--rules", str(rules), "replay", str(RECORDINGS / f"{name}.rec")]) == 0
    found = json.loads(out.getvalue())
    assert (found["summary"]["cut_short"], found["summary"]["lost_while_recording"]) == (False, 0)
    return found["matches"]


@pytest.fixture(autouse=True)
def users(monkeypatch):
    """Provide no user of this machine: the recording has its own."""
    monkeypatch.setattr(recording, "ACCOUNTS", Accounts({}.get, {}.get))


def test_the_unit_that_loops_is_the_one_reported():
    (reported,) = [one for one in replay("crash-loop", EXAMPLES / "crash-loop.yaml") if not one.get("held_by")]
    assert reported["unit"] == "zeta.service"


def test_every_example_has_a_recording():
    assert set(EXPECTED) == {file.stem for file in EXAMPLES.glob("*.yaml")}
    assert {file.stem for file in RECORDINGS.glob("*.rec")} == {*EXPECTED, "demo"}
    assert all(file.stat().st_size < 100_000 for file in RECORDINGS.glob("*.rec"))


@pytest.mark.parametrize("example", EXPECTED)
def test_an_example_matches_what_it_is_for_and_nothing_else(example):
    found = replay(example, EXAMPLES / f"{example}.yaml")
    assert [(one["rule"], one["comm"], one.get("status"), one.get("held_by")) for one in found] == EXPECTED[example]


@pytest.mark.parametrize("example", [name for name in EXPECTED if name != "became-root"])  # not about failures
def test_a_recording_has_failures_that_its_example_ignores(example, tmp_path):
    rules = tmp_path / "all.yaml"
    rules.write_text("rules: [{name: failed, events: [nonzero_exit]}]")
    both_rules = 2 if example == "restart-worker" else 1  # match each failure
    assert len(replay(example, rules)) > len(EXPECTED[example]) / both_rules


def test_the_demo_gives_the_record_that_its_daemon_wrote(tmp_path):
    spec = importlib.util.spec_from_file_location("demo", ROOT / "tests" / "demo" / "demo.py")
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    rules = tmp_path / "rules.yaml"
    rules.write_text(demo.RULES.format(hook="/usr/lib/free-what-it-held", locks="/tmp"))
    found = replay("demo", rules)
    # The bystander outlives the scenario, and is killed when the demo tidies up.
    assert [(one["comm"], one["status"]) for one in found] == [
        ("ora_pmon_DEMO", "SIGKILL"),
        ("ora_smon_DEMO", "SIGKILL"),
    ]
    written = json.loads((RECORDINGS / "demo.json").read_text())
    # But for what only a log has, and what the daemon had no reason to ask /proc for (a replay knows it all the same).
    told = {name for name in found[0] if written.get(name) is not None} - {"job_id"}
    assert len(told) > 15
    assert {name: found[0][name] for name in told} == {name: written[name] for name in told}
