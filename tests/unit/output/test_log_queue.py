"""The log queue over real descriptors that are full, broken, slow, or shared."""

from __future__ import annotations

import asyncio
import fcntl
import os
import socket
import subprocess

import pytest
from unit.reaping import children_reaped  # noqa: F401 (a fixture)

from cnprocd.output import log_queue
from cnprocd.output.log_queue import LogQueue
from cnprocd.output.sink import DescriptorSink, FileSink, sink_of

LONG_S = 30.0
PAGE = 4096


@pytest.fixture
def loop():
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


@pytest.fixture
def pipe():
    """A pipe of one page; both ends."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, PAGE)
    yield reader, writer
    os.close(writer)
    os.close(reader)


def queue_on(fd, reports=None):
    reports = [] if reports is None else reports
    return LogQueue(sink_of(fd), lambda lost: reports.append((lost.records, lost.matches, dict(lost.by_rule))))


def line(number, size=100):
    return f"{number:0{size - 1}}\n".encode()


def until(loop, condition):
    async def wait():
        while not condition():
            await asyncio.sleep(0.001)

    loop.run_until_complete(asyncio.wait_for(wait(), LONG_S))


def read_lines(loop, queue, reader):
    """Everything that the queue holds, once it is read again."""
    data = b""
    os.set_blocking(reader, False)

    def drained():
        nonlocal data
        try:
            data += os.read(reader, 1 << 20)
        except BlockingIOError:
            return not queue.queued
        return False

    until(loop, drained)
    return data.split(b"\n")[:-1]


@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_an_unread_output_keeps_records_in_order_and_whole(loop, pipe, kind):
    """Far more than fits into the pipe; a record is cut by its end, and goes on where it was."""
    if kind == "socket":
        ours, theirs = socket.socketpair()
        reader, writer = os.dup(theirs.fileno()), os.dup(ours.fileno())
    else:
        reader, writer = pipe
    queue = queue_on(writer)
    for number in range(5000):
        queue.add(line(number))
    assert queue.queued > 0
    queue.attach(loop)
    assert read_lines(loop, queue, reader) == [line(number)[:-1] for number in range(5000)]
    assert queue.lost.records == 0


def test_an_unread_terminal_keeps_records(loop):
    main, terminal = os.openpty()
    queue = queue_on(terminal)
    for number in range(1000):
        queue.add(line(number))
    assert queue.queued > 0
    queue.attach(loop)
    assert [one.strip() for one in read_lines(loop, queue, main)] == [line(number)[:-1] for number in range(1000)]


@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_the_flags_of_a_shared_output_do_not_change(pipe, kind):
    """Another program writes to the same description, and expects it to block."""
    ours, theirs = socket.socketpair()
    fd = pipe[1] if kind == "pipe" else ours.fileno()
    sink = sink_of(fd)
    assert isinstance(sink, DescriptorSink)
    assert sink.put(b"x") == 1
    assert os.get_blocking(fd)
    theirs.close()


def test_the_queue_is_bounded_and_counts_what_it_drops(loop, pipe, monkeypatch):
    monkeypatch.setattr(log_queue, "MOST_BYTES", 10_000)
    reports = []
    queue = queue_on(pipe[1], reports)
    queue.attach(loop)
    for number in range(1000):
        queue.add(line(number))
    kept = PAGE // 100 + 1 + 100  # in the pipe, cut at its end, in the queue
    assert abs(queue.lost.records - (1000 - kept)) <= 2
    assert reports == []  # not before there is room
    lines = read_lines(loop, queue, pipe[0])
    assert lines == [line(number)[:-1] for number in range(len(lines))]
    assert reports == [(1000 - len(lines), 0, {})]


def test_a_rule_that_floods_the_queue_costs_no_other_rule(loop, pipe, monkeypatch):
    monkeypatch.setattr(log_queue, "MOST_BYTES", 10_000)
    monkeypatch.setattr(log_queue, "MOST_OF_A_RULE", 2_500)
    reports = []
    queue = queue_on(pipe[1], reports)
    queue.attach(loop)
    while not queue.queued:
        queue.add(line(0))
    for number in range(1000):
        queue.add(line(number), "flood")
        if number % 100 == 0:
            queue.add(line(number), "quiet")
    assert queue.lost.by_rule.keys() == {"flood"}
    read_lines(loop, queue, pipe[0])
    (report,) = reports
    assert report == (975, 975, {"flood": 975})
    queue.add(line(0), "flood")  # its share is free again
    assert queue.lost.matches == 975


@pytest.mark.parametrize("floods", [1, 4, 12])
def test_many_rules_that_flood_the_queue_cost_no_other_rule(loop, pipe, monkeypatch, floods):
    """Four rules on the processes of one storm filled a quarter each, and no other rule's record had room."""
    monkeypatch.setattr(log_queue, "MOST_BYTES", 40_000)
    monkeypatch.setattr(log_queue, "MOST_OF_A_RULE", 10_000)
    queue = queue_on(pipe[1])
    queue.attach(loop)
    while not queue.queued:
        queue.add(line(0))
    for number in range(1000):
        for flood in range(floods):
            queue.add(line(number), f"flood {flood}")
        if number % 100 == 99:
            queue.add(line(number), "quiet")
    assert queue.lost.by_rule.keys() == {f"flood {flood}" for flood in range(floods)}


def test_what_was_lost_is_reported_with_the_next_record(pipe):
    """Without an event loop, as before the daemon is ready."""
    reports = []
    queue = queue_on(pipe[1], reports)
    queue.drop("a")
    queue.add(b"x\n")
    assert reports == [(1, 1, {"a": 1})]


def test_a_pipe_without_a_reader_is_an_error_and_no_loop(loop):
    reader, writer = os.pipe()
    queue = queue_on(writer)
    queue.attach(loop)
    os.close(reader)
    with pytest.raises(BrokenPipeError):
        queue.add(b"x\n")
    assert queue.queued == 0
    os.close(writer)


def test_a_file_is_written_by_a_worker(loop, tmp_path):
    with (tmp_path / "log").open("ab") as file:
        queue = queue_on(file.fileno())
        queue.add(b"before\n")  # there is no loop yet
        queue.attach(loop)
        for number in range(5000):
            queue.add(line(number))
        assert loop.run_until_complete(queue.close(LONG_S)) == 0
    wanted = b"before\n" + b"".join(map(line, range(5000)))

    until(loop, lambda: (tmp_path / "log").stat().st_size == len(wanted))
    assert (tmp_path / "log").read_bytes() == wanted


@pytest.mark.skipif(os.geteuid() != 0, reason="mount(2) needs root")
def test_a_full_disk_cuts_no_line(loop, tmp_path):
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "none", str(tmp_path)], check=True)
    try:
        with (tmp_path / "log").open("ab") as file:
            (tmp_path / "rest").write_bytes(b"x" * 8192)
            queue = queue_on(file.fileno())
            assert isinstance(queue._sink, FileSink)
            queue.attach(loop)
            for number in range(120):  # 12,000 bytes
                queue.add(line(number, 100))
            until(loop, lambda: (tmp_path / "log").stat().st_size == 8192)
            (tmp_path / "rest").unlink()
            until(loop, lambda: (tmp_path / "log").stat().st_size == 12_000)
            assert (tmp_path / "log").read_bytes() == b"".join(line(number, 100) for number in range(120))
            loop.run_until_complete(queue.close(LONG_S))
    finally:
        subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="mount(2) needs root")
def test_a_stop_on_a_full_disk_cuts_no_line(loop, tmp_path):
    """The worker outlives the daemon, and writes the rest when there is room."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "none", str(tmp_path)], check=True)
    try:
        with (tmp_path / "log").open("ab") as file:
            (tmp_path / "rest").write_bytes(b"x" * 8192)
            queue = queue_on(file.fileno())
            queue.attach(loop)
            for number in range(120):
                queue.add(line(number, 100))
            until(loop, lambda: (tmp_path / "log").stat().st_size == 8192)
            loop.run_until_complete(queue.close(0.05))
            (tmp_path / "rest").unlink()
            until(loop, lambda: (tmp_path / "log").stat().st_size % 100 == 0)
    finally:
        subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


def test_close_has_a_bound(loop, pipe):
    queue = queue_on(pipe[1])
    queue.attach(loop)
    for number in range(1000):
        queue.add(line(number))
    assert loop.run_until_complete(queue.close(0.05)) == queue.queued > 0


def test_a_closed_descriptor_has_no_sink():
    fd = os.open("/dev/null", os.O_WRONLY)
    os.close(fd)
    with pytest.raises(OSError, match="Bad file"):
        sink_of(fd)


# --- records of one batch


class Counting:
    """A sink that notes each piece, and takes no more than `room` bytes in all."""

    joins = True

    def __init__(self, room=1 << 30):
        self.pieces, self.room = [], room

    def put(self, data):
        if not self.room:
            raise BlockingIOError
        taken = data[: self.room]
        self.room -= len(taken)
        self.pieces.append(taken)
        return len(taken)

    def when_ready(self, loop, callback):
        pass

    def close(self):
        pass


def test_records_of_a_batch_are_written_in_one_piece():
    sink = Counting()
    queue = LogQueue(sink, pytest.fail)
    assert queue.hold()
    for number in range(10):
        queue.add(line(number), "r")
    assert sink.pieces == []
    queue.release()
    assert sink.pieces == [b"".join(map(line, range(10)))]
    queue.add(line(10))
    assert len(sink.pieces) == 2, "and later ones at once"


def test_a_large_batch_is_written_before_its_end():
    sink = Counting()
    queue = LogQueue(sink, pytest.fail)
    queue.hold()
    for number in range(3 * log_queue._PIECE_BYTES // 1000):
        queue.add(line(number, 1000), "r")
    assert [len(piece) for piece in sink.pieces] == [65_000] * 3
    queue.release()
    assert b"".join(sink.pieces).count(b"\n") == 3 * log_queue._PIECE_BYTES // 1000


def test_a_batch_waits_behind_records_that_wait(loop):
    sink = Counting(room=150)
    queue = LogQueue(sink, pytest.fail)
    queue.attach(loop)
    queue.hold()
    queue.add(line(1))
    queue.add(line(2))
    queue.release()
    assert queue.queued == 1
    assert not queue.hold(), "the second record is half written"
    queue.add(line(3))
    queue.release()
    sink.room = 1 << 30
    queue.flush()
    assert b"".join(sink.pieces) == line(1) + line(2) + line(3)


def test_a_batch_for_a_broken_output_is_dropped_and_counted():
    reader, writer = os.pipe()
    os.close(reader)
    reports = []
    queue = queue_on(writer, reports)
    queue.hold()
    queue.add(line(1), "r")
    queue.add(line(2))
    queue.release()
    assert (queue.lost.records, queue.lost.matches, queue.queued) == (2, 1, 0)
    os.close(writer)
