"""sd_notify with a real datagram socket in place of the service manager, by path and in the abstract namespace."""

from __future__ import annotations

import array
import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import textwrap
import time

import pytest

from cnprocd.service import ServiceManager, adopted_descriptors, watchdog_interval_s


class Manager:
    """systemd's end of the notification socket."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(address)
        self.socket.settimeout(5)
        self.descriptors: list[int] = []
        self.environ = {"NOTIFY_SOCKET": address.replace("\0", "@")}

    def receive(self) -> dict[str, str]:
        data, ancillary, _, _ = self.socket.recvmsg(4096, socket.CMSG_SPACE(16))
        for _, kind, payload in ancillary:
            assert kind == socket.SCM_RIGHTS
            self.descriptors += array.array("i", payload)
        return dict(line.split("=", 1) for line in data.decode("utf-8").splitlines())

    def silent(self) -> bool:
        self.socket.setblocking(False)
        try:
            self.socket.recv(1)
        except BlockingIOError:
            return True
        return False


@pytest.fixture(params=["path", "abstract"])
def manager(request, tmp_path):
    name = f"\0cnprocd-test-{os.getpid()}" if request.param == "abstract" else str(tmp_path / "notify")
    manager = Manager(name)
    yield manager
    manager.socket.close()


def test_the_life_of_a_service(manager):
    service = ServiceManager(manager.environ)
    service.ready("12 rules")
    assert manager.receive() == {"READY": "1", "STATUS": "12 rules"}
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    service.reloading()
    told = manager.receive()
    assert told.keys() == {"RELOADING", "MONOTONIC_USEC"}
    assert before <= int(told["MONOTONIC_USEC"]) <= time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    service.watchdog()
    assert manager.receive() == {"WATCHDOG": "1"}
    service.stopping()
    assert manager.receive() == {"STOPPING": "1"}


@pytest.mark.parametrize("text", ["règles: 3", "ルール 3", "plain"])
def test_a_status_in_any_script_arrives_as_utf8(manager, text):
    ServiceManager(manager.environ).status(text)
    assert manager.receive() == {"STATUS": text}


def test_a_status_cannot_smuggle_a_command(manager):
    ServiceManager(manager.environ).status("rule x\nSTOPPING=1\0\udcff ok")
    assert manager.receive() == {"STATUS": "rule x STOPPING=1 ok"}


def test_a_stored_descriptor_is_the_same_file(manager, tmp_path):
    with (tmp_path / "kept").open("w") as file:
        ServiceManager(manager.environ).store_fd("connector", file.fileno())
        assert manager.receive() == {"FDSTORE": "1", "FDNAME": "connector", "FDPOLL": "0"}
        (received,) = manager.descriptors
        assert os.path.sameopenfile(received, file.fileno())
        os.close(received)
    service = ServiceManager(manager.environ)
    with pytest.raises(ValueError, match="invalid descriptor name"):
        service.store_fd("a:b", 0)


def fill(manager):
    """Leave no room in the manager's queue."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as filler:
        filler.setblocking(False)
        filler.connect(manager.socket.getsockname())
        with contextlib.suppress(BlockingIOError):
            while True:
                filler.send(b"FILLER=1")


def test_a_manager_that_reads_nothing_is_not_waited_for(manager, tmp_path):
    """What it is told last arrives when it reads again: each kind once, in order, descriptors too."""
    fill(manager)
    service = ServiceManager(manager.environ)
    with (tmp_path / "kept").open("w") as file:
        service.store_fd("connector", file.fileno())
        service.reloading()
        for number in range(1000):
            service.status(f"status {number}")
            service.watchdog()
        service.ready("3 rules")

        async def read():
            service.attach(asyncio.get_running_loop())
            received = []
            while not received or "READY" not in received[-1]:
                message = await asyncio.to_thread(manager.receive)
                if "FILLER" not in message:
                    received.append(message)
            return received

        received = asyncio.run(read())
        (descriptor,) = manager.descriptors
        assert os.path.sameopenfile(descriptor, file.fileno())
    assert [next(iter(message)) for message in received] == ["FDSTORE", "RELOADING", "STATUS", "WATCHDOG", "READY"]
    assert received[2] == {"STATUS": "status 999"}
    assert manager.silent()


def test_the_environment_is_left_clean_for_hooks(manager):
    environ = manager.environ | {"WATCHDOG_USEC": "1", "LISTEN_FDS": "1", "LISTEN_PID": "1", "PATH": "/bin"}
    ServiceManager(environ)
    assert environ == {"PATH": "/bin"}


@pytest.mark.parametrize("value", [None, "", "relative", "vsock:2:1", "/nowhere/at/all"])
def test_without_a_manager_nothing_happens(value):
    environ = {} if value is None else {"NOTIFY_SOCKET": value}
    service = ServiceManager(environ)
    assert not service.present
    service.ready("x")
    service.status("é")
    service.reloading()
    service.watchdog()
    service.stopping()
    service.store_fd("connector", 0)
    assert service.watchdog_interval_s is None
    assert service.adopted("connector") == []


def test_only_the_given_environment_counts(manager, monkeypatch):
    monkeypatch.setenv("NOTIFY_SOCKET", manager.environ["NOTIFY_SOCKET"])
    ServiceManager({}).ready("not for you")
    assert manager.silent()


def test_a_manager_that_went_away_does_not_stop_us(manager):
    service = ServiceManager(manager.environ)
    manager.socket.close()
    service.ready("x")
    service.status("é")
    service.store_fd("connector", 0)


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "42"}, 15.0),
        ({"WATCHDOG_USEC": "30000000"}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "43"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({}, None),
    ],
)
def test_the_watchdog_interval(environ, expected):
    assert watchdog_interval_s(environ, 42) == expected


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"LISTEN_FDS": "3", "LISTEN_PID": "42", "LISTEN_FDNAMES": "connector:spool:connector"},
         {"connector": [3, 5], "spool": [4]}),
        ({"LISTEN_FDS": "2", "LISTEN_PID": "42"}, {"unknown": [3, 4]}),
        ({"LISTEN_FDS": "1", "LISTEN_PID": "41", "LISTEN_FDNAMES": "connector"}, {}),
        ({"LISTEN_FDS": "1", "LISTEN_FDNAMES": "connector"}, {}),
        ({"LISTEN_FDS": "x", "LISTEN_PID": "42"}, {}),
        ({}, {}),
    ],
)  # fmt: skip
def test_adopted_descriptors(environ, expected):
    assert adopted_descriptors(environ, 42) == expected


def test_adoption_in_a_real_child():
    """The child gets a pipe as descriptor 3 the way systemd passes it, and must not leak it to its own children."""
    reader, writer = os.pipe()
    code = textwrap.dedent("""
        import os
        os.environ["LISTEN_PID"] = str(os.getpid())
        from cnprocd.service import ServiceManager
        service = ServiceManager(os.environ)
        (descriptor,) = service.adopted("connector")
        os.write(descriptor, b"adopted")
        assert not os.get_inheritable(descriptor)
        assert "LISTEN_FDS" not in os.environ
    """)
    launch = (
        "import os, sys; os.dup2(int(sys.argv[1]), 3); os.execv(sys.executable, [sys.executable, '-c', sys.argv[2]])"
    )
    environ = os.environ | {"LISTEN_FDS": "1", "LISTEN_FDNAMES": "connector"}
    done = subprocess.run(
        [sys.executable, "-c", launch, str(writer), code],
        env=environ,
        pass_fds=[writer],
        capture_output=True,
        text=True,
    )
    os.close(writer)
    assert done.returncode == 0, done.stderr
    assert os.read(reader, 100) == b"adopted"
    os.close(reader)
