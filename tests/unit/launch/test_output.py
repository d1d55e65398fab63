"""output.py: lines up to a limit, and a pipe that never fills."""

import os
import threading

import pytest

from cnprocd.launch.output import MOST_LINE_BYTES, MOST_LINES, Output


@pytest.fixture
def pipe():
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    yield reader, writer
    os.close(reader)


def collect(reader, limit=1 << 20):
    lines = []
    return Output(reader, limit, lines.append), lines


def test_lines_are_cut_as_they_come_and_the_rest_at_the_end(pipe):
    reader, writer = pipe
    output, lines = collect(reader)
    os.write(writer, b"one\ntw")
    assert output.read()
    assert lines == ["one"]
    os.write(writer, b"o\r\n\n \nlast")
    os.close(writer)
    output.finish()
    assert lines == ["one", "two", "last"]


def test_an_empty_pipe_differs_from_a_closed_one(pipe):
    reader, writer = pipe
    output, _ = collect(reader)
    with pytest.raises(BlockingIOError):
        output.read()
    os.close(writer)
    assert not output.read()


def test_text_that_deceives_a_terminal_is_escaped(pipe):
    reader, writer = pipe
    output, lines = collect(reader)
    os.write(writer, b"\x1b[31mred\tx\xff\x00\n")
    os.close(writer)
    output.finish()
    assert lines == ["\\x1b[31mred    x\\xff\\x00"]


def test_a_hook_that_writes_100_megabytes_is_truncated(pipe):
    reader, writer = pipe
    os.set_blocking(reader, True)
    output, lines = collect(reader, limit=1000)
    total = 100 << 20

    def write():
        block = b"x" * 99 + b"\n"
        for _ in range(total // 100 // 1000):
            os.write(writer, block * 1000)
        os.close(writer)

    thread = threading.Thread(target=write)
    thread.start()
    while output.read():
        pass
    thread.join()
    output.finish()
    written = total // 100 // 1000 * 100_000
    assert lines[:10] == ["x" * 99] * 10
    assert lines[10:] == [f"[output limit reached: {written - 1000} bytes and 0 lines not shown]"]


def test_a_line_without_end_is_cut_not_gathered(pipe):
    reader, writer = pipe
    output, lines = collect(reader)
    for _ in range(3):
        os.write(writer, b"y" * MOST_LINE_BYTES)
        output.read()
    assert [len(line) for line in lines] == [MOST_LINE_BYTES] * 3
    os.close(writer)


def test_many_short_lines_are_not_as_many_records(pipe):
    reader, writer = pipe
    output, lines = collect(reader)
    os.write(writer, b"a\n" * (MOST_LINES + 7))
    os.close(writer)
    output.finish()
    assert len(lines) == MOST_LINES + 1
    assert lines[-1] == "[output limit reached: 0 bytes and 7 lines not shown]"


def test_no_limit_at_all_shows_nothing_but_the_count(pipe):
    reader, writer = pipe
    output, lines = collect(reader, limit=0)
    os.write(writer, b"secret\n")
    os.close(writer)
    output.finish()
    assert lines == ["[output limit reached: 7 bytes and 0 lines not shown]"]
