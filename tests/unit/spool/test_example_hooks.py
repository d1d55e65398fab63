"""The hooks of the examples against the real thing: curl and an HTTP server, sendmail and an SMTP server.

The rule is that of the example; the URL, the file of the token and the directory of hooks are those of the test.
"""

from __future__ import annotations

import dataclasses
import http.server
import json
import os
import shutil
import socketserver
import threading
from pathlib import Path

import pytest
from unit.hookkit import aio, request, running

from cnprocd.rules.language.disabled import load_in_force
from cnprocd.rules.ruleset import Backoff, hooks_of
from cnprocd.spool.job import Gather

EXAMPLES = Path(__file__).parents[3] / "config" / "examples"
TOKEN = "s3cret-of-the-test"
EVENTS = [
    {"rule": "r", "pid": 4242 + n, "comm": "app", "unit": "app.service", "signal": "SIGKILL", "match_id": f"m-{n}"}
    for n in range(2)
]
SENDMAIL = Path("/usr/sbin/sendmail")


def hook_of(example: str, directory: Path, **replaced: str):
    """Return the hook of an example, with texts of its file replaced."""
    text = (EXAMPLES / f"{example}.yaml").read_text()
    for old, new in replaced.items():
        assert REPLACED[old] in text
        text = text.replace(REPLACED[old], new)
    file = directory / "rules.yaml"
    file.write_text(text)
    (hook,) = hooks_of(load_in_force(file).rules).values()
    return hook


REPLACED = {
    "url": "https://hooks.example.com/cnprocd",
    "headers": "/etc/cnprocd/webhook.headers",
    "mailer": "/usr/local/lib/cnprocd/notify-mail",
    "recipient": "notify-mail, root]",
}


class Receiver(http.server.BaseHTTPRequestHandler):
    """Refuses the first request with 503, then takes requests with the token. Notes what ps(1) shows meanwhile."""

    requests: list[tuple[str, list[dict[str, object]]]]
    seen: list[bytes]

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.seen.extend(command_lines())
        self.requests.append((self.headers["Idempotency-Key"], [json.loads(line) for line in body.splitlines()]))
        good = self.headers["Authorization"] == f"Bearer {TOKEN}" and len(self.requests) > 1
        self.send_response(204 if good else 503)
        self.end_headers()

    def log_message(self, *_):
        """Log nothing."""


def command_lines() -> list[bytes]:
    """Return the command lines and environments of all processes named curl."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            if (directory / "comm").read_text() == "curl\n":
                found += [(directory / name).read_bytes() for name in ("cmdline", "environ")]
        except OSError:
            continue  # it has ended
    return found


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@aio
async def test_the_webhook_sends_token_and_events_and_hides_the_token(tmp_path):
    requests, seen = [], []
    handler = type("Handler", (Receiver,), {"requests": requests, "seen": seen})
    headers = tmp_path / "headers"
    headers.write_text(f"Authorization: Bearer {TOKEN}\n")
    headers.chmod(0o600)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/cnprocd"
        hook = hook_of("notify-webhook", tmp_path, url=url, headers=str(headers))
        hook = with_short_pauses(hook)
        async with running(tmp_path, {"webhook-killed": hook}) as (spool, scheduler, records):
            spool.enqueue([request("webhook-killed", EVENTS[0])])
            scheduler.wake()
            await records.ended(1)
            assert [fields["exit_code"] for fields in records.of("hook_failed")] == [22], "curl --fail"
            assert records.of("hook_finished", job_id=1)
        server.shutdown()
    assert [key for key, _ in requests] == ["m-0", "m-0"], "the receiver can recognise the repetition"
    ((event,),) = [events for _, events in requests[1:]]
    assert (event["pid"], event["unit"], event["job_id"]) == (4242, "app.service", 1)
    assert seen, "curl was seen"
    assert not any(TOKEN.encode() in text for text in seen)


def with_short_pauses(hook):
    return dataclasses.replace(hook, backoff=Backoff(0.01, 0.01))


class Smtp(socketserver.StreamRequestHandler):
    """An SMTP server (RFC 5321) that takes one mail."""

    mails: list[tuple[list[str], str]]

    def handle(self):
        self.wfile.write(b"220 test ESMTP\r\n")
        recipients, lines, in_data = [], [], False
        for raw in self.rfile:
            line = raw.decode().rstrip("\r\n")
            verb = line.upper()
            if in_data and line != ".":
                lines.append(line)
                continue
            if in_data:
                in_data = False
                self.mails.append((recipients, "\n".join(lines)))
            if verb.startswith("RCPT TO:"):
                recipients.append(line[8:].strip("<> "))
            in_data = in_data or verb == "DATA"
            answer = "354 go on" if verb == "DATA" else "221 bye" if verb == "QUIT" else "250 ok"
            self.wfile.write(f"{answer}\r\n".encode())
            if verb == "QUIT":
                return


def mail_hook(directory: Path, sendmail: Path) -> Path:
    """Return the example's hook, with another sendmail."""
    script = directory / "notify-mail"
    text = (EXAMPLES / "hooks" / "notify-mail").read_text()
    assert f"| {SENDMAIL} " in text
    script.write_text(text.replace(f"| {SENDMAIL} ", f"| {sendmail} "))
    script.chmod(0o755)
    return script


async def mail_both(directory: Path, mailer: Path) -> None:
    """Run the hook of the mail example for two events of one job."""
    hook = hook_of("notify-mail", directory, mailer=str(mailer))
    async with running(directory, {"mail-crash": hook}) as (spool, scheduler, records):
        spool.enqueue([request("mail-crash", event, gather=Gather("mail-crash", 60.0, 2)) for event in EVENTS])
        scheduler.wake()
        await records.ended(1)
        assert records.of("hook_finished", job_id=1), records.all


def check_mail(mail: str) -> None:
    head, _, body = mail.partition("\n\n")
    assert f"Subject: mail-crash on {os.uname().nodename}: app of app.service (2 events)" in head
    assert "Message-ID: <cnprocd-1-" in head
    assert [json.loads(line)["pid"] for line in body.splitlines() if line] == [4242, 4243]


@aio
async def test_the_mail_has_all_events_of_its_job(tmp_path):
    """With a program that takes the place of sendmail(8), and its options."""
    sendmail = tmp_path / "sendmail"
    sendmail.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/options\ncat > {tmp_path}/mail\n')
    sendmail.chmod(0o755)
    await mail_both(tmp_path, mail_hook(tmp_path, sendmail))
    assert (tmp_path / "options").read_text() == "-oi -t\n"
    assert (tmp_path / "mail").read_text().startswith("To: root\n")
    check_mail((tmp_path / "mail").read_text())


@pytest.mark.skipif(shutil.which("msmtp") is None, reason="msmtp is not installed")
@aio
async def test_the_mail_goes_through_msmtp_to_an_smtp_server(tmp_path):
    mails = []
    handler = type("Handler", (Smtp,), {"mails": mails})
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = server.server_address[1]
        sendmail = tmp_path / "sendmail"
        options = f"--file=/dev/null --host=127.0.0.1 --port={port} --from=cnprocd@test.example"
        sendmail.write_text(f'#!/bin/sh\nexec msmtp {options} "$@"\n')
        sendmail.chmod(0o755)
        await mail_both(tmp_path, mail_hook(tmp_path, sendmail))
        server.shutdown()
    ((recipients, mail),) = mails
    assert [one.partition("@")[0] for one in recipients] == ["root"]
    check_mail(mail)
