"""Units and containers of real processes in cgroups with the names that systemd and the engines give."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from kernel.harness import child, rename, running, wait_status

ID = "0123456789abcdef" * 4
RULES = """
rules:
  - name: any
    events: [nonzero_exit]
    match: {comm: cnptest-group}
    log: {level: info, message: "{unit} {user_unit} {container} {pod_uid}"}
    run: {command: [%s, --unit, "{unit}", "{container}"], timeout: 10s}
  - {name: unit, events: [nonzero_exit], match: {unit: 'mnt-my\\x2ddata.mount'}}
  - {name: user-unit, events: [nonzero_exit], match: {user_unit: foo.service}}
  - {name: container, events: [nonzero_exit], match: {container: 0123456789ab}}
  - {name: pod, events: [nonzero_exit], match: {pod_uid: "8dbc9c6c-*"}}
$MARKER
"""


def hierarchy() -> Path:
    """The hierarchy whose paths are reported."""
    for path in map(Path, ("/sys/fs/cgroup/unified", "/sys/fs/cgroup/systemd", "/sys/fs/cgroup")):
        if (path / "cgroup.procs").exists():
            return path
    pytest.skip("no cgroup hierarchy that systemd would use is mounted")


@pytest.fixture
def in_cgroup():
    """Run a body in a cgroup of this path; the cgroups are removed afterwards."""
    made = []

    def run(path: str, body) -> int:
        root = hierarchy()
        group = root / path.lstrip("/")
        for directory in reversed([group, *group.parents]):
            if root in directory.parents and not directory.exists():
                directory.mkdir()
                made.append(directory)
        return child(lambda: ((group / "cgroup.procs").write_text(str(os.getpid())), body()))

    yield run
    for directory in reversed(made):
        directory.rmdir()


@pytest.fixture
def fails(tmp_path):
    """The body of a process that executes a failing program named cnptest-group."""
    program = shutil.copy("/bin/false", tmp_path / "cnptest-group")
    return lambda: os.execv(program, [program])


@pytest.fixture
def daemon(tmp_path):
    hook = tmp_path / "hook"
    hook.write_text(f'#!/bin/sh\nprintf "%s\\n" "$CNPROCD_UNIT" "$@" > {tmp_path}/seen.$CNPROCD_PID\n')
    hook.chmod(0o755)
    with running(tmp_path, RULES % hook) as daemon:
        yield daemon


USER = "/user.slice/user-1000.slice/user@1000.service"
POD = "8dbc9c6c-2f1a-4f3e-9a76-0f3a1b2c3d4e"


@pytest.mark.parametrize(
    ("path", "rules", "fields"),
    [
        (r"/system.slice/mnt-my\x2ddata.mount", ["any", "unit"], {"unit": r"mnt-my\x2ddata.mount"}),
        (f"{USER}/app.slice/foo.service", ["any", "user-unit"],
         {"unit": "user@1000.service", "user_unit": "foo.service"}),
        (
            f"/kubepods/burstable/pod{POD}/crio-{ID}",
            ["any", "container", "pod"],
            {"unit": None, "container": ID, "runtime": "cri-o", "pod_uid": POD},
        ),
        (f"/system.slice/docker-{'ab' * 32}.scope/docker/{ID}", ["any", "container"],
         {"unit": f"docker-{'ab' * 32}.scope", "container": ID, "containers": ["ab" * 32, ID], "runtime": "docker"}),
    ],
    ids=["mount", "user-unit", "pod", "nested"],
)  # fmt: skip
def test_unit_and_container_of_a_dead_process(daemon, in_cgroup, fails, path, rules, fields):
    pid = in_cgroup(path, fails)
    daemon.wait_for("rule_matched", rule="any", pid=pid)  # its zombie is there until then
    wait_status(pid)
    daemon.mark()
    records = {record["rule"]: record for record in daemon.matches(pid=pid)}
    assert sorted(records) == sorted(rules)
    assert {name: records["any"].get(name) for name in fields} == fields


def test_the_unit_is_that_of_the_death_while_it_can_be_read(daemon, in_cgroup):
    """Moved after its exec, as a desktop session and cgclassify do: a zombie still has its last cgroup."""
    before, after = "/system.slice/before.service", "/system.slice/after.service"

    def body():
        rename("cnptest-group")
        (hierarchy() / after.lstrip("/") / "cgroup.procs").write_text(str(os.getpid()))
        os._exit(3)

    holder = in_cgroup(after, lambda: os._exit(0))
    wait_status(holder)
    pid = in_cgroup(before, body)
    record = daemon.wait_for("rule_matched", rule="any", pid=pid)
    wait_status(pid)
    assert record["unit"] == "after.service"


def test_a_hook_gets_the_units_name_as_systemctl_takes_it(daemon, in_cgroup, fails, tmp_path):
    name = r"mnt-my\x2ddata.mount"
    pid = in_cgroup(f"/system.slice/{name}", fails)
    daemon.wait_for("hook_finished", rule="any")
    wait_status(pid)
    assert (tmp_path / f"seen.{pid}").read_text().splitlines()[:3] == [name, "--unit", name]


def test_systemctl_takes_the_name(tmp_path):
    """The truth from systemd itself, where it is installed: the escaped name is a valid unit name."""
    try:
        escaped = subprocess.run(
            ["systemd-escape", "--path", "--suffix=mount", "/mnt/my-data"], capture_output=True, text=True, check=True
        ).stdout.strip()
    except FileNotFoundError:
        pytest.skip("needs systemd-escape")
    assert json.dumps(escaped) == r'"mnt-my\\x2ddata.mount"'
