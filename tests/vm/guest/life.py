"""Steps of the life of an installation: boot, install, enable, stop, reboot, remove, purge."""

from __future__ import annotations

import os
import pwd
import re
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

from probe import RULES, cursor, die, expect, first, main_pid, run, show

HERE = Path(__file__).resolve().parent
SOURCES = Path("/etc/apt/cnprocd-vm.list")
SUITE = re.findall(r"VERSION_CODENAME=(\w+)", Path("/etc/os-release").read_text())[0]


def boot() -> str:
    kernel = os.uname().release
    systemd = run("systemctl", "--version").stdout.split()[1]
    return f"kernel {kernel}, systemd {systemd}"


def install() -> str:
    """Install from the signed repository, offline: dependencies are in the package or already installed."""
    SOURCES.write_text(f"deb [signed-by={HERE}/repository/cnprocd.asc] file:{HERE}/repository/apt {SUITE} main\n")
    options = ("-o", f"Dir::Etc::SourceList={SOURCES}", "-o", "Dir::Etc::SourceParts=/dev/null")
    run("apt-get", *options, "update", "--error-on=any")
    run("apt-get", *options, "install", "-y", "--no-install-recommends", "cnprocd", timeout=300)
    SOURCES.unlink()
    expect(pwd.getpwnam("cnprocd").pw_shell == "/usr/sbin/nologin", "the user cnprocd may log in")
    expect(show("cnprocd.service", "ActiveState") == "inactive", "started without being asked")
    expect(show("cnprocd.service", "UnitFileState") == "disabled", "enabled without being asked")
    warnings = run("systemd-analyze", "verify", "cnprocd.service", "cnprocd-runner.service", ok=False).stderr
    ours = [line for line in warnings.splitlines() if "cnprocd" in line and "man " not in line]
    expect(not ours, "systemd-analyze verify: " + "\n".join(ours))
    found = run("dpkg-query", "-W", "-f", "${Version} ${Architecture}", "cnprocd").stdout
    return f"{found} from the signed repository"


# Tests that depend on the kernel. The result of the others is the same on any kernel.
KERNEL_TESTS = ("canary", "events", "identity", "loss", "semantics", "storm")
AS_IT_IS = "not (oldest or no-taskstats or no-event-mask)"  # nothing refused: this kernel lacks the features for real


def kernel_suite() -> str:
    """Run tests/kernel of the checkout on this kernel, as root, with the package's modules (not yet installed)."""
    (deb,) = HERE.glob("packages/1/*.deb")
    unpacked = Path("/run/cnprocd-vm/unpacked")
    run("dpkg-deb", "-x", str(deb), str(unpacked))
    roots = [unpacked / "usr/lib/cnprocd", unpacked / "usr/lib/python3/dist-packages"]
    path = os.pathsep.join(str(root) for root in roots if (root / "cnprocd").is_dir())
    files = [f"tests/kernel/test_{name}.py" for name in KERNEL_TESTS]
    files.append("tests/unit/cli/test_recorded_examples.py")  # recorded on another machine
    log = HERE / "kernel_suite.log"
    command = ["python3", "-m", "pytest", "-v", "-ra", "--tb=short", "-p", "no:cacheprovider", "-k", AS_IT_IS, *files]
    # Emulated code: the start of a daemon takes a minute on a busy host.
    environ = os.environ | {"PYTHONPATH": path, "CNPTEST_PATIENCE": "6"}
    # A file, not a pipe: a process left behind by a test would keep a pipe open. Its last line shows where a run hangs.
    with log.open("w") as output:
        pytest = subprocess.Popen(command, cwd=HERE, env=environ, stdout=output, stderr=subprocess.STDOUT)
        try:
            code = pytest.wait(float(os.environ["CNPROCD_VM_LIMIT_S"]) * 0.9)
        except subprocess.TimeoutExpired:
            code = -1
            pytest.send_signal(signal.SIGINT)  # it prints the failures so far
            with suppress(subprocess.TimeoutExpired):
                pytest.wait(60)
            pytest.kill()
    said = log.read_text(errors="replace")
    expect(code == 0, said[-8000:])
    return said.strip().splitlines()[-1]


def enable() -> str:
    run("systemctl", "enable", "--now", "cnprocd.service", timeout=180)
    expect(show("cnprocd.service", "ActiveState") == "active", "not active after systemctl enable --now")
    held = show("cnprocd-connector.socket", "ActiveState")
    expect(held == "active", f"the connector socket is {held}")
    kmsg = show("cnprocd-kmsg.socket", "ActiveState")
    expect(kmsg == "active", f"the unit of the kernel's log is {kmsg}")
    return show("cnprocd.service", "StatusText")


def sandbox() -> str:
    """Check that the daemon runs as its user with two capabilities and a filter; check systemd's exposure figure."""
    status = Path(f"/proc/{main_pid()}/status").read_text()
    field = dict(re.findall(r"^(\w+):\s+(.*)$", status, re.M))
    expect(field["Uid"].split()[0] == str(pwd.getpwnam("cnprocd").pw_uid), f"runs as uid {field['Uid']}")
    capabilities = (1 << 12) | (1 << 19)  # CAP_NET_ADMIN, CAP_SYS_PTRACE
    expect(int(field["CapEff"], 16) == int(field["CapBnd"], 16) == capabilities, f"capabilities {field['CapEff']}")
    expect(field["NoNewPrivs"] == "1" and field["Seccomp"] == "2", "not sandboxed")
    text = run("systemd-analyze", "security", "--no-pager", "cnprocd.service").stdout
    figure = re.findall(r"Overall exposure level for cnprocd.service: ([0-9.]+)", text)[0]
    expect(float(figure) <= 1.5, f"systemd-analyze security reports {figure}, above 1.5")
    return f"systemd-analyze security {figure}"


def stop_start() -> str:
    """Stop the service: its sockets are closed as well, and neither process events nor kernel lines start it again."""
    run("systemctl", "stop", "cnprocd.service")
    expect(show("cnprocd-connector.socket", "ActiveState") == "inactive", "the connector socket outlived a stop")
    for number in range(20):
        die("vmstopped", 9)
        Path("/dev/kmsg").write_text(f"line {number} after the stop of cnprocd\n")
    units = ("cnprocd.service", "cnprocd-connector.socket", "cnprocd-kmsg.socket")
    states = [show(unit, "ActiveState") for unit in units]
    expect(states == ["inactive"] * len(units), f"after events: {states}")
    run("systemctl", "start", "cnprocd.service", timeout=180)
    after = cursor()
    pid = die("vmfail", 4)
    first(after, f"CNPROCD_PID={pid}", "CNPROCD_EVENT=rule_matched")
    return "stayed stopped, then matched again"


def reboot() -> str:
    run("systemctl", "--no-block", "reboot")
    return "requested"


def remove() -> str:
    RULES.write_text(RULES.read_text() + "# edited\n")
    run("apt-get", "remove", "-y", "cnprocd", timeout=300)
    expect(run("pgrep", "-f", "/usr/bin/cnprocd", ok=False).returncode == 1, "a process of cnprocd still runs")
    expect(RULES.read_text().endswith("# edited\n"), "the edited rules are gone")
    expect(not Path("/usr/bin/cnprocd").exists(), "/usr/bin/cnprocd is still there")
    return "the rules stay"


def purge() -> str:
    run("apt-get", "purge", "-y", "cnprocd", timeout=300)
    found = run(
        "find", "/etc", "/usr", "/var", "/run", "/home", "-xdev", "-name", "*cnprocd*",
        "-not", "-path", "/run/cnprocd-vm*", "-not", "-path", "/var/tmp/cnprocd-vm*", "-not", "-name", "*cnprocd-vm*",
        "-not", "-path", "/run/udev/*",  # the agent's port
        # apt's logs, and the guest's disk of packages.
        "-not", "-path", "/var/log/*", "-not", "-path", "/var/cache/apt/*",
    ).stdout.split()  # fmt: skip
    inside = run("find", *found, "-not", "-type", "d").stdout.split() if found else []
    expect(not found, "left behind: " + " ".join([*found, *inside]))
    try:
        pwd.getpwnam("cnprocd")
    except KeyError:
        return "nothing left"
    expect(False, "the user cnprocd is left behind")
    return ""
