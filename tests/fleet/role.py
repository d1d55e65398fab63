"""`make test-fleet`: the Ansible role of packaging/fleet, and a daemon in a mount namespace with its own /etc/cnprocd.

Good rules are put in force; rules that the host rejects leave the former ones in force and fail the play; rules that
are in force already change nothing. ansible-core is installed from the package registry into .fleet/ansible.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from machines import run, until

ROOT = Path(__file__).resolve().parents[2]
VENV = ROOT / ".fleet" / "ansible"
GOOD = "rules:\n  - {name: failed, events: [nonzero_exit], match: {comm: a}}\n"
MORE = "rules:\n  - {name: more, events: [nonzero_exit], match: {comm: b}}\n"
BETTER = GOOD.replace("name: failed", "name: better")
BAD = "rules:\n  - {name: failed, events: [died]}\n"
PLAY = """
- hosts: all
  gather_facts: false
  roles:
    - role: cnprocd_rules
      cnprocd_rules_cnprocctl: {directory}/cnprocctl
      cnprocd_rules_main: {directory}/repository/rules.yaml
      cnprocd_rules_dropins: ["{directory}/repository/rules.d/10-more.yaml"]
"""


class Scene:
    """A daemon and a controller, each in a mount namespace where `etc` is /etc/cnprocd."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        for name in ("etc/rules.d", "repository/rules.d"):
            (directory / name).mkdir(parents=True)
        self.etc, self.repository = directory / "etc", directory / "repository"
        wrapper = directory / "cnprocctl"
        options = f"--runtime-dir {directory}/run --state-dir {directory}/state"
        wrapper.write_text(f'#!/bin/sh\nexec {sys.executable} -m cnprocd.cli.cnprocctl {options} "$@"\n')
        wrapper.chmod(0o755)
        (directory / "play.yaml").write_text(PLAY.format(directory=directory))
        (self.etc / "rules.yaml").write_text("rules: []\n")

    def inside(self, *words: object) -> list[str]:
        script = f'mount --bind {self.etc} /etc/cnprocd && exec "$@"'
        return ["unshare", "--mount", "sh", "-c", script, "sh", *map(str, words)]

    def play(self, main: str, dropin: str = MORE) -> tuple[int, str]:
        """Run the role with these files in the repository. Return its status and the number of changes."""
        (self.repository / "rules.yaml").write_text(main)
        (self.repository / "rules.d/10-more.yaml").write_text(dropin)
        environment = {
            **os.environ,
            "ANSIBLE_ROLES_PATH": str(ROOT / "packaging/fleet/roles"),
            "ANSIBLE_HOME": str(self.directory / "ansible"),
            "ANSIBLE_LOCALHOST_WARNING": "False",
            "ANSIBLE_NOCOLOR": "1",
        }
        python = f"ansible_python_interpreter={sys.executable}"
        command = [
            VENV / "bin/ansible-playbook",
            "-i",
            "host,",
            "-c",
            "local",
            "-e",
            python,
            self.directory / "play.yaml",
        ]
        done = subprocess.run(self.inside(*command), env=environment, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    def in_force(self) -> dict[str, object]:
        status = json.loads(run(*self.inside(self.directory / "cnprocctl", "status", "--json")))
        return {"rules": [rule["name"] for rule in status["rules"]], "ok": status["reload"]["ok"]}

    def files(self) -> dict[str, str]:
        return {str(file.relative_to(self.etc)): file.read_text() for file in self.etc.rglob("*") if file.is_file()}


def expect(what: str, found: object, wanted: object, output: str) -> None:
    if found != wanted:
        raise SystemExit(f"{what}: {found!r} instead of {wanted!r}\n{output}")
    print(f"role: {what}")


def check(scene: Scene) -> None:
    status, output = scene.play(GOOD)
    expect(
        "new rules are put in force", (status, scene.in_force()), (0, {"rules": ["failed", "more"], "ok": True}), output
    )
    status, output = scene.play(GOOD)
    expect("the same rules change nothing", (status, "changed=0" in output), (0, True), output)
    before = scene.files()
    status, output = scene.play(BAD)
    expect("invalid rules fail before they replace any", (status != 0, scene.files()), (True, before), output)
    # They pass the check on the host and not the daemon, which sees a file that the role does not know.
    (scene.etc / "rules.d/20-host.yaml").write_text(BETTER)
    before = scene.files()
    status, output = scene.play(BETTER)
    found = (status != 0, scene.files() == before, "former ones are in force" in output)
    expect("rules that the daemon rejects are rolled back", found, (True, True, True), output)
    (scene.etc / "rules.d/20-host.yaml").unlink()
    status, output = scene.play(BETTER)
    expect("and the next good ones are put in force", (status, scene.in_force()["ok"]), (0, True), output)


def main() -> None:
    if not (VENV / "bin/ansible-playbook").exists():
        run(sys.executable, "-m", "venv", VENV)
        run(VENV / "bin/pip", "install", "-q", "ansible-core>=2.17")
    mount_point = Path("/etc/cnprocd")
    made = not mount_point.exists()
    mount_point.mkdir(exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix="cnprocd-role-") as name:
            scene = Scene(Path(name))
            options = ["--runtime-dir", f"{name}/run", "--state-dir", f"{name}/state", "--log-format", "json"]
            command = scene.inside(sys.executable, "-m", "cnprocd.cli.cnprocd", *options)
            with (scene.directory / "log").open("wb") as log, subprocess.Popen(command, stdout=log) as daemon:
                try:
                    until("the daemon is ready", lambda: b'"started"' in (scene.directory / "log").read_bytes())
                    check(scene)
                finally:
                    daemon.terminate()
    finally:
        if made:
            mount_point.rmdir()


if __name__ == "__main__":
    main()
