"""The examples: no errors, no warnings, and `test` gives what the comments of each file promise."""

import contextlib
import io
import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from cnprocd.cli.cnprocctl import run
from cnprocd.cli.event_from_options import Accounts
from cnprocd.cli.verbs import trial
from cnprocd.rules.language import load

EXAMPLES = Path(__file__).parents[3] / "config" / "examples"
FILES = sorted(EXAMPLES.glob("*.yaml"))
PROMISE = re.compile(r"^#   cnprocctl test (.*?)\s+-> (\S.*)$", re.MULTILINE)
PROMISES = [(file, *found) for file in FILES for found in PROMISE.findall(file.read_text())]
USERS = {"oracle": 54321, "postgres": 26, "nobody": 65534, "root": 0}


@pytest.fixture(autouse=True)
def users(monkeypatch):
    """Provide the users of the examples, which this machine may not have."""
    monkeypatch.setattr(load, "system_user", USERS.get)
    monkeypatch.setattr(trial, "ACCOUNTS", Accounts(USERS.get, {}.get))


def ctl_json(*words):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        status = run(["--json", *words])
    return status, json.loads(out.getvalue())


def test_every_example_makes_promises():
    assert {file for file, _, _ in PROMISES} == set(FILES)
    assert len(FILES) >= 12


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_an_example_has_neither_mistakes_nor_warnings(file):
    status, found = ctl_json("check", "--other-host", "--rules", str(file))  # their hooks are not here
    assert (status, found["problems"], found["warnings"]) == (0, [], [])


@pytest.mark.parametrize(("file", "words", "fires"), PROMISES, ids=lambda value: getattr(value, "stem", value))
def test_an_example_does_what_its_comments_say(file, words, fires):
    status, found = ctl_json("test", "--rules", str(file), *shlex.split(words))
    assert [one["rule"] for one in found] == ([] if fires == "nothing" else fires.split(", "))
    assert status == (1 if fires == "nothing" else 0)


def test_the_lock_hook_removes_only_what_the_dead_process_held(tmp_path):
    gone, alive = 4_194_305, 1
    (tmp_path / "a.lock").write_text(f"  {gone}\n")
    (tmp_path / "b.lock").write_text(f"{gone}1\n")
    (tmp_path / "c.lock").write_text(f"{alive}\n")
    (tmp_path / "d.lock").symlink_to(tmp_path / "a.lock")
    for pid in (gone, gone, alive):
        subprocess.run([EXAMPLES / "hooks" / "remove-locks", tmp_path, str(pid)], check=True, capture_output=True)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["b.lock", "c.lock", "d.lock"]


def test_the_memory_hook_runs_where_there_is_nothing_to_free():
    done = subprocess.run([EXAMPLES / "hooks" / "free-shared-memory", "--creator", "4194305"], capture_output=True)
    assert (done.returncode, done.stdout) == (0, b"")


def test_the_mail_hook_sends_the_events_with_their_subject(tmp_path):
    """Only the path of sendmail is replaced in the hook."""
    mailer = tmp_path / "sendmail"
    mailer.write_text(f'#!/bin/sh\necho "$*" > {tmp_path}/arguments; cat > {tmp_path}/mail\n')
    mailer.chmod(0o755)
    script = (EXAMPLES / "hooks" / "notify-mail").read_text().replace("/usr/sbin/sendmail", str(mailer))
    event = '{"comm": "app", "unit": "app.service"}\n'
    job = {"CNPROCD_RULE": "r", "CNPROCD_COMM": "app", "CNPROCD_UNIT": "app.service", "CNPROCD_EVENTS": "1"}
    environment = {"PATH": "/usr/bin:/bin", "CNPROCD_JOB_ID": "7", **job}
    subprocess.run(
        ["/bin/sh", "-c", script, "notify-mail", "root"], env=environment, input=event, text=True, check=True
    )
    head, _, body = (tmp_path / "mail").read_text().partition("\n\n")
    assert (tmp_path / "arguments").read_text() == "-oi -t\n"
    assert head.startswith("To: root\nSubject: r on ") and "app of app.service (1 events)" in head
    assert body == event


def test_a_webhook_token_is_in_no_argument():
    """It is in the file of headers, which curl reads itself."""
    text = (EXAMPLES / "notify-webhook.yaml").read_text()
    assert "@/etc/cnprocd/webhook.headers" in text
    assert "Authorization" not in text.partition("rules:")[2]
