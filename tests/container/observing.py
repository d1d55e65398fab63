"""`make test-container`: build the image, run it as packaging/container/daemonset.yaml asks, and kill processes.

podman gets the capabilities, mounts and namespaces of the manifest, so the manifest itself is what is tested. The base
image is made by mmdebstrap from this machine's Debian archive; no image registry is needed.

On a host with cgroup v1, podman runs in a mount namespace where cgroup v2 is mounted, as on a node of today. Without
CAP_SYS_RESOURCE (in a sandbox) it uses runc, because crun raises RLIMIT_MEMLOCK.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from kernel.harness import PATIENCE_S, child, rename, wait_status

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/vm"))  # image.py knows this machine's Debian archive
POD = next(
    one
    for one in yaml.safe_load_all((ROOT / "packaging/container/daemonset.yaml").read_text())
    if one["kind"] == "DaemonSet"
)["spec"]["template"]["spec"]
CONTAINER = POD["containers"][0]
# podman's own limits are above those that a sandbox may set. Without -1 it needs the controller of PIDs.
LIMITS = ("--ulimit", "nofile=1024:1024", "--ulimit", "nproc=4096:4096", "--pids-limit", "-1")
BASE, IMAGE = "localhost/cnprocd-base:trixie", "localhost/cnprocd:test"
RULES = """
rules:
  - name: seen
    events: [nonzero_exit]
    match: {comm: cnptest-box}
    record: [exe, exe_claimed, cgroup, container, user]
"""
HOOKED = "rules:\n  - {name: a, events: [exit], run: {command: [/bin/true]}}\n"
pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("podman") is None or shutil.which("mmdebstrap") is None,
    reason="needs root, podman and mmdebstrap (apt install podman crun runc mmdebstrap)",
)


class Podman:
    """podman on a host with cgroup v2."""

    def __init__(self) -> None:
        self._host: subprocess.Popen[bytes] | None = None
        self._enter: list[str] = []
        if not Path("/sys/fs/cgroup/cgroup.procs").exists():
            script = "mount --make-rprivate / && mount -t cgroup2 none /sys/fs/cgroup && echo && exec sleep infinity"
            self._host = subprocess.Popen(["unshare", "--mount", "sh", "-c", script], stdout=subprocess.PIPE)
            assert self._host.stdout is not None and self._host.stdout.readline()
            self._enter = ["nsenter", "--mount", "--target", str(self._host.pid)]
        held = int(Path("/proc/self/status").read_text().split("CapEff:")[1].split()[0], 16)
        self.runtime = "crun" if held >> 24 & 1 and shutil.which("crun") else "runc"

    def close(self) -> None:
        if self._host is not None:
            self._host.kill()
            self._host.wait()

    def command(self, *words: object) -> list[str]:
        return [*self._enter, "podman", "--runtime", self.runtime, *map(str, words)]

    def __call__(self, *words: object, text: str = "") -> tuple[int, str]:
        """Run it. Return the status, and both outputs."""
        done = subprocess.run(self.command(*words), input=text, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    def build(self, directory: Path) -> None:
        if self("image", "exists", BASE)[0]:
            import image  # tests/vm

            options = [f"--aptopt={option}" for option in image.host_apt_options()]
            tar, source = directory / "base.tar", f"deb {image.host_mirror()} trixie main"
            subprocess.run(["mmdebstrap", "--variant=minbase", *options, "trixie", tar, source], check=True)
            assert self("import", tar, BASE)[0] == 0
        file = ROOT / "packaging/container/Containerfile"
        options = ["--network", "host", "--isolation", "chroot", "--ulimit", "nofile=1024:1024"]
        status, out = self("build", *options, "--build-arg", f"BASE={BASE}", "-t", IMAGE, "-f", file, ROOT)
        assert status == 0, out[-3000:]


class Node:
    """The directories of a node that the manifest mounts, and the options of podman for its container."""

    def __init__(self, directory: Path) -> None:
        self.paths = {"sys": Path("/sys"), "cgroup": Path("/sys/fs/cgroup")}
        for name in ("rules", "state", "run", "tmp"):
            self.paths[name] = directory / name
            self.paths[name].mkdir()
        (self.paths["rules"] / "rules.yaml").write_text(RULES)
        self.paths["machine-id"] = directory / "machine-id"
        self.paths["machine-id"].write_text("0123456789abcdef" * 2 + "\n")

    def options(self, *, without: tuple[str, ...] = ()) -> list[str]:
        """`without`: names of mounts, of capabilities, `pid` or `network`."""
        security = CONTAINER["securityContext"]
        found = ["--rm", *LIMITS, "--cgroupns", "private"]
        found += ["--pid", "host"] if POD["hostPID"] and "pid" not in without else []
        found += ["--network", "host" if POD["hostNetwork"] and "network" not in without else "none"]
        found += [f"--cap-drop={name}" for name in security["capabilities"]["drop"]]
        found += [f"--cap-add={name}" for name in security["capabilities"]["add"] if name not in without]
        found += ["--read-only", "--read-only-tmpfs=false"] if security["readOnlyRootFilesystem"] else []
        found += ["--security-opt", "no-new-privileges"] if not security["allowPrivilegeEscalation"] else []
        found += [option for one in CONTAINER["env"] for option in ("--env", f"{one['name']}={one['value']}")]
        for mount in CONTAINER["volumeMounts"]:
            if mount["name"] not in without:
                source = self.paths[mount["name"]] / mount.get("subPath", "")
                found += ["--volume", f"{source}:{mount['mountPath']}:{'ro' if mount.get('readOnly') else 'rw'}"]
        return found


class Running:
    """The container of the daemon, and the records that it has written."""

    def __init__(self, podman: Podman, node: Node, *more: str, without: tuple[str, ...] = ()) -> None:
        self.name, self._podman = f"cnptest-{os.getpid()}-{time.monotonic_ns()}", podman
        command = podman.command("run", "--name", self.name, *node.options(without=without), *more, IMAGE)
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.records: list[dict[str, Any]] = []
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def wait_for(self, event: str, **fields: object) -> dict[str, Any]:
        """Return the next record of this class with these fields."""
        deadline = time.monotonic() + 3 * PATIENCE_S  # a container takes its time to start
        while True:
            line = self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
            assert line is not None, self.records
            record: dict[str, Any] = json.loads(line)
            self.records.append(record)
            if record["event"] == event and all(record.get(name) == value for name, value in fields.items()):
                return record

    def ctl(self, *words: str, text: str = "") -> tuple[int, str]:
        return self._podman("exec", "--interactive", self.name, "cnprocctl", *words, text=text)

    def stop(self) -> int:
        self._podman("kill", "--signal", "TERM", self.name)
        return self.process.wait(2 * PATIENCE_S)


@pytest.fixture(scope="module")
def podman(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Podman]:
    found = Podman()
    try:
        found.build(tmp_path_factory.mktemp("base"))
        yield found
    finally:
        found.close()


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


@contextmanager
def running(podman: Podman, node: Node, *more: str, without: tuple[str, ...] = ()) -> Iterator[Running]:
    found = Running(podman, node, *more, without=without)
    try:
        found.wait_for("started")
        yield found
    finally:
        podman("rm", "--force", "--time", "1", found.name)
        found.process.wait(2 * PATIENCE_S)


def killed_on_the_host() -> int:
    def die() -> None:
        rename("cnptest-box")
        os.kill(os.getpid(), 9)

    pid = child(die)
    wait_status(pid)
    return pid


def test_a_kill_on_the_host_and_one_in_a_container_match(podman: Podman, node: Node) -> None:
    """The second process is in a container of its own; its cgroup is beside that of the daemon."""
    with running(podman, node) as daemon:
        pid = killed_on_the_host()
        match = daemon.wait_for("rule_matched", pid=pid)
        own = Path("/proc/self/cgroup").read_text()
        assert (match["signal"], match["container"]) == ("SIGKILL", None)
        assert match["machine_id"] == "0123456789abcdef" * 2
        assert match["host"] == os.uname().nodename
        assert f":{match['cgroup']}\n" in own
        script = "printf cnptest-box > /proc/self/comm; exit 5"  # as PID 1 it could not kill itself
        other = f"{daemon.name}-other"
        podman("run", "--rm", *LIMITS, "--network", "none", "--name", other,
               "--cidfile", node.paths["run"].parent / "cid", "--entrypoint", "sh", IMAGE, "-c", script)  # fmt: skip
        identity = (node.paths["run"].parent / "cid").read_text().strip()
        match = daemon.wait_for("rule_matched", container=identity)
        assert (match["runtime"], match["exe"]) == ("podman", None)
        assert ".." not in match["cgroup"] and identity in match["cgroup"]
        assert "limited" not in {record["event"] for record in daemon.records if record.get("feature") != "host_files"}
        status, out = daemon.ctl("status")
        assert status == 0 and "hooks are refused" in out
        status, out = daemon.ctl("check", "-", text=HOOKED)
        assert status == 78 and "-:2:31: hooks are refused" in out, out
        status, out = daemon.ctl("doctor")
        assert status == 0 and " 0 fail" in out, out
        assert daemon.stop() == 0
    with running(podman, node) as daemon:  # the state outlives the container
        status, out = daemon.ctl("--json", "history")
        assert [one["pid"] for one in json.loads(out)].count(pid) == 1, out


@pytest.mark.parametrize(
    ("without", "status", "cause"),
    [
        ("network", 69, "this process is in another network namespace"),
        ("pid", 69, "this process is in another pid namespace"),
        ("NET_ADMIN", 77, "this process lacks CAP_NET_ADMIN"),
    ],
)
def test_a_missing_part_ends_it_with_its_name(
    podman: Podman, node: Node, without: str, status: int, cause: str
) -> None:
    found = podman("run", *node.options(without=(without,)), IMAGE)
    assert found[0] == status and cause in found[1], found
    status, out = podman("run", *node.options(without=(without,)), "--entrypoint", "cnprocctl", IMAGE, "doctor")
    assert status == 1 and "fail" in out, out


def test_without_sys_it_reports_that_exit_records_are_missing(podman: Podman, node: Node) -> None:
    """As with a runtime that mounts no /sys. Matches are still reported."""
    hidden = ("--security-opt", "mask=/sys/devices")
    with running(podman, node, *hidden, without=("sys",)) as daemon:
        (limited,) = [one for one in daemon.records if one.get("feature") == "exit_records"]
        assert "mount the host's /sys at /sys" in limited["message"]
        daemon.wait_for("rule_matched", pid=killed_on_the_host())
        assert "mount the host's /sys at /sys" in daemon.ctl("doctor")[1]


def test_without_the_hosts_cgroups_it_reports_that(podman: Podman, node: Node) -> None:
    with running(podman, node, without=("cgroup",)) as daemon:
        (limited,) = [one for one in daemon.records if one.get("feature") == "cgroup_paths"]
        assert "/host/sys/fs/cgroup" in limited["message"]
        assert daemon.wait_for("rule_matched", pid=killed_on_the_host())["container"] is None


def test_rules_with_a_hook_end_the_container_with_78(podman: Podman, node: Node) -> None:
    (node.paths["rules"] / "rules.yaml").write_text(HOOKED)
    status, out = podman("run", *node.options(), IMAGE)
    assert status == 78 and "a hook in a container has the files and users of its image" in out, out


def test_the_directory_of_a_config_map_is_refused(podman: Podman, node: Node) -> None:
    """kubelet makes it with the mode 0777. So the manifest mounts the file (subPath), not the directory."""
    node.paths["rules"].chmod(0o777)
    volume = f"{node.paths['rules']}:/etc/cnprocd:ro"
    status, out = podman("run", *node.options(without=("rules",)), "--volume", volume, IMAGE)
    assert status == 78 and "/etc/cnprocd" in out, out
