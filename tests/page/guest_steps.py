"""The steps of vm.py that run in the guest. There it is called steps.py; see tests/vm/guest/steps.py."""

from __future__ import annotations

import sys
from pathlib import Path

import life
from probe import die, expect, run, run_step, show, write_rules

NETWORK = "[Match]\nType=ether\n[Network]\nAddress=10.0.2.15/24\nLinkLocalAddressing=no\n"
USER, PASSWORD = "inspector", "open-the-page-19"
RULES = """\
rules:
  - name: process-failed
    events: [nonzero_exit]
    match: {comm: "vmpage*"}
"""


def console() -> str:
    """Listen with Cockpit's own socket unit. Make a user that may use sudo. Return Cockpit's version."""
    Path("/etc/systemd/network/page.network").write_text(NETWORK)
    run("systemctl", "start", "systemd-networkd.service")
    run("useradd", "--create-home", "--groups", "sudo", "--shell", "/bin/bash", USER)
    run("sh", "-c", f"echo {USER}:{PASSWORD} | chpasswd")
    run("systemctl", "start", "cockpit.socket")
    return run("dpkg-query", "-W", "-f", "${Version}", "cockpit").stdout


def mistake() -> str:
    """Write a rule file with a mistake: cnprocd does not start with it."""
    write_rules(RULES.replace("nonzero_exit", "died"))
    return "rules.yaml with an unknown event"


def rules() -> str:
    """Write a rule file without a mistake."""
    write_rules(RULES)
    return "rules.yaml without mistakes"


def active() -> str:
    """Return what systemd knows about the service that the page has started."""
    expect(show("cnprocd.service", "ActiveState") == "active", "the service is not active")
    return f"{show('cnprocd.service', 'StatusText')} (PID {show('cnprocd.service', 'MainPID')})"


def stop() -> str:
    run("systemctl", "stop", "cnprocd.service")
    return "stopped by systemctl"


def death() -> str:
    """Let a process fail. Return its PID."""
    return str(die("vmpage", 4))


def unit_death() -> str:
    """Let a service fail, once the daemon had time to read its process. Return its unit."""
    script = "echo written by vmpage; printf vmpage-unit >/proc/self/comm; sleep 10; exit 5"
    run("systemctl", "reset-failed", "vmpage.service", ok=False)
    run("systemd-run", "--unit=vmpage", "--wait", "sh", "-c", script, ok=False)
    return "vmpage.service"


def remove() -> str:
    run("apt-get", "remove", "-y", "cnprocd", timeout=300)
    expect(not Path("/usr/bin/cnprocctl").exists(), "cnprocctl is still there")
    return "removed by apt-get"


def install_again() -> str:
    return life.install()


STEPS = {
    step.__name__: step
    for step in (
        life.boot, console, life.install, mistake, rules, active, stop, death, unit_death, remove, install_again,
    )
}  # fmt: skip

if __name__ == "__main__":
    sys.exit(run_step(STEPS, sys.argv[1]))
