"""Hosts made of namespaces: a root of Debian 13, a network, a name, and programs that are started again when they end.

A host has no PID 1. journald runs without one; `Audit=no` keeps it from switching on kernel auditing for the machine.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

PATIENCE_S = 60.0


def run(*words: object, cwd: Path | None = None) -> str:
    """Run a command, and return its output."""
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, cwd=cwd)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, words))} failed ({done.returncode}):\n{done.stdout}{done.stderr}")
    return done.stdout


def until(what: str, question: Callable[[], object], patience_s: float = PATIENCE_S) -> None:
    """Ask again and again until the answer is yes."""
    deadline = time.monotonic() + patience_s
    while not question():
        if time.monotonic() > deadline:
            raise SystemExit(f"not within {patience_s:g} s: {what}")
        time.sleep(0.1)


class Service:
    """A program with `Restart=always` and `RestartSec=` of a second."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self._command, self._log = command, log
        self._stopping = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self.starts = 0
        self._thread = threading.Thread(target=self._keep, daemon=True)
        self._thread.start()

    def _keep(self) -> None:
        while not self._stopping.is_set():
            with self._log.open("ab") as log:
                self._process = subprocess.Popen(self._command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
            self.starts += 1
            self._process.wait()
            self._stopping.wait(1.0)

    def kill(self) -> None:
        """kill -9."""
        if self._process is not None:
            self._process.kill()

    def stop(self) -> None:
        self._stopping.set()
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._thread.join()


class Network:
    """A bridge in a namespace of its own, to which every host is connected."""

    def __init__(self, name: str) -> None:
        self.name = name
        run("ip", "netns", "add", name)
        run("ip", "-n", name, "link", "add", "br0", "type", "bridge")
        run("ip", "-n", name, "link", "set", "br0", "up")

    def close(self) -> None:
        run("ip", "netns", "del", self.name)


class Host:
    """A host. `address` is its number in the network 10.99.0.0/24."""

    def __init__(self, name: str, address: int, network: Network, tree: Path, scratch: Path) -> None:
        self.name, self.address, self._network = name, f"10.99.0.{address}", network
        self.netns = f"{network.name}{name}"
        self.root, self._scratch = scratch / name / "root", scratch / name
        self.services: dict[str, Service] = {}
        for directory in ("root", "layer"):
            (self._scratch / directory).mkdir(parents=True)
        run("mount", "-t", "tmpfs", "-o", "size=512m", "tmpfs", self._scratch / "layer")
        for directory in ("upper", "work"):
            (self._scratch / "layer" / directory).mkdir()
        layers = f"lowerdir={tree},upperdir={self._scratch}/layer/upper,workdir={self._scratch}/layer/work"
        run("mount", "-t", "overlay", "-o", layers, "overlay", self.root)
        for directory in ("proc", "dev", "sys"):  # journald needs /sys/fs/cgroup
            run("mount", "--rbind", "--make-rslave", f"/{directory}", self.root / directory)
        run("mount", "-t", "tmpfs", "tmpfs", self.root / "run")
        run("ip", "netns", "add", self.netns)
        run("ip", "-n", self.netns, "link", "set", "lo", "up")
        run(
            "ip",
            "link",
            "add",
            "eth0",
            "netns",
            self.netns,
            "type",
            "veth",
            "peer",
            "name",
            name,
            "netns",
            network.name,
        )
        run("ip", "-n", network.name, "link", "set", name, "master", "br0", "up")
        run("ip", "-n", self.netns, "addr", "add", f"{self.address}/24", "dev", "eth0")
        run("ip", "-n", self.netns, "link", "set", "eth0", "up")
        (self.root / "etc/machine-id").write_text(f"{address:032x}\n")
        (self.root / "etc/hostname").write_text(f"{name}\n")
        (self.root / "var/log/journal").mkdir(exist_ok=True)

    def command(self, *words: str) -> list[str]:
        """Return the command line that runs a program on this host, as the same process."""
        script = f'hostname {self.name} && exec chroot {self.root} "$@"'
        return ["ip", "netns", "exec", self.netns, "unshare", "--uts", "sh", "-c", script, "sh", *words]

    def write(self, path: str, text: str) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def start(self, name: str, *words: str) -> Service:
        service = self.services[name] = Service(self.command(*words), self._scratch / f"{name}.log")
        return service

    def stop_all(self) -> None:
        for service in reversed(self.services.values()):
            service.stop()
        self.services.clear()

    def cut(self) -> None:
        """Pull the cable."""
        run("ip", "-n", self._network.name, "link", "set", self.name, "down")

    def join(self) -> None:
        run("ip", "-n", self._network.name, "link", "set", self.name, "up")

    def log(self, name: str) -> str:
        file = self._scratch / f"{name}.log"
        return file.read_text(errors="replace") if file.exists() else ""

    def close(self) -> None:
        self.stop_all()
        with contextlib.suppress(SystemExit):
            run("ip", "netns", "del", self.netns)
        logs = ("root/var/log/journal/remote", "root/var/log")
        for mount in (*logs, "root/run", "root/sys", "root/dev", "root/proc", "root", "layer"):
            path = self._scratch / mount
            if os.path.ismount(path):
                run("umount", "-l", path)


def tree_of(directory: Path, packages: Sequence[str], options: Sequence[str], mirror: str) -> Path:
    """Return a root of Debian 13 with these packages. It is made once."""
    tree, mark = directory / "tree", directory / "packages"
    wanted = " ".join(packages)
    if mark.exists() and mark.read_text() == wanted:
        return tree
    if shutil.which("mmdebstrap") is None:
        raise SystemExit("mmdebstrap is not installed (apt install mmdebstrap)")
    shutil.rmtree(tree, ignore_errors=True)
    directory.mkdir(parents=True, exist_ok=True)
    apt = [f"--aptopt={option}" for option in (*options, "Apt::Install-Recommends false")]
    run(
        "mmdebstrap",
        "--variant=apt",
        f"--include={','.join(packages)}",
        *apt,
        "trixie",
        tree,
        f"deb {mirror} trixie main",
    )
    mark.write_text(wanted)
    return tree
