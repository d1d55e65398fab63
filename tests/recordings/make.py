"""Make the recordings again: real deaths on the real kernel of this machine, one small scenario for each example.

    sudo .venv/bin/python tests/recordings/make.py [NAME ...]

Strategy: each scenario is a shell script. Copies of ordinary programs play a database, a cron and so on, under the
names and users that the rules of config/examples/NAME.yaml match. A scenario also has processes that the rules must not
match. PostgreSQL is the real one. `cnprocctl record` runs meanwhile. A recording contains the arguments of every
process of the machine, so only the processes of the scenario are kept.

Everything runs in a mount namespace of its own, so users and programs of the examples need not exist here.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from cnprocd.cli.recording import Drain, Recording, Writer, facts_of, read
from cnprocd.connector.decode import SLOT_SIZE, Rejects, decode
from cnprocd.connector.event import Fork
from cnprocd.connector.taskrecord import decode_record
from cnprocd.connector.uapi import DATAGRAM_SIZE
from cnprocd.json_value import get_int

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CLONE_NEWNS, MS_REC, MS_PRIVATE, MS_BIND = 0x20000, 0x4000, 1 << 18, 4096
SETTLE_S = 0.5
USERS = "oracle:x:54321:54321::/:/bin/sh\n"
LIBC = ctypes.CDLL(None, use_errno=True)

# For every script: `$as USER PROGRAM ...`, `named NAME PROGRAM` (a copy of it), `./in_unit UNIT PROGRAM ...`.
# A process that must be read at its exec lives for a moment, so that the recording is not a race.
TOOLS = r"""
set -u
as='setpriv --clear-groups --reuid'
named() { cp "$(command -v "$2")" "./$1"; }
mounted() { awk -v what="$1" '$3 == "cgroup" && "," $4 "," ~ "," what "," {print $2; exit}' /proc/mounts; }
units=$(mounted name=systemd); units=${units:-/sys/fs/cgroup}/system.slice
memory=$(mounted memory)/recorded
cat > ./in_unit <<END
mkdir -p "$units/\$1"; echo \$\$ > "$units/\$1/cgroup.procs"; shift; exec "\$@"
END
cat > in_600M <<END
mkdir -p "$memory"; echo 600M > "$memory/memory.limit_in_bytes"; echo \$\$ > "$memory/cgroup.procs"
exec "\$@" < /dev/zero
END
chmod +x in_unit in_600M
leave_units() { for unit in "$@"; do rmdir "$units/$unit"; done; rmdir "$units"; }
"""

SCENARIOS = {
    "oracle-shared-memory": r"""
        for name in ora_pmon_PROD ora_smon_PROD tnslsnr; do named $name sleep; done
        named ora_p000_PROD sh
        $as oracle ./ora_pmon_PROD 60 & victim=$!
        $as oracle ./tnslsnr 60 & stopped=$!
        $as nobody ./ora_smon_PROD 60 & impostor=$!
        $as oracle ./ora_smon_PROD 0.2           # ends well
        $as oracle ./ora_p000_PROD -c 'sleep 0.2; exit 3'
        kill -KILL $victim $impostor; wait $victim $impostor
        kill -TERM $stopped; wait $stopped
    """,
    "core-dump-notice": r"""
        named firefox sleep
        ulimit -c unlimited
        $as nobody ./firefox 60 & sleep 0.2; kill -SEGV $!; wait $!
        ulimit -c 0
        $as nobody ./firefox 60 & sleep 0.2; kill -SEGV $!; wait $!
        $as nobody sh -c 'sleep 0.2; exit 1'
    """,
    "crash-loop": r"""
        named worker sh
        for name in alpha beta gamma delta epsilon; do                 # each fails once
            ./in_unit $name.service ./worker -c 'sleep 0.1; exit 1'
        done
        for i in 1 2 3 4 5 6; do ./in_unit zeta.service ./worker -c 'sleep 0.1; exit 1'; done
        ./in_unit zeta.service ./worker -c 'sleep 0.1; exit 0'
        ./in_unit zeta.service ./worker -c 'sleep 2.1; exit 1'     # lived too long to be of the loop
        ./worker -c 'sleep 0.1; exit 1'                         # of no unit
        leave_units alpha.service beta.service gamma.service delta.service epsilon.service zeta.service
    """,
    "failed-units": r"""
        named app sh; named helper sh
        cat > run <<'END'
sleep 0.1; exit $1
END
        cat > systemd <<'END'
import ctypes, subprocess, sys
ctypes.CDLL(None).prctl(15, b"systemd", 0, 0, 0)
for line in sys.stdin: subprocess.run(line.split())
END
        /usr/bin/python3 systemd <<'END'
sh ./in_unit app.service ./app run 1
sh ./in_unit app.service ./app run 2
sh ./in_unit db.service ./app run 3
sh ./in_unit db.service ./app run 0
sh ./in_unit session-2.scope ./app run 1
END
        ./in_unit app.service ./helper run 1                    # not the main process
        leave_units app.service db.service session-2.scope
    """,
    "restart-worker": r"""
        named worker sh
        for i in 1 2 3 4 5 6 7; do ./in_unit worker@1.service ./worker -c 'sleep 0.1; exit 1'; done
        ./in_unit worker@2.service ./worker -c 'sleep 0.1; exit 2'
        ./in_unit worker@2.service ./worker -c 'sleep 0.1; kill -TERM $$'       # systemctl stop
        ./in_unit worker@2.service ./worker -c 'sleep 0.1; exit 0'
        ./in_unit other.service ./worker -c 'sleep 0.1; exit 1'
        leave_units worker@1.service worker@2.service other.service
    """,
    "worker-crash": r"""
        ulimit -c 0
        named nginx sh; named php-fpm8.4 sh
        cat > parent <<'END'
worker() { ./$name -c "sleep 0.2; $1" & wait; }
worker 'kill -SEGV $$'; worker 'kill -SEGV $$'; worker 'kill -TERM $$'; worker 'exit 1'
exit 0
END
        name=nginx ./nginx parent
        name=php-fpm8.4 ./php-fpm8.4 parent
        ./nginx -c 'sleep 0.2; kill -SEGV $$'                   # the parent itself: systemd reports it
    """,
    "notify-mail": r"""
        ulimit -c 0
        named app sh
        for unit in app.service app.service db.service; do
            ./in_unit $unit ./app -c 'sleep 0.1; kill -SEGV $$'
        done
        ./in_unit app.service ./app -c 'sleep 0.1; exit 1'
        ./in_unit session-2.scope ./app -c 'sleep 0.1; kill -SEGV $$'
        leave_units app.service db.service session-2.scope
    """,
    "notify-webhook": r"""
        named app sh
        ./in_unit app.service ./app -c 'sleep 0.1; kill -KILL $$'
        ./in_unit app.service ./app -c 'sleep 0.1; kill -TERM $$'
        ./in_unit session-2.scope ./app -c 'sleep 0.1; kill -KILL $$'
        leave_units app.service session-2.scope
    """,
    "became-root": r"""
        echo 'nobody ALL=(ALL) NOPASSWD: ALL' > sudoers; chmod 440 sudoers; mount --bind sudoers /etc/sudoers
        echo 65534 > /proc/self/loginuid                        # the login session of nobody
        $as nobody sudo -n sh -c 'sleep 0.2'
        $as nobody su -c 'sleep 0.2' < /dev/null                # without a password: no command is run
        su nobody -s /bin/sh -c 'sleep 0.2'                     # root becomes another user
        umount /etc/sudoers
    """,
    "cron-failures": r"""
        named cron sh; named backup sh
        # As cron does it: a child of its own for each job, which starts the shell and ends well whatever the job did.
        ./cron -c '
            job() { ( "$@"; exit 0 ) & wait; }
            job sh -c "sleep 0.1; ./no-such-program"
            job ./backup -c "sleep 0.1; exit 1"
            job sh -c "sleep 0.1; grep nothing /dev/null; exit 0"
            job ./backup -c "sleep 0.1; exit 0"
            exit 0'
        ./backup -c 'sleep 0.1; exit 1'                         # not of cron
    """,
    "lock-files": r"""
        mount -t tmpfs none /usr/local/bin
        cp "$(PATH=/usr/bin:/bin command -v sleep)" /usr/local/bin/jobrunner; named jobrunner sleep
        /usr/local/bin/jobrunner 60 & sleep 0.2; kill -KILL $!; wait $!
        ./jobrunner 60 & sleep 0.2; kill -KILL $!; wait $!      # another program of that name
        /usr/local/bin/jobrunner 0.2
        umount /usr/local/bin
    """,
    "oom-killed-helper": r"""
        named indexer tail; named searchd tail
        ./in_unit search.service ./in_600M ./indexer
        ./in_unit search.service ./in_600M ./searchd          # the service itself
        ./in_unit other.service ./in_600M ./indexer
        ./in_unit search.service ./indexer -f /dev/null & sleep 0.3; kill -KILL $!; wait $!     # by hand
        rmdir "$memory"
        leave_units search.service other.service
    """,
    "postgresql-crash": r"""
        data=$PWD/data; programs=$(dirname "$(ls /usr/lib/postgresql/*/bin/postgres | tail -n 1)")
        $as postgres "$programs/initdb" -D "$data" > initdb.log
        cat > systemd <<'END'
import ctypes, os, subprocess, sys, time
libc = ctypes.CDLL(None)
libc.prctl(36, 1, 0, 0, 0)      # as PID 1 does, it becomes the parent of whoever lost his own
libc.prctl(15, b"systemd", 0, 0, 0)
server = subprocess.Popen(sys.argv[1:])
server.wait()
try:
    while True: os.wait()
except ChildProcessError: pass
END
        sql() { $as postgres "$programs/psql" -h "$PWD" -c "$1" postgres > psql.log 2>&1; }
        /usr/bin/python3 systemd $as postgres "$programs/postgres" -D "$data" -k "$PWD" -h '' > server.log 2>&1 &
        until sql 'select 1'; do sleep 0.2; done
        sql 'select pg_sleep(0.2), pg_terminate_backend(pg_backend_pid())'      # an administrator ends a session
        sql 'select pg_sleep(60)' & sleep 0.5
        kill -SEGV "$(pgrep -u postgres -f '^postgres: .*SELECT')"; wait $!
        until sql 'select 1'; do sleep 0.2; done                                # the server has recovered
        segment=$(awk 'NR == 7 {print $2}' data/postmaster.pid)                 # nobody else will free it
        kill -KILL "$(head -n 1 data/postmaster.pid)"; wait; ipcrm -m "$segment"
    """,
    "demo": "exec {python} {demo} > demo.log",
}


def main() -> int:
    if os.geteuid() != 0:
        print("needs root: it subscribes to kernel events and changes users", file=sys.stderr)
        return 77
    with tempfile.TemporaryDirectory(prefix="cnprocd-recording-") as place:
        own_mounts(Path(place))
        for name in sys.argv[1:] or SCENARIOS:
            make(name)
    return 0


def make(name: str) -> None:
    with tempfile.TemporaryDirectory(prefix="cnprocd-recording-", dir="/var/tmp") as place:
        os.chmod(place, 0o1777)
        whole = Path(place, "whole")
        recorder = subprocess.Popen(
            [sys.executable, "-m", "cnprocd.cli.cnprocctl", "record", str(whole)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert recorder.stderr is not None
        said = recorder.stderr.readline()
        assert "recording" in said, said + recorder.stderr.read()
        script = TOOLS + SCENARIOS[name].replace("{python}", sys.executable).replace(
            "{demo}", f"{ROOT}/tests/demo/demo.py"
        )
        played = subprocess.Popen(["sh", "-c", script, name], cwd=place)
        played.wait()
        time.sleep(SETTLE_S)
        recorder.terminate()
        recorder.wait()
        with whole.open("rb") as file:
            recording = read(file)
        assert recording.end["lost"] == 0, "events were lost: do it again on a quieter machine"
        with (HERE / f"{name}.rec").open("wb") as file:
            write(file, recording, played.pid)
        if name == "demo":
            log = Path(place, "demo.log").read_text()
            said, _ = json.JSONDecoder().raw_decode(log.partition("--- the record\n")[2])
            (HERE / "demo.json").write_text(json.dumps(said, indent=2) + "\n")
    print(f"{name}: {(HERE / f'{name}.rec').stat().st_size} bytes")


def own_mounts(place: Path) -> None:
    """Enter a mount namespace with a user `oracle` and private mounts."""
    assert LIBC.unshare(CLONE_NEWNS) == 0
    assert LIBC.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None) == 0
    passwd = place / "passwd"
    known = Path("/etc/passwd").read_text()
    passwd.write_text(known + ("" if "\noracle:" in known else USERS))
    assert LIBC.mount(os.fsencode(passwd), b"/etc/passwd", None, MS_BIND, None) == 0


def write(file, recording: Recording, root: int) -> None:
    """Write the recording of one process and all its descendants."""
    ours = descendants(recording, root)
    writer = Writer(file)
    writer.values(b"H", recording.header)
    writer.values(b"S", [facts_of(one) for one in recording.start if one.tgid in ours])
    uids = {one.uid for one in recording.start if one.tgid in ours}
    for drain in recording.drains:
        kept = trimmed(drain, get_int(recording.header, "family"), ours)
        uids |= {one.uid for one in kept.facts}
        if kept.datagrams or kept.messages or kept.victims:
            writer.drain(kept)
    writer.values(b"N", {str(uid): name for uid, name in recording.names.items() if uid in uids})
    writer.end(recording.end)


def descendants(recording: Recording, root: int) -> set[int]:
    found = {root}
    for drain in recording.drains:
        for _, event in events(drain):
            if isinstance(event, Fork) and event.parent_tgid in found:
                found.add(event.child_tgid)
    return found


def trimmed(drain: Drain, family: int, ours: set[int]) -> Drain:
    def is_ours(event) -> bool:
        return getattr(event, "child_tgid" if isinstance(event, Fork) else "process_tgid", None) in ours

    return Drain(
        b"".join(raw for raw, event in events(drain) if is_ours(event)),
        [one for one in drain.messages if decode_record(one, family).tgid in ours],
        [one for one in drain.facts if one.tgid in ours],
        [tgid for tgid in drain.victims if tgid in ours],
    )


def events(drain: Drain) -> Iterator[tuple[bytes, object]]:
    """Yield each datagram with its decoded event."""
    for at in range(0, len(drain.datagrams), DATAGRAM_SIZE):
        raw = drain.datagrams[at : at + DATAGRAM_SIZE]
        for event in decode(raw.ljust(SLOT_SIZE, b"\0"), Rejects()):
            yield raw, event


if __name__ == "__main__":
    sys.exit(main())
