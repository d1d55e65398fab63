"""The BPF programs, run by an interpreter (bpf.py) over packets of the tests (wire.py): each keeps exactly what a plain
Python predicate over the event's fields keeps, for any wanted set and any event that a kernel can send.
"""

import os
import sys
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.connector import bpf
from unit.connector.wire import WHAT, datagram, exit_record, proc_event, taskstats

from cnprocd.connector import uapi
from cnprocd.connector.filter import (
    JEQ_K,
    ConnectorFilter,
    TaskstatsFilter,
    _Line,
    assemble,
    connector_program,
    listing,
    taskstats_program,
)
from cnprocd.connector.status import EVERY_STATUS, FAILURES, NO_STATUS, StatusSet

EVERY_EVENT = uapi.PROC_EVENT_ALL & ~uapi.PROC_EVENT_NONZERO_EXIT
KEPT, DROPPED = 0xFFFFFFFF, 0

statuses = st.integers(0, 255).map(lambda code: code << 8) | st.builds(
    lambda number, core: number | core, st.integers(1, 64), st.sampled_from([0, 0x80])
)
spans = st.tuples(st.integers(0, 255), st.integers(0, 255)).map(sorted).map(tuple)
status_sets = (
    st.sampled_from([EVERY_STATUS, FAILURES, NO_STATUS])
    | st.builds(StatusSet.of, st.lists(spans, max_size=16), st.frozensets(st.integers(1, 64), max_size=64))
    | st.builds(StatusSet.of, st.lists(st.integers(0, 255).map(lambda n: (n, n)), max_size=16), st.just(()))
)
event_sets = st.frozensets(st.sampled_from(sorted(uapi.EVENT_NAMES))).map(sum)
wanted_events = st.builds(
    ConnectorFilter, events=event_sets, thread_forks=st.booleans(), exits=status_sets, leader_exits=st.booleans()
)
# Neighbouring pids and tgids, so that threads and leaders are both common, and bytes differ in one place only.
pids = st.sampled_from([1, 2, 255, 256, 0x10000, 0x1000000, 2**22])


def way_is_in(status: int, wanted: StatusSet) -> bool:
    """Decide naively, by the macros of wait(2)."""
    if os.WIFSIGNALED(status):
        return os.WTERMSIG(status) in wanted.signals
    return any(low <= os.WEXITSTATUS(status) <= high for low, high in wanted.codes)


def wants(wanted: ConnectorFilter, name: str, fields: dict[str, int]) -> bool:
    """Return what ConnectorFilter promises, in plain form."""
    if name == "ack":
        return True
    if name == "exit":
        if not wanted.events & (uapi.PROC_EVENT_EXIT | uapi.PROC_EVENT_NONZERO_EXIT):
            return False
        leader = fields["process_pid"] == fields["process_tgid"]
        return (wanted.leader_exits and leader) or way_is_in(fields["exit_code"], wanted.exits)
    if not wanted.events & WHAT[name]:
        return False
    return name != "fork" or wanted.thread_forks or fields["child_pid"] == fields["child_tgid"]


@st.composite
def events(draw):
    name = draw(st.sampled_from(sorted(WHAT)) | st.sampled_from(["exit", "fork"]))
    fields = {}
    if name == "fork":
        fields = {key: draw(pids) for key in ("parent_pid", "parent_tgid", "child_pid", "child_tgid")}
    elif name != "ack":
        fields = {"process_pid": draw(pids), "process_tgid": draw(pids)}
    if name == "exit":
        fields |= {"exit_code": draw(statuses), "exit_signal": draw(st.sampled_from([0, 17, 0xFFFFFFFF]))}
    return name, fields


@given(wanted_events, st.lists(events(), min_size=1, max_size=12))
@settings(max_examples=200)
def test_the_connector_program_keeps_exactly_what_is_wanted(wanted, sent):
    program = connector_program(wanted)
    for name, fields in sent:
        packet = datagram(proc_event(name, 1, 2, **fields))
        assert bpf.run(program, packet) == (KEPT if wants(wanted, name, fields) else DROPPED), (name, fields)


@given(wanted_events)
def test_connector_programs_are_such_as_the_kernel_takes(wanted):
    program = connector_program(wanted)
    if program:
        bpf.check(program)
    else:
        assert wanted.passes_everything()


@pytest.mark.parametrize("wanted", [EVERY_STATUS, FAILURES, StatusSet.of([(3, 3)], [9])], ids=["any", "failed", "some"])
def test_every_status_of_a_dying_thread(wanted):
    """Without sampling: each of the statuses that a thread can have."""
    program = connector_program(ConnectorFilter(WHAT["exit"], exits=wanted))
    for status in [code << 8 for code in range(256)] + [n | core for n in range(1, 65) for core in (0, 0x80)]:
        packet = datagram(proc_event("exit", process_pid=2, process_tgid=1, exit_code=status))
        assert bool(bpf.run(program, packet)) == way_is_in(status, wanted), status


def test_no_program_where_everything_passes_anyway():
    assert connector_program(ConnectorFilter(EVERY_EVENT)) == ()
    assert connector_program(ConnectorFilter(uapi.PROC_EVENT_ALL, leader_exits=True)) == ()
    assert taskstats_program(TaskstatsFilter()) == ()
    assert connector_program(ConnectorFilter(EVERY_EVENT, thread_forks=False)) != ()


def test_a_truncated_packet_is_dropped():
    program = connector_program(ConnectorFilter(WHAT["exit"], exits=FAILURES))
    assert bpf.run(program, datagram(proc_event("exit", exit_code=256))[:40]) == DROPPED


# --- exit records


@st.composite
def records(draw):
    """Return (deciding fields, message)."""
    pid, tgid, status, last = draw(pids), draw(pids), draw(statuses), draw(st.booleans())
    flags = draw(st.sampled_from([0, 1, 8, 0x10, 0x1F])) | (0x20 if last else 0)
    version = draw(st.sampled_from([12, 13, 14, 16]))
    stats = taskstats(version, ac_pid=pid, ac_tgid=tgid, ac_exitcode=status, ac_flag=flags, ac_comm=b"\x20" * 15)
    group = taskstats(version) if last and draw(st.booleans()) else None
    return (status, last, pid == tgid), exit_record(stats, group)


@given(st.builds(TaskstatsFilter, status_sets), st.lists(records(), min_size=1, max_size=12))
@settings(max_examples=200)
def test_the_taskstats_filter_keeps_statuses_and_early_leaders(wanted, sent):
    program = taskstats_program(wanted)
    if program:
        bpf.check(program)
    for (status, last, leader), message in sent:
        keep = way_is_in(status, wanted.exits) or (leader and not last)
        assert bpf.run(program, message) == (KEPT if keep else DROPPED), (status, last, leader)


@given(st.builds(TaskstatsFilter, status_sets), st.sampled_from([0, 1, 3]), st.binary(min_size=16, max_size=80))
def test_the_taskstats_filter_keeps_answers_that_are_not_records(wanted, command, rest):
    """An acknowledgement or an error has its errno where a record has its command."""
    message = exit_record(taskstats(13))[:16] + bytes([command]) + rest
    assert bpf.run(taskstats_program(wanted), message) == KEPT


def test_the_offsets_of_the_program_are_the_header_s():
    stats = taskstats(16)
    offset = len(exit_record(stats)) - len(bytes(stats))
    assert offset == 36
    assert (type(stats).ac_exitcode.offset, type(stats).ac_flag.offset) == (4, 8)
    assert (type(stats).ac_pid.offset, type(stats).ac_tgid.offset) == (128, 368)


# --- the assembler


def test_the_largest_bpf_programs_are_within_the_kernels_limits():
    codes = [(n, n + 1) for n in range(0, 16 * 16, 16)]
    wanted = StatusSet.of(codes, range(1, 65, 2))
    for program in (
        connector_program(ConnectorFilter(EVERY_EVENT, False, wanted, leader_exits=True)),
        taskstats_program(TaskstatsFilter(wanted)),
    ):
        bpf.check(program)
        assert len(program) < 256


def test_a_jump_that_is_too_far_or_backward_is_refused():
    far = [_Line(None, JEQ_K, 0, "end", None)] + [_Line(None, 0x54, 0) for _ in range(256)] + [_Line("end", 0x54, 0)]
    with pytest.raises(ValueError, match="at most 255"):
        assemble(far)
    with pytest.raises(ValueError, match="at most 255"):
        assemble([_Line("start", 0x54, 0), _Line(None, JEQ_K, 0, "start", None)])


def test_a_program_that_is_too_long_is_refused():
    assert len(assemble([_Line(None, 0x54, 0)] * 4094)) == 4096
    with pytest.raises(ValueError, match="4096"):
        assemble([_Line(None, 0x54, 0)] * 4095)


def targets(lines: Iterable[str]) -> list[int]:
    return [int(word.strip(",")) for line in lines for word in line.split()[2:] if word.strip(",").isdigit()]


@given(wanted_events)
def test_every_instruction_is_listed_with_targets_in_range(wanted):
    program = connector_program(wanted)
    lines = listing(program)
    assert [int(line.split(":")[0]) for line in lines] == list(range(len(program)))
    assert all(0 < target < len(program) for target in targets(lines))


def test_a_listing_reads_like_bpf_asm():
    program = connector_program(ConnectorFilter(WHAT["exit"], exits=FAILURES))
    assert listing(program) == [
        "  0: ld [36]",
        "  1: jeq #0x0, 7, 2",
        f"  2: jeq #{int.from_bytes((0x80000000).to_bytes(4, sys.byteorder), 'big'):#x}, 4, 6",
        "  3: ja 6",
        "  4: ld [60]",
        "  5: jeq #0x0, 6, 7",
        "  6: ret #0x0",
        "  7: ret #0xffffffff",
    ]
