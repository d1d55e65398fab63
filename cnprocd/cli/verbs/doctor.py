"""`cnprocctl doctor`: diagnose setup problems and suggest fixes. Each check is a function in the table CHECKS.

A check yields findings: pass, warn or fail, and a fix unless it passed. If a check cannot run, that is a warning. One
check is a real round trip through the kernel, which proves what the others only suggest.
"""

from __future__ import annotations

import gzip
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cnprocd.cli import canary
from cnprocd.cli.grammar import Options
from cnprocd.cli.observing import VARIABLE, observes_only
from cnprocd.cli.ruleset import loaded_rules, warnings
from cnprocd.cli.terminal import Style, counted, duration, print_json, size
from cnprocd.cli.this_machine import bad_hooks, program_path, unreadable_rule_files
from cnprocd.connector.listener import USE_HOST
from cnprocd.connector.uapi import NETLINK_CONNECTOR, QUEUED_EVENT_BYTES
from cnprocd.control.client import SYSTEMD, Client, NotRunningError
from cnprocd.errors import EX_OK, CnprocdError
from cnprocd.json_value import get_bool, get_dict, get_int, get_number, get_str, get_str_or_none
from cnprocd.owner_lock import holder_of
from cnprocd.process.host_view import sees_host_files
from cnprocd.process.kernel_log import DEVICE
from cnprocd.process.procfs import read_stat
from cnprocd.rules.problems import RulesError
from cnprocd.surroundings import missing_of_host, missing_records

Severity = Literal["pass", "warn", "fail"]
_COLOURS = {"pass": "green", "warn": "yellow", "fail": "red"}
_CAPABILITIES = {12: "CAP_NET_ADMIN", 19: "CAP_SYS_PTRACE"}
_INIT_NAMESPACES = {"pid": 0xEFFFFFFC, "user": 0xEFFFFFFD}  # include/linux/proc_ns.h
_OPTIONS = {"CONFIG_CONNECTOR": "fail", "CONFIG_PROC_EVENTS": "fail", "CONFIG_TASKSTATS": "warn"}
_LEAST_FREE_BYTES = 64 << 20
_KERNEL_LOG_FIX = (
    "use a kernel built with CONFIG_PRINTK; in a container, pass the device (podman run --device /dev/kmsg)"
)


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    level: Severity
    what: str
    fix: str = ""


Check = Callable[[Options], Iterator[Finding]]


def doctor(options: Options) -> int:
    """Run every check. The exit status is 1 if one failed."""
    found = [(name, finding) for name, check in CHECKS.items() for finding in _run(check, options)]
    failed = any(finding.level == "fail" for _, finding in found)
    if options.json:
        print_json([{"check": name, "level": f.level, "what": f.what, "fix": f.fix} for name, f in found])
        return 1 if failed else EX_OK
    style = Style()
    for name, finding in found:
        print(f"{style(_COLOURS[finding.level], finding.level)}  {name.ljust(12)}  {finding.what}")
        if finding.fix and finding.level != "pass":
            print(f"{'':20}{style('dim', '->')} {finding.fix}")
    count = {level: sum(1 for _, f in found if f.level == level) for level in ("pass", "warn", "fail")}
    print(", ".join(f"{number} {level}" for level, number in count.items()))
    return 1 if failed else EX_OK


def _run(check: Check, options: Options) -> Iterator[Finding]:
    try:
        yield from check(options)
    except (OSError, ValueError, CnprocdError) as error:
        yield Finding("warn", f"cannot check: {error}", "run it as root" if os.geteuid() else "")


def _capabilities(options: Options) -> Iterator[Finding]:
    line = next(one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith("CapEff:"))
    held = int(line.split()[1], 16)
    for bit, name in _CAPABILITIES.items():
        if held >> bit & 1:
            yield Finding("pass", f"{name} is granted")
        elif name == "CAP_NET_ADMIN":
            yield Finding("fail", f"{name} is missing: no events, no exit records", _privileged(name))
        else:
            yield Finding("warn", f"{name} is missing: `exe` of other users' processes is unknown", _privileged(name))


def _privileged(capability: str) -> str:
    return f"run as root (here: sudo), in a container with {capability} added"


def _namespaces(options: Options) -> Iterator[Finding]:
    for kind, inode in _INIT_NAMESPACES.items():
        if os.stat(f"/proc/self/ns/{kind}").st_ino == inode:
            yield Finding("pass", f"in the host's {kind} namespace")
        else:
            yield Finding("fail", f"in another {kind} namespace: the kernel ignores its subscriptions", USE_HOST[kind])
    try:
        same = os.stat("/proc/self/ns/net").st_ino == os.stat("/proc/1/ns/net").st_ino
    except PermissionError:
        return  # the round trip will show it
    if same:
        yield Finding("pass", "in the host's network namespace")
    else:
        yield Finding(
            "fail",
            "in another network namespace: the connector does not exist there",
            f"{USE_HOST['net']}; a systemd service: without PrivateNetwork=",
        )


def _container(options: Options) -> Iterator[Finding]:
    in_container = not sees_host_files()
    for one in missing_of_host():
        yield Finding("warn", one.what, one.fix)
    if not in_container:
        yield Finding("pass", "the host's files are seen")
    elif observes_only(False, os.environ):
        yield Finding("pass", f"hooks are refused ({VARIABLE}): they would have the files and users of the image")
    else:
        what = "hooks would have the files and users of the image, not those of the host"
        yield Finding("warn", what, f"start cnprocd with --observe-only, or set {VARIABLE}=1")


def _kernel(options: Options) -> Iterator[Finding]:
    release = os.uname().release
    major, minor = (int("".join(c for c in part if c.isdigit()) or 0) for part in release.split(".")[:2])
    if (major, minor) >= (6, 6):
        yield Finding("pass", f"Linux {release}: events are filtered by mask in the kernel")
    else:
        yield Finding(
            "pass", f"Linux {release}: before 6.6, so every event reaches the socket filter (works, costs more)"
        )
    config = _config(release)
    if config is None:
        yield Finding("pass", "no kernel configuration to read; the round trip below is the proof")
        return
    for option, level in _OPTIONS.items():
        if f"{option}=y" in config:
            yield Finding("pass", f"{option}=y")
        else:
            fix = (
                "use a kernel built with it"
                if level == "fail"
                else "without it, deaths are detected by counting threads"
            )
            yield Finding("fail" if level == "fail" else "warn", f"{option} is not set", fix)


def _config(release: str) -> set[str] | None:
    for path in (Path("/proc/config.gz"), Path(f"/boot/config-{release}"), Path(f"/lib/modules/{release}/config")):
        try:
            data = path.read_bytes()
        except OSError:
            continue
        text = gzip.decompress(data) if path.suffix == ".gz" else data
        return set(text.decode("utf-8", "replace").splitlines())
    return None


def _round_trip(options: Options) -> Iterator[Finding]:
    try:
        received = canary.round_trip()
    except CnprocdError as error:
        yield Finding("fail", error.what, error.hint)
        return
    if received.event is None:
        fix = "another program may have muted it with a stray IGNORE: restart cnprocd, and see the listeners below"
        yield Finding("fail", "subscribed, but no event came for the exit of a child", fix)
    elif received.event.exit_code != canary.CODE << 8:
        yield Finding("fail", f"a child's exit({canary.CODE}) arrived as status {received.event.exit_code}")
    else:
        yield Finding("pass", f"a child's exit({canary.CODE}) arrived after {duration(received.after_s)}")
    if not received.features.taskstats:
        missing = missing_records(received.no_taskstats_because)
        yield Finding("warn", missing.what, missing.fix or "use a kernel with CONFIG_TASKSTATS, 5.19 or newer")
    elif received.event is not None and received.record is None:
        yield Finding("warn", "exit records are available, but none came", "run cnprocd with --refuse taskstats")
    elif received.record is not None:
        yield Finding("pass", f"its exit record arrived: {received.record.comm}, uid {received.record.uid}")
    held = received.buffer_bytes // QUEUED_EVENT_BYTES
    if received.buffer_bytes >= canary.BUFFER_BYTES:
        yield Finding("pass", f"a receive buffer of {size(received.buffer_bytes)} is granted: {held} events")
    else:
        fix = "run as root, or sysctl -w net.core.rmem_max=8388608"
        yield Finding("warn", f"the receive buffer is cut to {size(received.buffer_bytes)}: {held} events", fix)


def _listeners(options: Options) -> Iterator[Finding]:
    """List the listeners on this machine. A port of netlink is by custom the PID of its owner."""
    found = []
    for line in Path("/proc/net/netlink").read_text().splitlines()[1:]:
        fields = line.split()
        if int(fields[1]) == NETLINK_CONNECTOR and int(fields[3], 16) & 1:
            stat = read_stat(int(fields[2]))
            drops = int(fields[8])
            name = f"{stat.comm}[{fields[2]}]" if stat is not None else f"port {fields[2]}"
            found.append(f"{name}{f' ({drops} lost)' if drops else ''}")
    yield Finding("pass", f"listening to process events: {', '.join(found) or 'none'}")


def _rules(options: Options) -> Iterator[Finding]:
    check = "cnprocctl check" if options.rules is None else f"cnprocctl check --rules {options.rules}"
    try:
        loaded = loaded_rules(options.rules)
    except RulesError as error:
        yield Finding("fail", f"the rules have {counted(len(error.problems), 'error')}: {error.what}", check)
        return
    files = ", ".join(map(str, loaded.files))
    yield Finding("pass", f"{files}: no errors in {counted(len(loaded.rules), 'rule')}")
    found = warnings(loaded, other_host=True)  # hooks and files of this machine have their own findings below
    if found:
        yield Finding("warn", f"{counted(len(found), 'warning')} about the rules", check)
    off = [rule.name for rule in loaded.rules if not rule.enabled]
    if off:
        yield Finding("warn", f"disabled: {', '.join(off)}", "cnprocctl rules enable NAME")
    bad = {one.rule.name: one.error for one in bad_hooks(loaded.rules)}
    for rule in loaded.rules:
        if rule.name in bad:
            yield Finding("fail", f"hook of {rule.name}: {bad[rule.name].what}", bad[rule.name].hint)
        elif rule.enabled and rule.run is not None:
            yield Finding("pass", f"hook of {rule.name}: {program_path(rule)}")
    for one in unreadable_rule_files(options.rules):
        yield Finding("fail", one.message, one.hint)


def _places(options: Options) -> Iterator[Finding]:
    state = options.state_dir
    if not state.exists():
        yield Finding("warn", f"{state} does not exist yet", "the service creates it when it starts")
    else:
        mode = state.stat().st_mode & 0o777
        if mode & 0o022:
            yield Finding("fail", f"{state} can be written by others ({mode:o})", f"chmod go-w {state}")
        else:
            yield Finding("pass", f"{state} is private enough ({mode:o})")
        free = shutil.disk_usage(state).free
        low = free < _LEAST_FREE_BYTES
        yield Finding(
            "warn" if low else "pass", f"{size(free)} free for jobs in {state}", "free some space" if low else ""
        )
        damaged = sorted(
            one.name for one in state.glob("spool.sqlite3.damaged-*") if not one.name.endswith(("-wal", "-shm"))
        )
        if damaged:
            yield Finding(
                "warn", f"damaged spools were renamed: {', '.join(damaged)}", "examine them, then remove them"
            )


def _daemon(options: Options) -> Iterator[Finding]:
    try:
        with Client(options.runtime_dir) as client:
            status = client.ask("status")
    except NotRunningError as error:
        yield Finding("warn", error.what, error.hint)
        return
    version, pid, uptime_s = get_str(status, "version"), get_int(status, "pid"), get_number(status, "uptime_s")
    yield Finding("pass", f"cnprocd {version} runs as PID {pid}, up {duration(uptime_s)}")
    jobs, lost = get_dict(status, "jobs"), get_int(get_dict(status, "lost"), "total")
    if lost:
        doubled_m = max(1, get_int(get_dict(status, "kernel"), "receive_buffer_bytes") * 2 >> 20)
        yield Finding(
            "warn", f"{counted(lost, 'event')} lost since it started", f"settings: {{receive_buffer: {doubled_m}M}}"
        )
    if not get_bool(jobs, "durable"):
        why = get_str_or_none(jobs, "why_not_durable")
        yield Finding("fail", f"jobs are not durable: {why}", "fix the state directory")
    if dead := get_int(jobs, "dead"):
        yield Finding("warn", f"{counted(dead, 'dead job')}", "cnprocctl jobs list --state dead")
    if dropped := get_int(jobs, "shed"):
        yield Finding("fail", f"{counted(dropped, 'job')} dropped: the queue was full", "settings: {queue_limit: ...}")


def _owner(options: Options) -> Iterator[Finding]:
    """Compare the daemons that hold the two directories with each other."""
    holders = {directory: holder_of(directory) for directory in (options.state_dir, options.runtime_dir)}
    held = {directory: pid for directory, pid in holders.items() if pid is not None}
    for directory, pid in held.items():
        yield Finding("pass", f"cnprocd with PID {pid} holds {directory}" if pid else f"{directory} is held elsewhere")
    if len(set(held.values())) > 1:
        fix = "stop one of them: a daemon needs both directories for itself"
        yield Finding("fail", "two daemons hold one directory each", fix)
    elif len(held) == 1:
        (free,) = (directory for directory in holders if directory not in held)
        yield Finding("warn", f"{free} is held by no daemon", "give the daemon both --state-dir and --runtime-dir")


def _package(options: Options) -> Iterator[Finding]:
    """Name what an installation by pip or pipx lacks."""
    if Path("/usr/lib/systemd/system/cnprocd.service").exists():
        yield Finding("pass", "installed with its systemd units")
    else:
        what = "without a package: no systemd units, user cnprocd, manual pages, completions or /etc/cnprocd"
        yield Finding("warn", what, "install a package to get them: docs/install.md")


def _systemd(options: Options) -> Iterator[Finding]:
    if not SYSTEMD.is_dir():
        yield Finding("pass", "this machine does not run systemd; cnprocd can run in the foreground")
        return
    state = _output("systemctl", "is-enabled", "cnprocd.service")
    if state == "enabled":
        yield Finding("pass", "cnprocd.service starts with the machine")
    else:
        yield Finding("warn", f"cnprocd.service is {state or 'not installed'}", "systemctl enable --now cnprocd")


def _kernel_log(options: Options) -> Iterator[Finding]:
    try:
        os.close(os.open(DEVICE, os.O_RDONLY | os.O_NONBLOCK))
    except FileNotFoundError:
        yield Finding("warn", f"there is no {DEVICE}: oom_killed is unknown", _KERNEL_LOG_FIX)
    except PermissionError:
        yield Finding("warn", f"cannot open {DEVICE}", "run it as root")
    else:
        yield Finding("pass", f"{DEVICE} shows OOM kills")
    unit = Path("/usr/lib/systemd/system/cnprocd-kmsg.socket")
    if unit.exists() and SYSTEMD.is_dir():
        state = _output("systemctl", "is-active", "cnprocd-kmsg.socket")
        daemon = _output("systemctl", "is-active", "cnprocd.service")
        if daemon == "active" and state != "active":
            fix = "systemctl unmask cnprocd-kmsg.socket; systemctl restart cnprocd"
            yield Finding("warn", f"cnprocd-kmsg.socket is {state}: oom_killed is unknown", fix)


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=10, check=False).stdout.strip()


CHECKS: dict[str, Check] = {
    "privilege": _capabilities,
    "namespaces": _namespaces,
    "container": _container,
    "kernel": _kernel,
    "round trip": _round_trip,
    "listeners": _listeners,
    "kernel log": _kernel_log,
    "rules": _rules,
    "state": _places,
    "owner": _owner,
    "daemon": _daemon,
    "package": _package,
    "systemd": _systemd,
}
