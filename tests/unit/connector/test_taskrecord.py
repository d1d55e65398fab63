"""Exit records compared with messages laid out by ctypes from taskstats.h, in every version; then arbitrary bytes."""

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit.connector.wire import exit_record, taskstats

from cnprocd.connector.taskrecord import (
    RECORD_SLOT_SIZE,
    RecordReader,
    TaskRecord,
    UnreadableRecordError,
    Who,
    decode_record,
    is_repeated,
)

FAMILY = 27
READABLE = [12, 13, 14, 16]
u32, u64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
# The header's name of what each field of a record is made of.
NAMES = {
    "pid": "ac_pid", "tgid": "ac_tgid", "ppid": "ac_ppid", "status": "ac_exitcode", "uid": "ac_uid", "gid": "ac_gid",
    "begin_time_s": "ac_btime64", "lifetime_us": "ac_tgetime", "max_rss_kib": "hiwater_rss",
    "read_bytes": "read_bytes", "write_bytes": "write_bytes", "minor_faults": "ac_minflt",
    "major_faults": "ac_majflt", "exe_device": "ac_exe_dev", "exe_inode": "ac_exe_inode",
}  # fmt: skip
SHORT = {"ac_pid", "ac_tgid", "ac_ppid", "ac_exitcode", "ac_uid", "ac_gid"}
contents = st.fixed_dictionaries({name: u32 if name in SHORT else u64 for name in NAMES.values()})


def unreadable(message, family=FAMILY):
    with pytest.raises(UnreadableRecordError) as caught:
        decode_record(message, family)
    return str(caught.value)


@pytest.mark.parametrize("version", READABLE)
@given(fields=contents, comm=st.binary(max_size=15), flags=st.integers(0, 255), times=st.tuples(u32, u32))
def test_every_field_comes_back_in_every_version(version, fields, comm, flags, times):
    stats = taskstats(version, **fields, ac_comm=comm, ac_flag=flags, ac_utime=times[0], ac_stime=times[1])
    record = decode_record(exit_record(stats, family=FAMILY), FAMILY)
    assert {name: getattr(record, name) for name in NAMES} == {name: fields[c] for name, c in NAMES.items()}
    assert record.comm.encode("utf-8", "surrogateescape") == comm.split(b"\0")[0]
    assert record.last == bool(flags & 0x20)
    assert record.cpu_time_us == sum(times)
    assert not record.threaded


@pytest.mark.parametrize("version", READABLE)
def test_the_sums_of_the_group_are_taken_where_they_are_there(version):
    stats = taskstats(version, ac_pid=5, ac_tgid=5, ac_flag=0x20, ac_utime=10, ac_stime=5, cpu_run_virtual_total=1)
    group = taskstats(version, cpu_run_virtual_total=7_000_999)
    record = decode_record(exit_record(stats, group, FAMILY), FAMILY)
    assert record.threaded
    assert record.cpu_time_us == 7000


def test_the_group_s_sum_never_hides_the_last_thread_s_own():
    """Without delay accounting the sum is 0 (kernel/delayacct.c)."""
    stats = taskstats(13, ac_pid=5, ac_tgid=5, ac_flag=0x20, ac_utime=10, ac_stime=5)
    assert decode_record(exit_record(stats, taskstats(13), FAMILY), FAMILY).cpu_time_us == 15


@pytest.mark.parametrize("version", [0, 1, 8, 11, 15])
def test_versions_of_another_layout_are_refused(version):
    stats = taskstats(15 if version == 15 else 16, ac_pid=5, ac_tgid=5)
    stats.version = version
    assert f"version {version}" in unreadable(exit_record(stats, family=FAMILY))


def test_a_short_old_record_is_refused():
    assert "too few" in unreadable(exit_record(taskstats(11, ac_pid=5), family=FAMILY))


@pytest.mark.parametrize("version", READABLE)
def test_every_shortened_datagram_is_rejected_or_loses_its_group(version):
    stats = taskstats(version, ac_pid=5, ac_tgid=5, ac_flag=0x20)
    whole = exit_record(stats, taskstats(version, cpu_run_virtual_total=9_000), FAMILY)
    needed = 36 + type(stats).ac_exe_inode.offset + 8
    for length in range(len(whole)):
        if length < needed:
            unreadable(whole[:length])
        else:
            assert decode_record(whole[:length], FAMILY).pid == 5


def test_what_is_not_an_exit_record_is_refused():
    stats = taskstats(13, ac_pid=5, ac_tgid=5)
    assert "type 16" in unreadable(exit_record(stats, family=16))
    assert "command 1" in unreadable(exit_record(stats, family=FAMILY, cmd=1))
    assert "names" in unreadable(exit_record(stats, family=FAMILY, named_pid=6))


@pytest.mark.parametrize("at", [20, 22, 24, 26, 32, 34])
def test_found_by_fuzzing_other_attributes_are_refused(at):
    """A kernel that pads before the struct would have every field at another offset."""
    message = bytearray(exit_record(taskstats(13, ac_pid=5, ac_tgid=5), family=FAMILY))
    message[at : at + 2] = (6).to_bytes(2, sys.byteorder)
    assert "attributes" in unreadable(bytes(message))


def test_found_by_fuzzing_only_a_group_attribute_is_the_group():
    message = bytearray(
        exit_record(taskstats(13, ac_pid=5, ac_tgid=5), taskstats(13, cpu_run_virtual_total=9_000), FAMILY)
    )
    assert decode_record(bytes(message), FAMILY).threaded
    at = 20 + int.from_bytes(message[20:22], sys.byteorder)
    message[at + 2 : at + 4] = (6).to_bytes(2, sys.byteorder)
    assert not decode_record(bytes(message), FAMILY).threaded


@given(st.binary(max_size=700))
def test_random_bytes_are_refused_and_never_crash(noise):
    unreadable(noise)


@given(st.lists(st.tuples(st.integers(0, 800), st.integers(0, 255)), max_size=20), st.sampled_from(READABLE))
def test_a_spoiled_record_is_a_record_or_refused(changes, version):
    message = bytearray(exit_record(taskstats(version, ac_pid=5, ac_tgid=5), taskstats(version), FAMILY))
    for at, value in changes:
        message[at % len(message)] = value
    try:
        record = decode_record(memoryview(bytes(message)), FAMILY)
    except UnreadableRecordError:
        return
    assert isinstance(record, TaskRecord)


@given(st.binary(max_size=32))
def test_comm_is_kept_whatever_it_holds(comm):
    record = decode_record(exit_record(taskstats(13, ac_pid=5, ac_comm=comm), family=FAMILY), FAMILY)
    assert record.comm.encode("utf-8", "surrogateescape") == comm.split(b"\0")[0]


# --- records that are passed over


def read(reader, *messages):
    slots = b"".join(message.ljust(RECORD_SLOT_SIZE, b"\xff") for message in messages)
    return reader.read(memoryview(slots), list(map(len, messages)))


def death(pid, comm=b"sh", status=0, last=True, threaded=False, tgid=None, version=16):
    stats = taskstats(
        version, ac_pid=pid, ac_tgid=tgid or pid, ac_comm=comm, ac_exitcode=status, ac_flag=0x20 if last else 0
    )
    return exit_record(stats, taskstats(version) if threaded else None, FAMILY)


def asks(comm, status):
    return comm == "java" or (comm == "cron" and status != 0)


def test_a_process_that_no_rule_asks_for_is_passed_over():
    reader = RecordReader(FAMILY)
    reader.pass_over(asks)
    read(reader, death(1), death(2, b"cron"))  # names that are new are decoded once
    found = read(reader, death(3), death(4, b"java"), death(5, b"cron"), death(6, b"cron", 256), death(7, b"sh", 9))
    assert [record.pid for record in found.records] == [4, 6, 7], "the status of `sh` has not been seen before"
    assert found.passed == [3, 5]
    assert read(reader, death(8, b"sh", 9)).passed == [8]


@pytest.mark.parametrize(
    "message",
    [
        death(9, last=False), death(9, last=False, tgid=8), death(9, tgid=8), death(9, threaded=True),
        death(9, version=13), death(9)[:-1],
    ],
    ids=["early leader", "thread", "last thread", "last of several", "another version", "another length"],
)  # fmt: skip
def test_only_the_record_of_a_whole_process_is_passed_over(message):
    reader = RecordReader(FAMILY)
    reader.pass_over(asks)
    assert read(reader, death(1)).passed == []
    assert read(reader, death(2), message).passed == [2]


@given(st.integers(0, 407), st.integers(1, 255))
def test_a_spoiled_record_is_decoded_like_any_other(place, by):
    """Whatever the reader does not compare, passing over does not depend on."""
    reader = RecordReader(FAMILY)
    reader.pass_over(asks)
    read(reader, death(1))
    message = bytearray(death(2))
    message[place] ^= by
    found = read(reader, bytes(message))
    try:
        record = decode_record(bytes(message), FAMILY)
    except UnreadableRecordError:
        assert (found.records, found.passed, found.unreadable) == ([], [], 1)
    else:
        assert len(found) == 1
        assert not found.passed or (record.last and record.pid == record.tgid and not asks(record.comm, record.status))


def test_a_pid_that_is_reused_in_a_batch_is_not_passed_over():
    reader = RecordReader(FAMILY)
    reader.pass_over(asks)
    read(reader, death(1))
    found = read(reader, death(2), death(2, b"java"), death(2))
    assert ([record.comm for record in found.records], found.passed) == (["sh", "java", "sh"], [])


def test_other_rules_ask_for_other_names():
    reader = RecordReader(FAMILY)
    reader.pass_over(asks)
    read(reader, death(1))
    reader.pass_over(lambda comm, status: True)
    assert read(reader, death(2)).passed == []
    reader.pass_over(None)
    assert read(reader, death(2)).passed == []


def test_a_look_shows_what_the_record_has():
    stats = taskstats(16, ac_pid=7, ac_tgid=7, ac_comm=b"storm\xff", ac_uid=1000, ac_gid=50, ac_ppid=3,
                      ac_exe_dev=2049, ac_exe_inode=1 << 40)  # fmt: skip
    message = exit_record(stats, family=FAMILY)
    look = Who.in_message(message)
    assert look == Who.of(decode_record(message, FAMILY))
    assert (look.comm, look.ppid) == (b"storm\xff".ljust(32, b"\0"), 3)


def test_records_of_whole_processes_are_shed():
    reader = RecordReader(FAMILY)
    reader.pass_over(lambda comm, status: True)
    looks: list[tuple[int, int]] = []
    reader.sheds = lambda pid, status, who: looks.append((pid, status)) or (who.comm[:2] if pid % 2 else None)
    assert not read(reader, death(1, status=256)).shed, "the layout is not known yet"
    found = read(
        reader, death(3, status=256), death(4), death(5, last=False), death(7, threaded=True), death(9, tgid=8)
    )
    assert looks == [(3, 256), (4, 0)]
    assert found.passed == [3] and [(one.pid, one.counted_as) for one in found.shed] == [(3, b"sh")]
    assert decode_record(found.shed[0].message, FAMILY).status == 256
    assert [record.pid for record in found.records] == [4, 5, 7, 9]
    reader.sheds = None
    assert not read(reader, death(3)).shed


def test_what_was_shed_is_kept_if_it_is_needed_after_all():
    reader = RecordReader(FAMILY)
    reader.pass_over(lambda comm, status: comm != "quiet")
    reader.sheds = lambda pid, status, who: True if pid in (4, 5) else None
    read(reader, death(1, b"quiet"))
    found = read(reader, death(2, b"quiet"), death(3), death(4), death(5, b"a"))
    assert found.passed == [2, 4, 5] and not is_repeated(found)
    again = read(reader, death(2, b"quiet"), death(4), death(5, b"a"))
    again.keep_shed(lambda message: decode_record(message, FAMILY), {5})
    assert ([one.pid for one in again.records], again.passed, [one.pid for one in again.shed]) == ([5], [2, 4], [4])
    again.add(read(reader, death(4)))
    assert is_repeated(again), "in another read of the same batch"
    found.keep_shed(lambda message: decode_record(message, FAMILY))
    assert ([(one.pid, one.comm) for one in found.records], found.passed, found.shed) == (
        [(3, "sh"), (4, "sh"), (5, "a")], [2], [],
    )  # fmt: skip


def test_a_pid_that_is_reused_in_a_batch_is_not_shed():
    reader = RecordReader(FAMILY)
    reader.pass_over(lambda comm, status: True)
    reader.sheds = lambda pid, status, who: True
    read(reader, death(1))
    found = read(reader, death(2, b"a"), death(2, b"b"))
    assert ([record.comm for record in found.records], found.shed, found.passed) == (["a", "b"], [], [])


def test_a_slot_without_a_datagram_is_not_read():
    assert len(RecordReader(FAMILY).read(memoryview(death(1).ljust(RECORD_SLOT_SIZE, b"\0")), [0])) == 0
