"""The server on real sockets, against polite and hostile clients. Every test ends with the server still answering."""

import asyncio
import contextlib
import os
import socket
import stat
import tempfile
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from cnprocd.control import access, client
from cnprocd.control.access import Peer, access_of
from cnprocd.control.client import Client, NotRunningError, RefusedError
from cnprocd.control.interface import DESCRIPTION
from cnprocd.control.protocol import MAX_CALL, SOCKET_NAME, Call, Decoder, Failure, Reply, method_of, pack, to_reply
from cnprocd.control.server import ClientLimits, ControlServer
from cnprocd.control.verb import Verb, VerbError
from cnprocd.errors import EX_CONFIG, EX_NOPERM, CnprocdError

LIMITS = ClientLimits(connections=8, reserved=2, unread_bytes=32 * 1024)
HASTY = replace(LIMITS, idle_s=0.2, stalled_s=0.2)  # for clients whose time is to be up


def explode(args):
    raise ZeroDivisionError("a bug")


def refuse(args):
    raise VerbError("no", "because", EX_CONFIG, rendered="line 1")


class Slow:
    """A verb whose answer comes when the test releases it."""

    def __init__(self):
        self.waiting = []

    async def __call__(self, args):
        released = asyncio.get_running_loop().create_future()
        self.waiting.append(released)
        outcome = await released
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def release(self, outcome):
        self.waiting.pop(0).set_result(outcome)


SLOW = Slow()
VERBS = {
    "slow": Verb(SLOW.__call__),
    "echo": Verb(dict, takes=None),
    "change": Verb(lambda args: {"changed": True}, changes=True),
    "watch": Verb(lambda args: {"ready": True}, topic="matches"),
    "big": Verb(lambda args: {"text": "x" * (1 << 21)}),
    "large": Verb(lambda args: {"text": "x" * 500_000}),
    "one_thing": Verb(dict, takes=frozenset({"name"})),
    "explode": Verb(explode),
    "refuse": Verb(refuse),
}


class Running:
    """A server in an event loop of its own, in a thread."""

    def __init__(self, directory, limits=LIMITS, group=None):
        self.directory = directory
        self.records = []
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.server = self.call(self._make(limits))
        if group is not None:
            self.server._readers_group = lambda: group
        self.call(self.server.start())

    async def _make(self, limits):
        return ControlServer(self.directory, VERBS, lambda *said, **fields: self.records.append((said, fields)), limits)

    def call(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(20)

    def run(self, function):
        async def here():
            return function()

        return self.call(here())

    def until(self, condition):
        """Run the server's loop until a condition holds."""

        async def turn():
            while not condition():
                await asyncio.sleep(0.002)

        return self.call(asyncio.wait_for(turn(), 15))

    def raw(self):
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(15)
        connection.connect(str(self.directory / SOCKET_NAME))
        return connection

    def client(self):
        return Client(self.directory)

    def alive(self):
        with self.client() as client:
            return client.ask("echo", a=1) == {"a": 1}

    def stop(self):
        self.call(self.server.stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()


@pytest.fixture
def running(tmp_path):
    one = Running(tmp_path)
    yield one
    one.stop()


@pytest.fixture
def hasty(tmp_path):
    one = Running(tmp_path, HASTY)
    yield one
    one.stop()


def drain(connection):
    """Return everything until the server closes the connection."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(65536):
            data += piece
    return data


def test_answers_in_order_on_one_connection(running):
    with running.client() as client:
        assert [client.ask("echo", n=n) for n in range(200)] == [{"n": n} for n in range(200)]


def test_a_failure_carries_its_status_and_details(running):
    with running.client() as client, pytest.raises(RefusedError) as caught:
        client.ask("refuse")
    assert (caught.value.exit_status, caught.value.details["rendered"]) == (EX_CONFIG, "line 1")


def test_a_bug_behind_a_verb_is_reported_and_survived(running):
    with running.client() as client, pytest.raises(RefusedError, match="a bug"):
        client.ask("explode")
    assert running.records[0][0] == ("error", "control_failed")
    assert running.alive()


def test_an_unknown_verb_names_the_known_ones(running):
    with running.client() as client, pytest.raises(RefusedError) as caught:
        client.ask("nonsense")
    assert caught.value.hint.startswith("the methods are Big, Change, Echo")


def test_an_unknown_parameter_is_refused_by_name(running):
    """A misspelt filter must not return everything."""
    with running.client() as client:
        assert client.ask("one_thing", name="a") == {"name": "a"}
        with pytest.raises(RefusedError, match="OneThing takes no parameter 'nmae'") as caught:
            client.ask("one_thing", nmae="a")
    assert caught.value.error == "org.varlink.service.InvalidParameter"
    assert caught.value.details == {"parameter": "nmae"}


CALLS = [
    ('{"method":"org.varlink.service.GetInfo"}', '"interfaces":["io.cnprocd","org.varlink.service"]'),
    ('{"method":"org.varlink.service.GetInterfaceDescription","parameters":{"interface":"io.cnprocd"}}', "io.cnprocd"),
    (
        '{"method":"org.varlink.service.GetInterfaceDescription","parameters":{"interface":"a.b"}}',
        '{"error":"org.varlink.service.InterfaceNotFound","parameters":{"interface":"a.b",',
    ),
    (
        '{"method":"org.varlink.service.GetInterfaceDescription"}',
        '{"error":"org.varlink.service.InvalidParameter","parameters":{"parameter":"interface",',
    ),
    (
        '{"method":"org.varlink.service.Nonsense"}',
        '{"error":"org.varlink.service.MethodNotFound","parameters":{"method":"org.varlink.service.Nonsense",',
    ),
    ('{"method":"io.cnprocd.Echo","parameters":null}', '{"parameters":{}}'),
    ('{"method":"a.b.C"}', '{"error":"org.varlink.service.InterfaceNotFound","parameters":{"interface":"a.b",'),
    ('{"method":"x"}', '{"error":"org.varlink.service.InterfaceNotFound","parameters":{"interface":"",'),
    ('{"method":"io.cnprocd.Watch"}', '{"error":"org.varlink.service.ExpectedMore","parameters":{'),
    ('{"method":"io.cnprocd.Watch","more":true}', '{"parameters":{"ready":true},"continues":true}'),
]


@pytest.mark.parametrize(("sent", "expected"), CALLS)
def test_calls_are_replied_as_varlink_says(running, sent, expected):
    with running.raw() as connection:
        connection.sendall(sent.encode() + b"\0")
        received = connection.recv(65536).decode()
    assert expected in received
    assert received.endswith("\0")


def test_the_description_is_the_interface(running):
    with running.raw() as connection:
        call = Call("org.varlink.service.GetInterfaceDescription", {"interface": "io.cnprocd"})
        connection.sendall(pack(call))
        assert answers(connection, 1) == [Reply({"description": DESCRIPTION})]


def test_a_oneway_call_has_no_reply(running):
    with running.raw() as connection:
        oneway = [Call(method_of(verb), oneway=True) for verb in ("echo", "explode", "nonsense", "watch")]
        connection.sendall(b"".join(map(pack, [*oneway, Call(method_of("echo"), {"a": 1})])))
        assert answers(connection, 1) == [Reply({"a": 1})]


def test_an_answer_over_the_limit_becomes_an_error(running):
    with running.client() as client:
        with pytest.raises(RefusedError, match="limit"):
            client.ask("big")
        assert client.ask("echo") == {}


# The calls of all connections are decoded in one turn of the loop, so a long one is refused before it is decoded.
LONG_CALL = pack(Call(method_of("echo"), {"text": "x" * MAX_CALL}))
GARBAGE = [b"GET / HTTP/1.1\r\n\r\n\0", b"\0\0\0\0", b"[]\0", os.urandom(300) + b"\0", b"x" * 2**21, LONG_CALL]


@pytest.mark.parametrize("garbage", GARBAGE, ids=range(len(GARBAGE)))
def test_garbage_is_answered_with_the_reason_and_closed(running, garbage):
    with running.raw() as connection:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(garbage)
        assert b'{"error":"io.cnprocd.InvalidMessage"' in drain(connection)
    assert running.alive()


def test_a_half_message_is_closed_when_its_time_is_up(hasty):
    with hasty.raw() as connection:
        connection.sendall(b'{"method":')
        assert drain(connection) == b""
    assert hasty.alive()


def test_a_client_that_says_nothing_is_closed(hasty):
    with hasty.raw() as connection:
        assert drain(connection) == b""


def test_a_client_that_never_reads_is_closed_in_bounded_memory(hasty):
    with hasty.raw() as connection:
        with contextlib.suppress(OSError):
            connection.setblocking(False)
            for _ in range(200):
                connection.send(pack(Call(method_of("large"))))
        hasty.until(lambda: hasty.server.counters.requests > 0)
        hasty.until(lambda: not hasty.server.connections)
        assert hasty.server.counters.requests < 20
    assert hasty.alive()


def test_a_flood_of_requests_is_answered_one_turn_at_a_time(running):
    turns = []

    def count():
        turns.append(len(turns))
        running.loop.call_soon(count)

    with running.raw() as connection:
        running.loop.call_soon_threadsafe(count)
        connection.sendall(pack(Call(method_of("echo"))) * 500)
        received = b""
        while received.count(b"\0") < 500:
            received += connection.recv(65536)
    assert len(turns) >= 500  # the loop turned between any two of them


def test_over_the_limit_is_refused_with_the_reason(running):
    crowd = [running.raw() for _ in range(LIMITS.connections)]
    try:
        running.until(lambda: len(running.server.connections) == LIMITS.connections)
        with running.raw() as one_more:
            assert b"too many clients" in drain(one_more)
    finally:
        for connection in crowd:
            connection.close()
    running.until(lambda: not running.server.connections)
    assert running.alive()


def test_a_subscriber_gets_what_is_published(running):
    with running.client() as client:
        stream = client.stream("watch", "match")
        assert next(stream) is None
        running.run(lambda: running.server.publish("matches", {"match": {"n": 1}}))
        running.run(lambda: running.server.publish("other", {"match": {"n": 2}}))
        running.run(lambda: running.server.publish("matches", {"match": {"n": 3}}))
        assert [next(stream).data for _ in range(2)] == [{"n": 1}, {"n": 3}]


def test_a_slow_subscriber_misses_items_and_gets_their_count(tmp_path):
    running = Running(tmp_path, ClientLimits(unread_bytes=32 * 1024, stalled_s=60))
    try:
        with running.client() as client:
            stream = client.stream("watch", "match")
            next(stream)
            for n in range(2000):
                item = {"match": {"n": n, "text": "x" * 1000}}
                running.run(lambda item=item: running.server.publish("matches", item))
            dropped = running.server.counters.dropped_items
            assert 0 < dropped < 2000
            seen = [next(stream) for _ in range(2000 - dropped)]
            assert all(item.skipped == 0 for item in seen)
            running.until(lambda: not any(one.is_full() for one in running.server.connections))
            running.run(lambda: running.server.publish("matches", {"match": {"n": 2000}}))
            last = next(stream)
            assert (last.data, last.skipped) == ({"n": 2000}, dropped)
    finally:
        running.stop()


def test_a_subscriber_that_stalls_is_closed(hasty):
    with hasty.raw() as connection:
        connection.sendall(pack(Call(method_of("watch"), more=True)))
        hasty.until(lambda: hasty.server.wanted("matches"))
        while hasty.run(lambda: hasty.server.counters.dropped_items) == 0:
            hasty.run(lambda: hasty.server.publish("matches", {"match": {"text": "x" * 10_000}}))
        hasty.until(lambda: not hasty.server.connections)
    assert hasty.alive()


def test_a_subscriber_that_asks_again_is_closed(running):
    with running.raw() as connection:
        connection.sendall(pack(Call(method_of("watch"), more=True)) + pack(Call(method_of("echo"))))
        assert b"carries a stream" in drain(connection)


def test_the_socket_is_private_unless_the_group_exists(running):
    mode = stat.S_IMODE(os.stat(running.server.path).st_mode)
    assert mode == (0o660 if access.readers_group() is not None else 0o600)


def test_our_own_group_needs_no_chown(tmp_path, monkeypatch):
    """The service may not make that system call."""
    monkeypatch.setattr(os, "chown", refuse_chown)
    ours = Running(tmp_path / "ours", group=os.getgid())
    assert stat.S_IMODE(os.stat(ours.server.path).st_mode) == 0o660
    ours.stop()
    another = Running(tmp_path / "another", group=os.getgid() + 1)
    assert stat.S_IMODE(os.stat(another.server.path).st_mode) == 0o600
    another.stop()


def refuse_chown(*args):
    raise PermissionError(1, "Operation not permitted")


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
def test_a_reader_reads_and_may_not_change(tmp_path):
    running = Running(tmp_path)
    reader = 60_123
    running.server.group = reader
    os.chown(running.server.path, -1, reader)
    os.chmod(running.server.path, 0o660)
    for directory in (tmp_path, *tmp_path.parents):
        if directory.stat().st_uid == 0 and directory != directory.parent and not directory.stat().st_mode & 0o001:
            os.chmod(directory, 0o711)
    try:
        assert as_user(tmp_path, 60_001, [reader], "echo") == "ok"
        assert as_user(tmp_path, 60_001, [reader], "change") == f"{EX_NOPERM}"
        assert as_user(tmp_path, 60_001, [], "echo") == f"{EX_NOPERM}"
        os.chmod(running.server.path, 0o666)
        assert as_user(tmp_path, 60_001, [], "echo") == f"{EX_NOPERM}"
    finally:
        running.stop()


def as_user(directory, uid, groups, verb, shown=lambda error: str(error.exit_status)):
    """Return what another user gets: ok, or what is `shown` of the error.

    In a child: a process whose user ids have changed dumps no core any more (prctl(2), PR_SET_DUMPABLE).
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        said = "crash"
        try:
            os.setgroups(groups)
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            with Client(directory) as client:
                client.ask(verb)
            said = "ok"
        except CnprocdError as error:
            said = shown(error)
        finally:
            os.write(writing, said.encode())
            os._exit(0)
    os.waitpid(pid, 0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        return pipe.read()


@pytest.mark.parametrize(
    ("peer", "read", "change"),
    [
        (Peer(1, 0, frozenset({0})), True, True),
        (Peer(1, 990, frozenset({990})), True, True),
        (Peer(1, 1000, frozenset({1000, 77})), True, False),
        (Peer(1, 1000, frozenset({1000})), False, False),
    ],
)
def test_who_may_do_what(peer, read, change):
    granted = access_of(peer, own_uid=990, group=77)
    assert (granted.read, granted.change) == (read, change)
    assert access_of(peer, own_uid=990, group=None).read is (peer.uid in (0, 990))


def test_a_stale_socket_is_replaced_and_a_living_one_is_not(tmp_path):
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(tmp_path / SOCKET_NAME))
    stale.close()
    first = Running(tmp_path)
    assert first.alive()
    second = Running(tmp_path)
    assert second.records[0][0] == ("error", "control_unavailable")
    assert "another cnprocd" in second.records[0][1]["message"]
    second.stop()
    assert first.alive()
    first.stop()
    assert not (tmp_path / SOCKET_NAME).exists()


def test_another_file_in_the_way_is_left_alone(tmp_path):
    (tmp_path / SOCKET_NAME).write_text("precious")
    running = Running(tmp_path)
    assert running.records[0][0] == ("error", "control_unavailable")
    running.stop()
    assert (tmp_path / SOCKET_NAME).read_text() == "precious"


@pytest.mark.parametrize(("has_systemd", "hint"), [(True, "systemctl start cnprocd"), (False, "run cnprocd as root")])
def test_without_a_daemon_the_client_says_what_to_do(tmp_path, monkeypatch, has_systemd, hint):
    monkeypatch.setattr(client, "SYSTEMD", tmp_path if has_systemd else tmp_path / "none")
    with pytest.raises(NotRunningError, match=rf"cnprocd is not running \(no .*control.sock\): {hint}"):
        Client(tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
@pytest.mark.parametrize(("mode", "hint"), [(0o600, "run it as root"), (0o660, "join the group cnprocd to read")])
def test_a_refused_user_is_sent_to_a_group_that_helps(mode, hint):
    """In the foreground no group may use the socket. The directory is one that the other user can search."""
    with tempfile.TemporaryDirectory() as directory, socket.socket(socket.AF_UNIX) as listening:
        os.chmod(directory, 0o755)
        listening.bind(f"{directory}/{SOCKET_NAME}")
        os.chmod(f"{directory}/{SOCKET_NAME}", mode)
        os.chown(f"{directory}/{SOCKET_NAME}", 0, 65533)
        listening.listen()
        shown = as_user(Path(directory), 65534, [], "status", lambda error: f"{type(error).__name__}: {error.hint}")
    assert shown.startswith("PrivilegeError: ") and shown.endswith(hint)


def test_a_daemon_that_does_not_answer_is_detected(tmp_path):
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / SOCKET_NAME))
        listening.listen()
        with Client(tmp_path, timeout_s=0.05) as client, pytest.raises(NotRunningError, match="does not answer"):
            client.ask("status")


def answers(connection, count):
    """Read this number of whole replies."""
    decoder, found = Decoder(), []
    while len(found) < count:
        decoder.feed(connection.recv(65536))
        while (value := decoder.next()) is not None:
            found.append(to_reply(value))
    return found


def test_a_slow_answer_delays_only_its_own_client(running):
    with running.raw() as asking:
        asking.sendall(pack(Call(method_of("slow"), {})) + pack(Call(method_of("echo"), {"a": 2})))
        running.until(lambda: SLOW.waiting)
        assert running.alive()  # another client
        running.run(lambda: SLOW.release({"a": 1}))
        assert answers(asking, 2) == [Reply({"a": 1}), Reply({"a": 2})]


@pytest.mark.parametrize("failure", [VerbError("no", "because"), ZeroDivisionError("a bug")])
def test_an_answer_that_fails_late_is_reported_as_an_error(running, failure):
    with running.raw() as asking:
        asking.sendall(pack(Call(method_of("slow"), {})))
        running.until(lambda: SLOW.waiting)
        running.run(lambda: SLOW.release(failure))
        (reply,) = answers(asking, 1)
        assert isinstance(reply, Failure)
        assert failure.args[0] in reply.what
    assert running.alive()


def test_a_client_that_goes_away_before_its_answer_is_no_matter(running):
    with running.raw() as asking:
        asking.sendall(pack(Call(method_of("slow"), {})))
        running.until(lambda: SLOW.waiting)
    running.run(lambda: SLOW.release({"a": 1}))
    running.until(lambda: not running.server.connections)
    assert running.alive()


def test_who_waits_for_an_answer_is_not_idle(hasty):
    with hasty.raw() as asking:
        asking.sendall(pack(Call(method_of("slow"), {})))
        hasty.until(lambda: SLOW.waiting)
        hasty.call(asyncio.sleep(2 * HASTY.idle_s))
        hasty.run(lambda: SLOW.release({"a": 1}))
        assert answers(asking, 1) == [Reply({"a": 1})]
