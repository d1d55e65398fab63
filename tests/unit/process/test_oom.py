"""The kernel's lines about its victims, as /dev/kmsg gives them, and what they say about a death."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnprocd.process.model import Occurrence, Process
from cnprocd.process.oom import OomKill, OomKills, parse_victim

S = 1_000_000_000
KILLED, FAILED = 9, 3 << 8
LINE = (
    b"3,1234,5000000,-;Memory cgroup out of memory: Killed process 77 (python3) total-vm:35000kB, anon-rss:20000kB,"
    b" file-rss:0kB, shmem-rss:0kB, UID:0 pgtables:100kB oom_score_adj:0\n SUBSYSTEM=none\n"
)


def verdict(kills, tgid, status, start_ns, end_ns, of_thread=False):
    occurrence = Occurrence("exit", Process(tgid, start_ns=start_ns), tgid, status, end_ns, of_thread=of_thread)
    kills.explain(occurrence)
    return occurrence.oom_killed


@pytest.mark.parametrize(
    "raw",
    [
        LINE,
        b"3,1234,5000000,-;Out of memory: Killed process 77 (a) b) total-vm:1kB\n",
        b"3,1234,5000000,c;Out of memory (oom_kill_allocating_task): Killed process 77 (x) total-vm:1kB\n",
    ],
)
def test_a_victim_is_read_from_the_kernels_line(raw):
    assert parse_victim(raw) == 77


@pytest.mark.parametrize(
    "raw",
    [
        LINE.replace(b"3,", b"11,", 1),  # LOG_USER | LOG_ERR: written to /dev/kmsg by a program
        b"6,1,5000000,-;Out of memory: [77]: segfault at 0 ip 0 sp 0 error 4\n",
        b"6,1,5000000,-;x Memory cgroup out of memory: Killed process 77 (x)\n",
        b"6,1,5000000,-;Killed process 77 (x) total-vm:1kB\n",
        b"6,1,5000000,-;oom-kill:constraint=CONSTRAINT_MEMCG,nodemask=(null),task=x,pid=77,uid=0\n",
        b"6,1,5000000,-;x\\x0aOut of memory: Killed process 77 (x)\n",  # a line feed in a text that is logged
        b"6,1,5000000,-;usb 1-1: x\n Out of memory: Killed process 77 (x)\n",
        b"",
        b"\xff",
    ],
)
def test_no_other_line_names_a_victim(raw):
    assert parse_victim(raw) is None


@given(st.binary(max_size=200))
def test_any_bytes_are_read(raw):
    parse_victim(raw)


def test_a_victim_is_one_once():
    kills = OomKills()
    kills.add(OomKill(77, 5 * S))
    assert verdict(kills, 78, KILLED, S, 6 * S) is False
    assert verdict(kills, 77, KILLED, S, 6 * S) is True
    assert verdict(kills, 77, KILLED, S, 6 * S) is False


def test_the_exits_of_its_threads_do_not_use_up_a_kill():
    kills = OomKills()
    kills.add(OomKill(77, 5 * S))
    assert [verdict(kills, 77, KILLED, S, 6 * S, of_thread) for of_thread in (True, True, False)] == [True] * 3


def test_a_process_that_ended_otherwise_is_no_victim():
    kills = OomKills()
    kills.add(OomKill(77, 5 * S))
    assert verdict(kills, 77, FAILED, S, 6 * S) is False
    assert verdict(kills, 77, 0, None, None) is False


def test_a_process_younger_than_the_kill_is_no_victim():
    kills = OomKills()
    kills.add(OomKill(77, 5 * S))
    assert verdict(kills, 77, KILLED, 60 * S, 61 * S) is False


def test_after_an_overrun_a_death_without_a_line_is_unknown():
    kills = OomKills()
    kills.overran(10 * S)
    kills.add(OomKill(77, 5 * S))
    assert verdict(kills, 77, KILLED, S, 6 * S) is True
    assert verdict(kills, 78, KILLED, S, 6 * S) is None
    assert verdict(kills, 78, KILLED, S, 11 * S) is False
    assert verdict(kills, 79, FAILED, S, 6 * S) is False


def test_a_death_of_unknown_status_is_a_victim_or_unknown():
    kills = OomKills()
    kills.add(OomKill(77, 5 * S))
    assert verdict(kills, 77, None, S, None) is True
    assert verdict(kills, 78, None, S, None) is None


def test_kills_are_bounded_and_those_of_the_gone_forgotten():
    kills = OomKills()
    for tgid in range(1, 3000):
        kills.add(OomKill(tgid, tgid))
    assert verdict(kills, 1, KILLED, 0, S) is False
    kills.prune(120 * S, lambda tgid: tgid == 2999)
    assert verdict(kills, 2998, KILLED, 0, S) is False
    assert verdict(kills, 2999, KILLED, 0, S) is True
