"""`cnprocctl -H HOST VERB`: run cnprocctl on other hosts over ssh(1), as systemctl(1) does.

The verb runs on the other host, so every verb works, releases may differ, and the exit status is that of the command
there. The words are quoted for the shell that sshd runs. ssh itself exits with 255, which cnprocctl never does.

A command that was started over ssh outlives its client: sshd only closes its standard input. So the command gets
`--until-eof` and ends when its standard input does. A verb that reads standard input ends there by itself.

Several hosts are asked at once. Each line then begins with the host; of JSON, each document becomes one line.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import IO, TextIO

from cnprocd.cli.terminal import Style
from cnprocd.errors import EX_OK, CnprocdError
from cnprocd.escape import printable

SSH_FAILED = 255  # ssh(1): an error occurred before the command was run, or the connection was lost
NOT_INSTALLED = 127  # sh(1): the command was not found
WRONG_USAGE = 2
# No option of ssh, and none of the characters that newer releases of ssh refuse (ssh.c valid_ruser, valid_hostname):
# ProxyCommand and Match exec of an ssh_config give %r and %h to a shell.
_NOT_IN_USER = r"""\s\x00-\x1f\x7f:@\[\]'"`;&<>|(){}"""
_USER = rf"[^{_NOT_IN_USER}-](?:[^{_NOT_IN_USER}]*[^{_NOT_IN_USER}\\])?"
_NAME = rf"[^{_NOT_IN_USER}$\\-][^{_NOT_IN_USER}$\\]*"
_HOST = re.compile(rf"(?P<name>(?:{_USER}@)?(?:{_NAME}|\[[\w:.%]+\]))(?::(?P<port>[0-9]{{1,5}}))?")
_HIGHEST_PORT = 65535


@dataclass(frozen=True, slots=True)
class Host:
    """A host as it was named, and what ssh(1) takes."""

    name: str
    destination: str
    port: str | None = None


def split(words: Sequence[str]) -> tuple[list[Host], list[str]]:
    """Return the hosts of all -H, and the words without them. Raises CnprocdError."""
    hosts: list[Host] = []
    rest: list[str] = []
    given = iter(words)
    for word in given:
        if word == "--":
            rest += [word, *given]
        elif word in ("-H", "--host"):
            hosts.append(host_of(next(given, "")))
        elif word.startswith("--host="):
            hosts.append(host_of(word.removeprefix("--host=")))
        elif re.match(r"-H.", word):
            hosts.append(host_of(word[2:]))
        else:
            rest.append(word)
    return hosts, rest


def host_of(text: str) -> Host:
    """Return the host of `[user@]host[:port]`. An IPv6 address stands in brackets. Raises CnprocdError."""
    found = _HOST.fullmatch(text)
    if found is None or not 0 < int(found["port"] or 1) <= _HIGHEST_PORT:
        what = f'invalid host "{printable(text)}"'
        raise _wrong_usage(what, "give [user@]host[:port]; an IPv6 address stands in brackets")
    return Host(text, found["name"].replace("[", "").replace("]", ""), found["port"])


def require_all(named: Iterable[str], hosts: Iterable[Host]) -> None:
    """Raise CnprocdError if `split` did not find a host that argparse found: the verb would run on this machine."""
    missed = set(named) - {host.name for host in hosts}
    if missed:
        what = f'cannot run the verb on "{printable(min(missed))}": the option is shortened or joined with another one'
        raise _wrong_usage(what, "write -H HOST or --host HOST as words of their own")


def _wrong_usage(what: str, hint: str) -> CnprocdError:
    error = CnprocdError(what, hint)
    error.exit_status = WRONG_USAGE
    return error


def command(host: Host, words: Sequence[str], *, reads_input: bool) -> list[str]:
    """Return the command line of ssh(1) for this host."""
    port = [] if host.port is None else ["-p", host.port]
    remote = ["cnprocctl", *([] if reads_input else ["--until-eof"]), *words]
    return ["ssh", "-x", "-T", "-e", "none", *port, "--", host.destination, shlex.join(remote)]


def reads_input(words: Iterable[str]) -> bool:
    """Whether the verb reads standard input: `check -`, `test --event -`, `check --draft FILE`, `record --hold`."""
    named = list(words)
    return ("rules", "write") in itertools.pairwise(named) or any(
        word in ("-", "--event=-", "--draft", "--hold") or word.startswith("--draft=") for word in named
    )


def run(hosts: Sequence[Host], words: Sequence[str], *, as_json: bool) -> int:
    """Run the verb on every host. Return the exit status: that of the first host on which it failed, or 0."""
    given = reads_input(words)
    content = sys.stdin.buffer.read() if given and len(hosts) > 1 else None
    calls = [_Call(host, words, given, content, as_json, alone=len(hosts) == 1) for host in hosts]
    try:
        for call in calls:
            call.start()
        statuses = [call.wait() for call in calls]
    except BaseException:
        for call in calls:
            call.end()
        raise
    return next((status for status in statuses if status != EX_OK), EX_OK)


_printing = threading.Lock()


class _Call:
    """The command on one host."""

    def __init__(
        self, host: Host, words: Sequence[str], given: bool, content: bytes | None, as_json: bool, *, alone: bool
    ) -> None:
        self._host = host
        self._command = command(host, words, reads_input=given)
        self._given, self._content, self._as_json, self._alone = given, content, as_json, alone
        self._process: subprocess.Popen[bytes] | None = None
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Start ssh. Its standard input stays open until the command has ended, or this process ends."""
        out = None if self._alone else subprocess.PIPE
        source = None if self._given and self._alone else subprocess.PIPE
        try:
            self._process = subprocess.Popen(self._command, stdin=source, stdout=out, stderr=out)
        except FileNotFoundError as error:
            raise CnprocdError("cannot run ssh: it is not installed", "install openssh-client") from error
        if self._alone:
            return
        assert self._process.stdout is not None and self._process.stderr is not None
        show = self._show_documents if self._as_json else self._show_lines
        self._thread(show, self._process.stdout, sys.stdout)
        self._thread(self._show_lines, self._process.stderr, sys.stderr)
        if self._content is not None:
            self._thread(self._feed)

    def wait(self) -> int:
        """Return the exit status of the command, and report what ssh(1) or the shell there could not do."""
        assert self._process is not None
        status = self._process.wait()
        for thread in self._threads:
            thread.join()
        self.end()
        if status == SSH_FAILED:
            self._complain("ssh failed", "its message is above; try `ssh` by hand")
        elif status == NOT_INSTALLED:
            self._complain("cnprocctl is not installed there, or not in the PATH of ssh", "install the package")
        return status if status >= 0 else 128 - status

    def end(self) -> None:
        """End ssh, and with it the command on the other host, which loses its standard input."""
        process = self._process
        if process is None:
            return
        if process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        if process.poll() is None:
            process.terminate()
            process.wait()

    def _thread(self, target: object, *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)  # type: ignore[arg-type]
        thread.start()
        self._threads.append(thread)

    def _feed(self) -> None:
        assert self._process is not None and self._process.stdin is not None and self._content is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(self._content)
            self._process.stdin.close()

    def _show_lines(self, source: IO[bytes], to: TextIO) -> None:
        label = Style(to)("bold", f"{self._host.name}:")
        for line in source:
            self._print(f"{label} {line.decode('utf-8', 'replace')}".rstrip("\n"), to)

    def _show_documents(self, source: IO[bytes], to: TextIO) -> None:
        text = ""
        for line in source:
            text += line.decode("utf-8", "replace")
            try:
                found = json.loads(text)
            except ValueError:
                continue
            text = ""
            self._print(json.dumps({"host": self._host.name, "data": found}), to)
        if text.strip():
            self._print(json.dumps({"host": self._host.name, "text": text}), to)

    @staticmethod
    def _print(line: str, to: TextIO) -> None:
        with _printing:
            try:
                print(line, file=to, flush=True)
            except BrokenPipeError:  # `| head`
                os.kill(os.getpid(), signal.SIGTERM)

    def _complain(self, what: str, hint: str) -> None:
        error = CnprocdError(f"cannot run cnprocctl on {self._host.name}: {what}", hint)
        self._print(error.render(Style(sys.stderr)("red", "cnprocctl:") + " "), sys.stderr)


def end_with_input() -> None:
    """End this process when its standard input ends: its client over ssh is gone."""
    threading.Thread(target=_wait_for_end, daemon=True).start()


def _wait_for_end() -> None:
    with contextlib.suppress(OSError):
        while os.read(0, 1 << 16):
            """Until the end. Nothing is expected here."""
    os.kill(os.getpid(), signal.SIGTERM)  # a verb that has something to finish handles it (ending.py)
