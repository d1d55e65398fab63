"""`cnprocctl doctor`: what keeps cnprocd from working here, and the mend. Each check is a function in the table.

A check looks at one thing and says pass, warn or fail, with what it found; where it is not pass, what to do. It never
raises: a check that cannot look says so as a warning. The proof is in the middle: a real round trip through the kernel.
"""

from __future__ import annotations

import gzip
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cnprocd.cli import canary
from cnprocd.cli.grammar import Options
from cnprocd.cli.ruleset import loaded_rules, warnings
from cnprocd.cli.terminal import Style, duration, print_json, size
from cnprocd.connector.uapi import NETLINK_CONNECTOR, QUEUED_EVENT_BYTES
from cnprocd.control.client import Client, NotRunningError
from cnprocd.errors import EX_OK, CnprocdError
from cnprocd.launch.program import open_program
from cnprocd.process.procfs import read_stat
from cnprocd.rules.problems import RulesError

Level = Literal["pass", "warn", "fail"]
_COLOURS = {"pass": "green", "warn": "yellow", "fail": "red"}
_CAPABILITIES = {12: "CAP_NET_ADMIN", 19: "CAP_SYS_PTRACE"}
_INIT_NAMESPACES = {"pid": 0xEFFFFFFC, "user": 0xEFFFFFFD}  # include/linux/proc_ns.h
_OPTIONS = {"CONFIG_CONNECTOR": "fail", "CONFIG_PROC_EVENTS": "fail", "CONFIG_TASKSTATS": "warn"}
_LEAST_FREE_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the doctor's."""

    level: Level
    what: str
    mend: str = ""


Check = Callable[[Options], Iterator[Finding]]


def doctor(options: Options) -> int:
    """Exit status 1 if anything failed."""
    found = [(name, finding) for name, check in CHECKS.items() for finding in _run(check, options)]
    failed = any(finding.level == "fail" for _, finding in found)
    if options.json:
        print_json([{"check": name, "level": f.level, "what": f.what, "mend": f.mend} for name, f in found])
        return 1 if failed else EX_OK
    style = Style()
    for name, finding in found:
        print(f"{style(_COLOURS[finding.level], finding.level)}  {name.ljust(12)}  {finding.what}")
        if finding.mend and finding.level != "pass":
            print(f"{'':20}{style('dim', '->')} {finding.mend}")
    count = {level: sum(1 for _, f in found if f.level == level) for level in ("pass", "warn", "fail")}
    print(", ".join(f"{number} {level}" for level, number in count.items()))
    return 1 if failed else EX_OK


def _run(check: Check, options: Options) -> Iterator[Finding]:
    try:
        yield from check(options)
    except (OSError, ValueError, CnprocdError) as error:
        yield Finding("warn", f"could not be looked at: {error}", "run it as root" if os.geteuid() else "")


def _capabilities(options: Options) -> Iterator[Finding]:
    line = next(one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith("CapEff:"))
    held = int(line.split()[1], 16)
    for bit, name in _CAPABILITIES.items():
        if held >> bit & 1:
            yield Finding("pass", f"{name} is there")
        elif name == "CAP_NET_ADMIN":
            yield Finding("fail", f"{name} is missing: no events, no exit records", "run as root (here: sudo)")
        else:
            yield Finding("warn", f"{name} is missing: `exe` of other users' processes is unknown", "run as root")


def _namespaces(options: Options) -> Iterator[Finding]:
    for kind, inode in _INIT_NAMESPACES.items():
        if os.stat(f"/proc/self/ns/{kind}").st_ino == inode:
            yield Finding("pass", f"in the host's {kind} namespace")
        else:
            yield Finding(
                "fail", f"in another {kind} namespace: the kernel ignores us", "run on the host, not in a container"
            )
    try:
        same = os.stat("/proc/self/ns/net").st_ino == os.stat("/proc/1/ns/net").st_ino
    except PermissionError:
        return  # the round trip will show it
    if same:
        yield Finding("pass", "in the host's network namespace")
    else:
        yield Finding(
            "fail", "in another network namespace: nobody answers there", "on the host, without PrivateNetwork="
        )


def _kernel(options: Options) -> Iterator[Finding]:
    release = os.uname().release
    major, minor = (int("".join(c for c in part if c.isdigit()) or 0) for part in release.split(".")[:2])
    if (major, minor) >= (6, 6):
        yield Finding("pass", f"Linux {release}: events are filtered by mask in the kernel")
    else:
        yield Finding(
            "pass", f"Linux {release}: before 6.6, so every event reaches our socket filter (works, costs more)"
        )
    config = _config(release)
    if config is None:
        yield Finding("pass", "no kernel configuration to read; the round trip below is the proof")
        return
    for option, level in _OPTIONS.items():
        if f"{option}=y" in config:
            yield Finding("pass", f"{option}=y")
        else:
            mend = "use a kernel built with it" if level == "fail" else "deaths are told by counting threads instead"
            yield Finding("fail" if level == "fail" else "warn", f"{option} is not set", mend)


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
        heard = canary.round_trip()
    except CnprocdError as error:
        yield Finding("fail", error.what, error.hint)
        return
    if heard.event is None:
        mend = "another program may have muted it with a stray IGNORE: restart cnprocd, and see the listeners below"
        yield Finding("fail", "subscribed, but the death of a child was not told", mend)
    elif heard.event.exit_code != canary.CODE << 8:
        yield Finding("fail", f"a child's exit({canary.CODE}) was told as status {heard.event.exit_code}")
    else:
        yield Finding("pass", f"a child's exit({canary.CODE}) was told after {duration(heard.after_s)}")
    if not heard.features.taskstats:
        yield Finding("warn", f"no exit records: {heard.no_taskstats_because}", "works without; rules cost more")
    elif heard.event is not None and heard.record is None:
        yield Finding("warn", "exit records are promised, but none came", "works without: --refuse taskstats")
    elif heard.record is not None:
        yield Finding("pass", f"its exit record named it: {heard.record.comm}, uid {heard.record.uid}")
    held = heard.buffer_bytes // QUEUED_EVENT_BYTES
    if heard.buffer_bytes >= canary.BUFFER_BYTES:
        yield Finding("pass", f"a receive buffer of {size(heard.buffer_bytes)} is granted: {held} events")
    else:
        mend = "run as root, or sysctl -w net.core.rmem_max=8388608"
        yield Finding("warn", f"the receive buffer is cut to {size(heard.buffer_bytes)}: {held} events", mend)


def _listeners(options: Options) -> Iterator[Finding]:
    """Whoever else hears process events; a PID in the list is the socket's address, by custom its owner."""
    found = []
    for line in Path("/proc/net/netlink").read_text().splitlines()[1:]:
        fields = line.split()
        if int(fields[1]) == NETLINK_CONNECTOR and int(fields[3], 16) & 1:
            stat = read_stat(int(fields[2]))
            drops = int(fields[8])
            name = f"{stat.comm}[{fields[2]}]" if stat is not None else f"port {fields[2]}"
            found.append(f"{name}{f' ({drops} lost)' if drops else ''}")
    yield Finding("pass", f"listening to process events: {', '.join(found) or 'nobody'}")


def _rules(options: Options) -> Iterator[Finding]:
    try:
        loaded = loaded_rules(options.rules)
    except RulesError as error:
        yield Finding("fail", f"the rules have {len(error.problems)} mistakes: {error.what}", "cnprocctl check")
        return
    files = ", ".join(map(str, loaded.files))
    yield Finding("pass", f"{files}: no mistakes in {len(loaded.rules)} rule(s)")
    found = warnings(loaded)
    if found:
        yield Finding("warn", f"{len(found)} warnings about the rules", "cnprocctl check")
    off = [rule.name for rule in loaded.rules if not rule.enabled]
    if off:
        yield Finding("warn", f"disabled: {', '.join(off)}", "cnprocctl rules enable NAME")
    for rule in loaded.rules:
        if rule.run is not None:
            yield _program(rule.name, "".join(str(part) for part in rule.run.command[0].parts))


def _program(rule: str, path: str) -> Finding:
    try:
        os.close(open_program(path).fd)
    except CnprocdError as error:
        return Finding("fail", f"hook of {rule}: {error.what}", error.hint or "install the program, or mend the rule")
    return Finding("pass", f"hook of {rule}: {path}")


def _places(options: Options) -> Iterator[Finding]:
    state = options.state_dir
    if not state.exists():
        yield Finding("warn", f"{state} does not exist yet", "the service makes it when it starts")
    else:
        mode = state.stat().st_mode & 0o777
        if mode & 0o022:
            yield Finding("fail", f"{state} can be written by others ({mode:o})", f"chmod go-w {state}")
        else:
            yield Finding("pass", f"{state} is private enough ({mode:o})")
        free = shutil.disk_usage(state).free
        low = free < _LEAST_FREE_BYTES
        yield Finding("warn" if low else "pass", f"{size(free)} free for jobs in {state}", "make room" if low else "")
        damaged = sorted(
            one.name for one in state.glob("spool.sqlite3.damaged-*") if not one.name.endswith(("-wal", "-shm"))
        )
        if damaged:
            yield Finding(
                "warn", f"damaged spools were put aside: {', '.join(damaged)}", "look at them, then remove them"
            )


def _daemon(options: Options) -> Iterator[Finding]:
    try:
        with Client(options.runtime_dir) as client:
            status: Any = client.ask("status")
    except NotRunningError as error:
        yield Finding("warn", error.what, error.hint)
        return
    yield Finding("pass", f"cnprocd {status['version']} runs as PID {status['pid']}, up {duration(status['uptime_s'])}")
    lost, jobs = status["lost"]["total"], status["jobs"]
    if lost:
        yield Finding("warn", f"{lost} events were lost since it started", "settings: {receive_buffer: 32M}")
    if not jobs["durable"]:
        yield Finding("fail", f"jobs are not durable: {jobs['why_not_durable']}", "mend the state directory")
    if jobs["dead"]:
        yield Finding("warn", f"{jobs['dead']} hooks have failed for good", "cnprocctl jobs list --state dead")
    if jobs["shed"]:
        yield Finding(
            "fail", f"{jobs['shed']} hooks were not queued: the queue was full", "settings: {queue_limit: ...}"
        )


def _systemd(options: Options) -> Iterator[Finding]:
    if not Path("/run/systemd/system").is_dir():
        yield Finding("pass", "this machine does not run systemd; cnprocd can run in the foreground")
        return
    said = subprocess.run(
        ["systemctl", "is-enabled", "cnprocd.service"], capture_output=True, text=True, timeout=10, check=False
    ).stdout.strip()
    if said == "enabled":
        yield Finding("pass", "cnprocd.service starts with the machine")
    else:
        yield Finding("warn", f"cnprocd.service is {said or 'not installed'}", "systemctl enable --now cnprocd")


CHECKS: dict[str, Check] = {
    "privilege": _capabilities,
    "namespaces": _namespaces,
    "kernel": _kernel,
    "round trip": _round_trip,
    "listeners": _listeners,
    "rules": _rules,
    "state": _places,
    "daemon": _daemon,
    "systemd": _systemd,
}
