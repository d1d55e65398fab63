"""Attacks on the sockets of daemon and runner: other users, crowds, garbage, and a compromised daemon."""

from __future__ import annotations

import json
import os
import pwd
import socket
import struct
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

from kernel.harness import PATIENCE_S, child, rename, running, wait_status

from cnprocd.control.client import Client
from cnprocd.control.protocol import Call, method_of, pack
from cnprocd.rules.snapshot import Snapshot
from cnprocd.runner import wire

NOBODY = 65534
STRANGER = 1  # user daemon on Debian: neither root nor the daemon's user
READERS = 64321  # gid of group cnprocd, if a test creates one
RULES = """
rules:
  - {name: failed, events: [nonzero_exit], match: {comm: cnptest-sock}}
$MARKER
"""
NOISE = (
    b"",
    b"x" * (1 << 21),  # huge
    b'{"method":',  # half
    b"{",  # slow
    b"\0" * 64,
    b"null\0",
    b"[" * 60_000 + b"\0",
    pack(Call(method_of("status"))) * 50,
    pack(Call(method_of("reload"))),
)


def open_to_all(directory):
    for one in (directory, *directory.parents[:-2]):
        one.chmod(0o755)


@contextmanager
def crowd(uid, gid, path, count, noise=NOISE):
    """Run a process of this user that holds `count` connections, has sent garbage on each, and reads nothing."""
    told, gate = os.pipe(), os.pipe()

    def body():
        os.setgroups([gid])
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
        held = []
        for n in range(count):
            connection = socket.socket(socket.AF_UNIX)
            connection.connect(str(path))
            connection.setblocking(False)
            with suppress(OSError):
                connection.send(noise[n % len(noise)])
            held.append(connection)
        os.write(told[1], b"x")
        os.read(gate[0], 1)
        os._exit(0)

    pid = child(body)
    os.close(told[1])
    try:
        assert os.read(told[0], 1) == b"x", "the crowd did not come together"
        yield
    finally:
        os.write(gate[1], b"x")
        assert wait_status(pid) == 0
        for fd in (told[0], *gate):
            os.close(fd)


def fail():
    pid = child(lambda: (rename("cnptest-sock"), os._exit(3)))
    wait_status(pid)
    return pid


# -- the control socket ------------------------------------------------------------------------------------------


def test_a_thousand_refused_connections_disturb_no_one_else(tmp_path):
    open_to_all(tmp_path)
    with running(tmp_path, RULES) as daemon:
        path = tmp_path / "run" / "control.sock"
        path.chmod(0o666)  # with its initial mode, other users cannot connect
        pids = []
        with crowd(NOBODY, NOBODY, path, 1000):
            for _ in range(20):
                pids.append(fail())
                with Client(tmp_path / "run") as client:
                    assert client.ask("status")["pid"] == daemon.process.pid
        daemon.mark()
        assert [match["pid"] for match in daemon.matches("failed")] == pids
        assert not [one for one in daemon.records if one["event"] in ("rules_loaded", "control_failed")]


def test_the_socket_as_it_is_made_lets_no_stranger_connect(tmp_path):
    open_to_all(tmp_path)
    with running(tmp_path, RULES):

        def connect():
            os.setresuid(NOBODY, NOBODY, NOBODY)
            try:
                socket.socket(socket.AF_UNIX).connect(str(tmp_path / "run" / "control.sock"))
            except PermissionError:
                os._exit(0)

        assert wait_status(child(connect)) == 0


def test_group_members_cannot_lock_root_out(tmp_path):
    """Group cnprocd may read; a hundred connections of its members leave room for root."""
    open_to_all(tmp_path)
    group = tmp_path / "group"
    group.write_text(Path("/etc/group").read_text() + f"cnprocd:x:{READERS}:\n")
    script = f'mount --bind {group} /etc/group && exec "$@"'
    with running(tmp_path, RULES, under=("unshare", "--mount", "sh", "-c", script, "sh")) as daemon:
        path = tmp_path / "run" / "control.sock"
        assert path.stat().st_gid == READERS
        with crowd(NOBODY, READERS, path, 100, [pack(Call(method_of("status")))]), Client(tmp_path / "run") as client:
            found = client.ask("status")
            assert found["pid"] == daemon.process.pid
            pid = fail()
        daemon.mark()
        assert [match["pid"] for match in daemon.matches("failed")] == [pid]


def test_questions_of_group_members_leave_jobs_durable(tmp_path):
    """Patterns and texts that SQLite refuses are refused before they reach the process of the spool."""
    open_to_all(tmp_path)
    group = tmp_path / "group"
    group.write_text(Path("/etc/group").read_text() + f"cnprocd:x:{READERS}:\n")
    script = f'mount --bind {group} /etc/group && exec "$@"'
    questions = [
        Call(method_of(verb), {key: text})
        for verb, keys in {"history": ("rule", "comm", "unit", "user", "after"), "jobs": ("rule",)}.items()
        for key in keys
        for text in ("x" * 100_000, "*a" * 2_000, "\ud800")
    ]

    def ask() -> None:
        os.setgroups([READERS])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        with socket.socket(socket.AF_UNIX) as client, client.makefile("rb") as replies:
            client.connect(str(tmp_path / "run" / "control.sock"))
            for question in questions:
                client.sendall(pack(question))
                reply = bytearray()
                while not reply.endswith(b"\0"):
                    reply += replies.read(1)
                if b"InvalidParameter" not in reply:
                    os._exit(1)
        os._exit(0)

    with running(tmp_path, RULES, under=("unshare", "--mount", "sh", "-c", script, "sh")) as daemon:
        assert wait_status(child(ask)) == 0
        pid = fail()
        daemon.mark()
        assert [match["pid"] for match in daemon.matches("failed")] == [pid]
        with Client(tmp_path / "run") as client:
            assert client.ask("status")["jobs"]["durable"]
        assert not [one for one in daemon.records if one["event"] in ("spool_not_durable", "control_failed")]


# -- the runner --------------------------------------------------------------------------------------------------


@contextmanager
def runner(tmp_path):
    """Start the runner as its socket unit does, for a daemon of user `nobody`. Return its socket, directory and log."""
    open_to_all(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out").chmod(0o777)
    hook = tmp_path / "hook"
    hook.write_text(
        f'#!/bin/sh\ncd {tmp_path}/out\necho "$(id -u) $0 $*" >> ran\ntr "\\0" "\\n" </proc/$$/environ >> env\n'
    )
    hook.chmod(0o755)
    rules = tmp_path / "rules.yaml"
    rules.write_text(
        f"rules:\n  - name: mine\n    events: [nonzero_exit]\n    match: {{comm: cnptest-sock}}\n"
        f'    run: {{command: [{hook}, "--name={{comm}}"], user: {pwd.getpwuid(STRANGER).pw_name}, timeout: 5s}}\n'
        "  - {name: without, events: [nonzero_exit], match: {comm: cnptest-sock}}\n"
    )
    path = tmp_path / "runner.sock"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(64)
    path.chmod(0o666)  # with the mode of the socket unit, only the daemon's user could connect
    command = f"ulimit -n 256; exec 3<&{listener.fileno()}; LISTEN_PID=$$ exec {sys.executable} -m cnprocd.cli.runner"
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            ["bash", "-c", f"{command} --rules {rules} --state-dir {tmp_path}/runner --user nobody --idle 600"],
            pass_fds=[listener.fileno()],
            env={**os.environ, "LISTEN_FDS": "1", "LISTEN_FDNAMES": "runner"},
            stdout=log,
            stderr=log,
        )
    listener.close()
    try:
        yield path, tmp_path / "out", tmp_path / "log"
        assert process.poll() is None, (tmp_path / "log").read_text()
    finally:
        process.terminate()
        process.wait(PATIENCE_S)


RUN = {
    "type": "run", "attempt_id": "0" * 32, "attempt": 1, "rule": "mine", "job_id": 1, "limit_s": 5.0,
    "kernel_time_ns": None, "events_left_out": 0, "events": [{"pid": 4711, "comm": "x"}],
}  # fmt: skip
TAKE = {"type": "take_snapshot", "wanted": "0" * 64, "keep": []}
HELLO = {"type": "hello", "version": wire.VERSION, "pid": 0}


def framed(body):
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return struct.pack(">I", len(raw)) + raw


def ask(uid, path, frames):
    """Return the frame types that the runner sends to a client of this user, up to a verdict or the end."""
    reading, writing = os.pipe()

    def body():
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(PATIENCE_S)
        connection.connect(str(path))
        said = []
        with suppress(ConnectionError):
            connection.sendall(sent(frames, path.with_name("rules.yaml")))
        with suppress(ConnectionError):
            buffer = bytearray()
            while not {"ended", "not_now"} & set(said) and (data := connection.recv(65536)):
                buffer += data
                said += [json.loads(one)["type"] for one in wire.bodies(buffer)]
        os.write(writing, json.dumps(said).encode())
        os._exit(0)

    pid = child(body)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    assert wait_status(pid) == 0
    return json.loads(said)


def variant(**more):
    """Return the frames of a run. Its snapshot is that of the rule file: the runner makes it when it is asked for."""
    return [framed(HELLO), RUN | more]


def sent(frames, rules):
    """Return the bytes of frames. A run names the snapshot of `rules` if it names none."""
    snapshot = Snapshot.of([(rules, rules.read_bytes())], None).digest
    return b"".join(framed({"snapshot": snapshot} | one) if isinstance(one, dict) else one for one in frames)


REFUSED = {
    "a command": variant(command=["/bin/sh", "-c", "id"]),
    "a user": variant(user="root"),
    "a user in the event": variant(events=[{"pid": 1, "User": 0}]),
    "an environment": variant(env={"LD_PRELOAD": "/tmp/x.so"}),
    "a variable": variant(events=[{"PATH": "/tmp"}]),
    "a variable and its value": variant(events=[{"a=b": "x"}]),
    "no event": variant(events=[]),
    "no number": variant(limit_s=float("nan")),
    "no limit": variant(limit_s=float("inf")),  # not JSON, as NaN
    "a path for an id": variant(attempt_id="../../../../etc/passwd"),
    "deep": [framed(HELLO), framed(b"[" * 200_000)],
    "huge": [framed(HELLO), struct.pack(">I", wire.MOST_FRAME_BYTES + 1) + b"x" * 512],
    "a path for a snapshot": variant(snapshot="../../../../etc/passwd"),
    "too many snapshots": [framed(HELLO), framed(TAKE | {"keep": ["0" * 64] * 65})],
    "another version": [framed(HELLO | {"version": 99})],
    "garbage": [os.urandom(4096)],
}
RULES_THAT_ARE_NONE = ["without", "", "/bin/sh", "../mine", "mine\n", "mine\0", "MINE", "*"]
SERVED = {
    "as it should be": variant(),
    "a huge limit": variant(limit_s=10**400),
    "a name that would be an option": variant(events=[{"pid": 1, "comm": "--x=$(id)\n/bin/sh", "comm_hex": "2d2d00"}]),
    "variables of the loader": variant(events=[{"pid": 1, "ld_preload": "/tmp/x.so", "job_id": "9", "path": "/tmp"}]),
}


def test_a_compromised_daemon_can_only_run_configured_hooks(tmp_path):
    with runner(tmp_path) as (path, out, _):
        for name, frames in REFUSED.items():
            assert set(ask(NOBODY, path, frames)) <= {"hello"}, name
        for rule in RULES_THAT_ARE_NONE:
            assert ask(NOBODY, path, variant(rule=rule)) == ["hello", "ended"], rule
        assert not (out / "ran").exists()
        for name, frames in SERVED.items():
            assert ask(NOBODY, path, frames)[-1] == "ended", name
        ran = (out / "ran").read_text().splitlines()
        assert len(ran) == len(SERVED)
        assert {line.split(" ", 1)[1].split(" --name=")[0] for line in ran} == {str(tmp_path / "hook")}
        assert {line.split()[0] for line in ran} == {str(STRANGER)}
        names = {line.split("=")[0] for line in (out / "env").read_text().splitlines() if "=" in line}
        plain = {"PATH", "LANG", "HOME", "USER", "LOGNAME", "SHELL", "PWD", "MONITOR_SERVICE_RESULT"}
        assert {name for name in names if not name.startswith("CNPROCD_")} <= plain
        assert "/tmp" not in [line[5:] for line in (out / "env").read_text().splitlines() if line.startswith("PATH=")]


def test_the_runner_refuses_strangers_and_serves_the_daemon(tmp_path):
    with runner(tmp_path) as (path, out, log):
        assert ask(STRANGER, path, variant()) == []
        with crowd(STRANGER, STRANGER, path, 1000, (b"", b"\xff" * 64, framed(HELLO), b"\0\0")):
            assert ask(NOBODY, path, variant())[-1] == "ended"
        assert len((out / "ran").read_text().splitlines()) == 1
        assert "may not use the runner" in log.read_text()


def test_a_crowd_of_daemon_connections_leaves_the_runner_alive(tmp_path):
    """Only the daemon's user can do this. A waiting connection is served when the crowd has gone."""
    with runner(tmp_path) as (path, out, log):
        with crowd(NOBODY, NOBODY, path, 1000, (framed(HELLO),)):
            pass
        deadline = time.monotonic() + PATIENCE_S
        while ask(NOBODY, path, variant())[-1:] != ["ended"]:
            assert time.monotonic() < deadline
        assert len((out / "ran").read_text().splitlines()) == 1
        assert "Too many open files" not in log.read_text()
        assert "Traceback" not in log.read_text()
