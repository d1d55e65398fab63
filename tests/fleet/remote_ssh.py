"""`cnprocctl -H` against two real sshd's, each in a network namespace of its own, each with a daemon of its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from kernel.harness import PATIENCE_S, Daemon, child, rename, running, wait_status

SSHD = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
pytestmark = pytest.mark.skipif(
    SSHD is None or shutil.which("ssh") is None or shutil.which("ip") is None,
    reason="sshd, ssh or ip is not installed (apt install openssh-server openssh-client iproute2)",
)
RULES = """
rules:
  - {name: failed, events: [nonzero_exit], match: {comm: cnptest-ssh}}
$MARKER
"""
CONFIG = """
Host *
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  IdentityFile {directory}/key
  IdentitiesOnly yes
  BatchMode yes
  LogLevel ERROR
  ConnectTimeout 30
"""


def run(*words: object) -> None:
    subprocess.run([str(word) for word in words], check=True, capture_output=True)


@contextmanager
def namespace(name: str, address: str) -> Iterator[str]:
    """A network namespace that is reached at `address`.2 from `address`.1."""
    run("ip", "netns", "add", name)
    try:
        run("ip", "link", "add", f"{name}h", "type", "veth", "peer", "name", "eth0", "netns", name)
        run("ip", "addr", "add", f"{address}.1/30", "dev", f"{name}h")
        run("ip", "link", "set", f"{name}h", "up")
        run("ip", "-n", name, "addr", "add", f"{address}.2/30", "dev", "eth0")
        run("ip", "-n", name, "link", "set", "eth0", "up")
        yield f"{address}.2"
    finally:
        run("ip", "netns", "del", name)


@contextmanager
def sshd(directory: Path, netns: str, address: str, runtime_dir: Path) -> Iterator[None]:
    """An sshd in a namespace, on whose side `cnprocctl` is that of the daemon in `runtime_dir`."""
    directory.mkdir()
    wrapper = directory / "cnprocctl"
    wrapper.write_text(
        f"#!/bin/sh\necho $$ >> {directory}/pids\nexec {sys.executable} -m cnprocd.cli.cnprocctl"
        f' --runtime-dir {runtime_dir} --state-dir {directory} "$@"\n'
    )
    wrapper.chmod(0o755)
    run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", directory / "host")
    Path("/run/sshd").mkdir(exist_ok=True)
    (directory / "config").write_text(
        f"Port 22\nListenAddress {address}\nHostKey {directory}/host\nAuthorizedKeysFile {directory.parent}/key.pub\n"
        f"StrictModes no\nUsePAM no\nPidFile none\nPermitRootLogin yes\nSetEnv PATH={directory}:/usr/bin:/bin\n"
        "LogLevel ERROR\n"
    )
    command = ["ip", "netns", "exec", netns, SSHD, "-D", "-e", "-f", directory / "config"]
    with subprocess.Popen([str(word) for word in command]) as server:
        try:
            yield
        finally:
            server.terminate()


class Fleet:
    """Two hosts, and what a user types on a third one."""

    def __init__(self, directory: Path, daemons: list[Daemon], hosts: list[str]) -> None:
        self.directory, self.daemons, self.hosts = directory, daemons, hosts
        here = directory / "here"
        here.mkdir()
        (directory / "ssh_config").write_text(CONFIG.format(directory=directory))
        (here / "ssh").write_text(f'#!/bin/sh\nexec /usr/bin/ssh -F {directory}/ssh_config "$@"\n')
        (here / "ssh").chmod(0o755)
        self.environment = {**os.environ, "PATH": f"{here}:{os.environ['PATH']}"}

    def command(self, *words: str) -> list[str]:
        named = [word for host in self.hosts for word in ("-H", host)]
        return [sys.executable, "-m", "cnprocd.cli.cnprocctl", *named, *words]

    def ctl(self, *words: str) -> tuple[int, str, str]:
        done = subprocess.run(self.command(*words), env=self.environment, capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr

    def remote_pids(self) -> list[int]:
        """Return the processes that the commands of `ctl` were on the other side."""
        files = self.directory.glob("host*/pids")
        return [int(pid) for file in files for pid in file.read_text().split()]


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "key")
    with ExitStack() as stack:
        daemons, hosts = [], []
        for number in (1, 2):
            directory = tmp_path / f"daemon{number}"
            directory.mkdir()
            daemons.append(stack.enter_context(running(directory, RULES)))
            name = f"cnp{os.getpid() % 100_000}n{number}"
            address = stack.enter_context(namespace(name, f"10.{230 + number}.{os.getpid() % 250}"))
            hosts.append(f"root@{address}:22")
            stack.enter_context(sshd(tmp_path / f"host{number}", name, address, directory / "run"))
        found = Fleet(tmp_path, daemons, hosts)
        deadline = time.monotonic() + PATIENCE_S
        while found.ctl("status")[0] == 255:  # sshd does not listen yet
            assert time.monotonic() < deadline
        yield found


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_status_and_reload_of_two_hosts(fleet):
    """One status is one line a host; a host whose rules are invalid gives its status and its errors."""
    status, out, _ = fleet.ctl("--json", "status")
    found = {json.loads(line)["host"]: json.loads(line)["data"]["pid"] for line in out.splitlines()}
    assert (status, found) == (
        0,
        {host: daemon.process.pid for host, daemon in zip(fleet.hosts, fleet.daemons, strict=True)},
    )
    assert fleet.ctl("reload")[0] == 0
    fleet.daemons[1].rules.write_text("rules: [{name: x, events: [died]}]")
    status, out, err = fleet.ctl("reload")
    assert status == 78
    assert [line.split(": ")[0] for line in out.splitlines()] == [fleet.hosts[0]]
    assert any(line.startswith(f"{fleet.hosts[1]}: ") and "died" in line for line in err.splitlines())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "kill"])
def test_watch_of_two_hosts_ends_with_its_client(fleet, number):
    """Ctrl-C goes to the whole foreground group, so to ssh as well. SIGKILL is one that the client cannot handle."""
    watching = subprocess.Popen(
        fleet.command("--json", "watch"),
        env=fleet.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    ready = [watching.stderr.readline() for _ in fleet.hosts]
    assert sorted(line.split(": ")[0] for line in ready) == fleet.hosts
    pid = child(lambda: (rename("cnptest-ssh"), os._exit(3)))
    wait_status(pid)
    lines = [json.loads(watching.stdout.readline()) for _ in fleet.hosts]  # both daemons see this machine
    assert sorted(line["host"] for line in lines) == fleet.hosts
    assert [line["data"]["pid"] for line in lines] == [pid, pid]
    remote = [pid for pid in fleet.remote_pids() if is_alive(pid)]
    assert len(remote) == 2
    if number == signal.SIGINT:
        os.killpg(watching.pid, number)
    else:
        watching.kill()
    watching.communicate()
    deadline = time.monotonic() + PATIENCE_S
    while any(map(is_alive, remote)):
        assert time.monotonic() < deadline, "the remote command lives on after its client"
