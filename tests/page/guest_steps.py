"""The steps of vm.py in the guest; it stands there as steps.py. See tests/vm/guest/steps.py."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

import life
from probe import StepFailedError, diagnose, die, run

NETWORK = "[Match]\nType=ether\n[Network]\nAddress=10.0.2.15/24\nLinkLocalAddressing=no\n"


def console() -> str:
    """Start Cockpit's web server for the forwarded port, with a session of root. Return its version."""
    Path("/etc/systemd/network/page.network").write_text(NETWORK)
    run("systemctl", "start", "systemd-networkd.service")
    server = next(path for path in ("/usr/lib/cockpit/cockpit-ws", "/usr/libexec/cockpit-ws") if Path(path).exists())
    run("systemd-run", "--unit=page-cockpit", "--setenv=HOME=/root", server, "--no-tls", "--port=9090",
        "--local-session=/usr/bin/cockpit-bridge")  # fmt: skip
    return run("dpkg-query", "-W", "-f", "${Version}", "cockpit-ws").stdout


def death() -> str:
    """Let a process fail. Return its PID."""
    return str(die("vmpage", 4))


STEPS = {step.__name__: step for step in (life.boot, life.install, life.enable, console, death)}

if __name__ == "__main__":
    if sys.argv[1] == "diagnose":
        print(diagnose())
    else:
        try:
            print(STEPS[sys.argv[1]]())
        except StepFailedError as reason:
            print(reason)
            sys.exit(1)
        except Exception:
            traceback.print_exc(file=sys.stdout)
            sys.exit(1)
