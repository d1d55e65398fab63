"""Every process of the daemon stopped at once, and clients that send and read a byte at a time, stop nothing.

What must hold is that of test_edges.py.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

from kernel.blocking import Endurance, Timed
from kernel.harness import PATIENCE_S

from cnprocd.control.protocol import SOCKET_NAME, Call, method_of, pack

LOOKS_UP = "  - {name: theirs, events: [nonzero_exit], match: {comm: cnptest-by, cmdline: '*'}}"
HALF = b'{"method":"io.cnprocd.'
CLIENTS = 50  # the daemon accepts 64


@contextlib.contextmanager
def stopped_children(pid: int) -> Iterator[list[int]]:
    """SIGSTOP for each child of a process but hooks, and what becomes one (test_edges_hooks.py stops that)."""
    children = list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))
    children = [child for child in children if b"_child.py" in Path(f"/proc/{child}/cmdline").read_bytes()]
    for child in children:
        os.kill(child, signal.SIGSTOP)
    try:
        yield children
    finally:
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGCONT)


def test_stopped_children_of_the_daemon_stop_nothing(tmp_path):
    """The processes of the spool, of /proc, of hooks' ends and of metrics, until the end of the block."""
    os.chmod(tmp_path, 0o755)
    endurance = Endurance(tmp_path, LOOKS_UP)
    daemon = Timed(tmp_path, endurance.rules)
    try:
        daemon.ready()
        endurance.fail()
        endurance.assert_hooks_ran()
        with stopped_children(daemon.process.pid) as children:
            assert len(children) >= 2
            endurance.live(tmp_path / "run")
            endurance.assert_answered()
            daemon.mark()
            endurance.assert_reported(daemon.records)
            endurance.assert_hooks_ran(PATIENCE_S)
        endurance.fail()
        daemon.mark()
        endurance.assert_hooks_ran(PATIENCE_S)
        endurance.assert_nothing_doubled()
        assert not [record for record in daemon.records if record["event"] == "event_failed"]
        endurance.assert_stops(daemon.process)
    finally:
        daemon.kill()


def test_clients_of_a_byte_at_a_time_delay_nothing(tmp_path):
    """Half of them send a call a byte at a time, the others read an answer so."""
    os.chmod(tmp_path, 0o755)
    endurance = Endurance(tmp_path)
    daemon, over = Timed(tmp_path, endurance.rules), threading.Event()
    clients: list[socket.socket] = []

    def drip() -> None:
        while not over.wait(0.1):
            for at, client in enumerate(clients):
                with contextlib.suppress(OSError):
                    if at % 2:
                        client.send(b"x")
                    else:
                        client.recv(1)

    dripping = threading.Thread(target=drip)
    try:
        daemon.ready()
        for at in range(CLIENTS):
            client = socket.socket(socket.AF_UNIX)
            clients.append(client)
            client.connect(str(tmp_path / "run" / SOCKET_NAME))
            client.setblocking(False)
            watch = pack(Call(method_of("watch"), {}, more=True))
            client.send(HALF if at % 2 else watch if at % 4 else pack(Call(method_of("history"), {"limit": 1000})))
        dripping.start()
        endurance.live(tmp_path / "run")
        endurance.assert_answered()
        daemon.mark()
        endurance.assert_reported(daemon.records)
        endurance.assert_hooks_ran()
        endurance.assert_nothing_doubled()
        endurance.assert_stops(daemon.process)
    finally:
        over.set()
        if dripping.ident is not None:
            dripping.join()
        for client in clients:
            client.close()
        daemon.kill()
