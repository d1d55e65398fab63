"""Attacks on the daemon by real processes: forged events, hostile names, paths at their limits, reused PIDs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import struct
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest
from kernel.harness import child, rename, running, wait_status

from cnprocd.escape import argument, printable

NOBODY = 65534
FAILED = """
rules:
  - {name: failed, events: [nonzero_exit], match: {comm: "cnptest-*"}}
  - {name: tabled, events: [exit], match: {comm: "cnptest-*", ancestor: {comm: "*"}}}
$MARKER
"""


def state_of(pid):
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@contextmanager
def stopped(daemon):
    """Stop the daemon: it reads no event until the end of the block."""
    daemon.process.send_signal(signal.SIGSTOP)
    while state_of(daemon.process.pid) != "T":
        pass
    try:
        yield
    finally:
        daemon.process.send_signal(signal.SIGCONT)


# -- forged messages ---------------------------------------------------------------------------------------------


def netlink_ports(pid):
    """Return (protocol, port) of a process's netlink sockets."""
    links = [os.readlink(entry.path) for entry in os.scandir(f"/proc/{pid}/fd")]
    inodes = {link[8:-1] for link in links if link.startswith("socket:[")}
    rows = [line.split() for line in Path("/proc/net/netlink").read_text().splitlines()[1:]]
    return [(int(row[1]), int(row[2])) for row in rows if row[9] in inodes]


def event(what, *numbers):
    """Return a datagram that is valid except for its sender."""
    body = struct.pack("=IIQ", what, 0, 1 << 62) + struct.pack("=6I", *numbers, *[0] * (6 - len(numbers)))
    return struct.pack("=IHHIIIIIIHH", 76, 3, 0, 0, 0, 1, 1, 0, 0, len(body), 0) + body


def test_forged_events_are_dropped_and_counted(tmp_path):
    """Forged events claim that a live process failed, dumped core, was killed, forked or execed. None is accepted."""
    gate = os.pipe()
    pid = child(lambda: (rename("cnptest-live"), os.read(gate[0], 1), os._exit(7)))
    with running(tmp_path, FAILED) as daemon:
        forged = [event(0x80000000, pid, pid, status, 17) for status in (0, 1 << 8, 9, 139)]
        forged += [event(0x40000000, pid, pid, 1, 1), event(1, 1, 1, pid, pid), event(2, pid, pid), event(0, 0, 1, 1)]
        forged += [b"", b"\0" * 76, b"\xff" * 76, os.urandom(5000)]
        ports = netlink_ports(daemon.process.pid)
        told = 0
        for protocol in {protocol for protocol, _ in ports}:
            with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, protocol) as forger:
                forger.bind((0, 0))
                for datagram in filter(None, forged):
                    for port in [port for one, port in ports if one == protocol]:
                        forger.sendto(datagram, (port, 0))
                        told += protocol == 11
                    if protocol == 11:
                        forger.sendto(datagram, (0, 1))
                        told += 1
        record = daemon.wait_for("spoofed")
        daemon.mark()
        assert daemon.matches(pid=pid) == []
        assert told > 10 and 1 <= int(str(record["foreign_sender"])) <= told
        os.write(gate[1], b"x")
        wait_status(pid)
        daemon.mark()
        assert {(match["rule"], match["exit_code"], match["comm"]) for match in daemon.matches(pid=pid)} == {
            ("failed", 7, "cnptest-live"),
            ("tabled", 7, "cnptest-live"),
        }


def test_an_unprivileged_user_cannot_send_a_forged_event(tmp_path):
    with running(tmp_path, FAILED) as daemon:
        ports = [port for protocol, port in netlink_ports(daemon.process.pid) if protocol == 11]

        def forge():
            os.setresuid(NOBODY, NOBODY, NOBODY)
            forger = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, 11)
            for address in [(0, 1), *((port, 0) for port in ports)]:
                try:
                    forger.sendto(event(0x80000000, 1, 1, 256, 17), address)
                except PermissionError:
                    continue
                os._exit(1)
            os._exit(0)

        assert wait_status(child(forge)) == 0


# -- names -------------------------------------------------------------------------------------------------------

HOSTILE = {
    "newline": b"a\nb\r\nc",
    "terminal": b"\x1b[2J\x1b]0;x\x07\x9b31m",
    "not-utf8": b"\xff\xfe\xc3(\x80",
    "journal": b"x\nPRIORITY=0\nCNPROCD_RULE=x\nMESSAGE_ID=0",
    "option": b"--help",
    "short-option": b"-rf",
    "dots": b"..",
    "braces": b"{pid}{comm}{{",
    "shell": b"$(id>&2);`id`|&*?~ '\"\\",
    "bidi": "\u202egnp.\u2066x\u200b\u2028".encode(),
    "equals": b"=LD_PRELOAD=x",
    "spaces": b" a  b ",
}
NAMED = """
rules:
  - name: named
    events: [nonzero_exit]
    match: {{exe: "{directory}/*", cmdline: "*"}}
    run:
      command: [{hook}, "{{comm}}", "--name={{comm}}", "{{exe}}"]
      env: {{NAME: "{{comm}}"}}
$MARKER
"""


def hook_that_tells(tmp_path):
    hook = tmp_path / "hook"
    hook.write_text(
        f"#!/bin/sh\ncat /proc/$$/cmdline > {tmp_path}/argv; cat /proc/$$/environ > {tmp_path}/env"
        f"\ncat > {tmp_path}/stdin\n"
    )
    hook.chmod(0o755)
    return hook


def run_and_kill(daemon, program, argv0):
    """Run a process of this program and argv[0] until its exec was seen, and kill it."""
    process = subprocess.Popen([argv0, "60"], executable=program)
    name = os.path.basename(os.fsencode(program))[:15] + b"\n"
    while Path(f"/proc/{process.pid}/comm").read_bytes() != name:
        pass
    daemon.mark()
    process.kill()
    process.wait()
    return process.pid


@pytest.fixture(scope="module")
def named(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("named")
    (tmp_path / "programs").mkdir()
    rules = NAMED.format(directory=tmp_path / "programs", hook=hook_that_tells(tmp_path))
    with running(tmp_path, rules) as daemon:
        yield daemon


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_is_data_in_the_record_and_in_the_hook(named, name):
    raw = HOSTILE[name]
    # A file cannot be called "..", nor hold a "/"; argv[0] can.
    program = os.fsencode(named.directory / "programs") + b"/" + (raw if raw != b".." else b"..x")
    shutil.copy("/bin/sleep", program)
    comm = os.path.basename(program)[:15]
    pid = run_and_kill(named, program, raw)

    record = named.wait_for("rule_matched", rule="named", pid=pid)
    named.wait_for("hook_finished", job_id=record["job_id"])
    text = comm.decode("utf-8", "surrogateescape")
    assert record["comm"] == printable(text)
    assert str(record["comm"]).isprintable() and str(record["message"]).isprintable()
    if record["comm"] != text:
        assert bytes.fromhex(str(record["comm_hex"])) == comm
    for field, exact in {"exe": program, "cmdline": raw + b" 60"}.items():
        told = record.get(f"{field}_hex")
        assert (bytes.fromhex(told) if isinstance(told, str) else str(record[field]).encode()) == exact
    hook, *arguments, end = (named.directory / "argv").read_bytes().split(b"\0")[1:]
    assert (hook, end) == (os.fsencode(named.directory / "hook"), b"")
    as_path = argument(program.decode("utf-8", "surrogateescape"), keep_slash=True)
    shown = argument(text)
    assert [one.decode() for one in arguments] == [shown, f"--name={shown}", as_path]
    assert not arguments[0].startswith((b"-", b".")) and b"/" not in arguments[0]
    environment = (named.directory / "env").read_bytes().split(b"\0")
    assert b"CNPROCD_COMM=" + comm in environment
    assert b"NAME=" + comm in environment
    assert b"CNPROCD_CMDLINE=" + raw + b" 60" in environment  # no rule can make it an argument: check rejects that
    assert not [one for one in environment if one.startswith((b"LD_", b"PRIORITY"))]
    (line,) = (named.directory / "stdin").read_bytes().splitlines()
    assert {**json.loads(line), "job_id": record["job_id"]}.items() <= record.items()


def test_paths_at_and_beyond_their_limit(named):
    """A path of 4095 bytes can be executed and recorded. /proc cannot report a longer one."""
    deep = os.fsencode(named.directory / "programs")
    while len(deep) + 256 < 4095 - 16:
        deep += b"/" + b"\xff" * min(255, 4095 - 17 - len(deep))
        os.mkdir(deep)
    program = deep + b"/" + b"p" * (4095 - 1 - len(deep))
    assert len(program) == 4095
    shutil.copy("/bin/sleep", program)
    pid = run_and_kill(named, program, b"long")
    record = named.wait_for("rule_matched", rule="named", pid=pid)
    named.wait_for("hook_finished", job_id=record["job_id"])
    assert bytes.fromhex(str(record["exe_hex"])) == program
    assert b"CNPROCD_EXE=" + program in (named.directory / "env").read_bytes().split(b"\0")

    rules = named.rules.read_text()
    more = '  - {name: by-comm, events: [nonzero_exit], match: {comm: cnptest-deep, cmdline: "*"}}\n'
    named.reload(rules + more)

    def beyond():
        os.chdir(deep)
        os.mkdir("d" * 200)
        os.chdir("d" * 200)
        shutil.copy("/bin/sleep", "cnptest-deep")
        os.execv("cnptest-deep", ["x", "60"])

    beyond_pid = child(beyond)
    while Path(f"/proc/{beyond_pid}/comm").read_text() != "cnptest-deep\n":
        pass
    with pytest.raises(OSError, match="File name too long"):
        os.readlink(f"/proc/{beyond_pid}/exe")
    named.mark()
    os.kill(beyond_pid, signal.SIGKILL)
    wait_status(beyond_pid)
    named.mark()
    (match,) = named.matches("by-comm", pid=beyond_pid)
    assert (match["exe"], match["cmdline"]) == (None, "x 60")


def unified():
    return next((path for path in map(Path, ("/sys/fs/cgroup/unified", "/sys/fs/cgroup"))
                 if (path / "cgroup.controllers").exists()), None)  # fmt: skip


@pytest.mark.parametrize("length", [3900, 4300], ids=["within", "beyond"])
def test_a_cgroup_path_at_and_beyond_its_limit(tmp_path, length):
    top = unified()
    if top is None:
        pytest.skip("no cgroup v2 is mounted")
    rules = 'rules:\n  - {name: deep, events: [nonzero_exit], match: {comm: cnptest-cg, cgroup: "*/cnptest-z*"}}\n'
    rules += "  - {name: named, events: [nonzero_exit], match: {comm: cnptest-cg}}\n$MARKER"
    made, gate = [], os.pipe()
    home = os.open(".", os.O_RDONLY)
    try:
        os.chdir(top)
        size = 0
        while size < length:  # relative, because an absolute path of that length cannot be named
            name = f"cnptest-z{os.getpid()}" + "z" * 150
            os.mkdir(name)
            made.append(name)
            os.chdir(name)
            size += len(name) + 1
        pid = child(lambda: (rename("cnptest-cg"), os.read(gate[0], 1), os._exit(3)))
        while Path(f"/proc/{pid}/comm").read_text() != "cnptest-cg\n":
            pass
        Path("cgroup.procs").write_text(str(pid))
        with running(tmp_path, rules) as daemon:  # its scan at start reads the cgroups
            os.write(gate[1], b"x")
            wait_status(pid)
            daemon.mark()
            found = {match["rule"]: len(str(match.get("cgroup", ""))) for match in daemon.matches(pid=pid)}
        if size < 4096:
            assert found == {"deep": size, "named": size}
        else:  # kernels report 4095 bytes of it or ENAMETOOLONG: unknown, which matches no rule
            assert found in ({"deep": 4095, "named": 4095}, {"named": 0})
    finally:
        for name in reversed(made):
            os.chdir("..")
            os.rmdir(name)
        os.chdir(home)
        os.close(home)


# -- PIDs --------------------------------------------------------------------------------------------------------


def took_pid(pid, body, tries=50):
    """Start a child with exactly this PID. Return False if another program on this machine takes it first."""
    for _ in range(tries):
        Path("/proc/sys/kernel/ns_last_pid").write_text(str(pid - 1))
        got = child(lambda: body() if os.getpid() == pid else os._exit(0))
        if got == pid:
            return True
        wait_status(got)
    return False


def dies():
    pid = child(lambda: (rename("cnptest-old"), os._exit(5)))
    wait_status(pid)
    return pid


@pytest.mark.parametrize("when", ["before-it-is-read", "before-the-hook"])
def test_a_reused_pid_does_not_change_the_hooks_event(tmp_path, when):
    go = tmp_path / "go"
    hook = tmp_path / "hook"
    hook.write_text(f"#!/bin/sh\nwhile ! [ -e {go} ]; do sleep 0.05; done\ncat\n")
    hook.chmod(0o755)
    rules = "rules:\n  - name: old\n    events: [nonzero_exit]\n    match: {comm: cnptest-old}\n"
    rules += f"    run: {{command: [{hook}], timeout: 30s}}\n$MARKER"
    gate = os.pipe()

    def newcomer():
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        rename("cnptest-new")
        os.read(gate[0], 1)
        os._exit(9)

    with running(tmp_path, rules) as daemon:
        for _ in range(10):
            if when == "before-it-is-read":
                with stopped(daemon):
                    took = took_pid(pid := dies(), newcomer)
            else:
                daemon.wait_for("hook_started", pid=(pid := dies()))
                took = took_pid(pid, newcomer)
            if took:
                break
        else:
            pytest.skip("the PID could not be had again: this machine forks too much")
        go.touch()
        record = daemon.wait_for("rule_matched", rule="old", pid=pid)
        daemon.wait_for("hook_finished", job_id=record["job_id"])
        told = json.loads(str(daemon.wait_for("hook_output", job_id=record["job_id"])["line"]).replace("\\x5c", "\\"))
        for one in (record, told):
            assert (one["comm"], one["uid"], one["exit_code"], one["cmdline"]) == ("cnptest-old", 0, 5, None), one
        os.write(gate[1], b"x")
        wait_status(pid)
