"""What a daemon hands on comes back as it was, is bounded, and is refused as a whole if it is not as it was written."""

import json
from dataclasses import MISSING, fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnprocd.connector.taskrecord import TaskRecord
from cnprocd.json_value import JsonError
from cnprocd.process.files import FileId, NamedFile, Removal
from cnprocd.process.handed_on import (
    MOST_FILES,
    NOT_HANDED_ON,
    FormerHooks,
    HandedOn,
    Started,
    decode_files,
    decode_hooks,
    decode_processes,
    encode_files,
    encode_hooks,
    encode_processes,
)
from cnprocd.process.model import Image, MoreIds, Process

BOOT = "5d4fb9a2-6f0b-4b0a-9f6f-0123456789ab"
IMAGE = Image("/opt/x", True, FileId(2049, 12), ("/opt/link",), True, "taskstats")
LEADER = TaskRecord(7, 7, 1, 0, False, True, "a\udcff\n", 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12)
FULL = Process(
    7, 1, 10**15, comm="a\udcff\n", comm_source="exec", uid=1, gid=2, ids_source="event", exe="/opt/\udc80",
    cmdline="é x", cgroup="/x", image_source="exec", cgroup_source="zombie", image=IMAGE, threads=3, threaded=True,
    unconfirmed=True, counted_ns=5, ended_ns=9, exe_is_unnamed=True, more_ids=MoreIds(3, 4),
    in_doubt=True,
)  # fmt: skip


def test_every_attribute_is_handed_on():
    """A new attribute of a process must be in this process as well."""
    defaults = {one.name: one.default for one in fields(Process) if one.default is not MISSING}
    assert {name for name, default in defaults.items() if getattr(FULL, name) == default} == set(NOT_HANDED_ON)
    known = HandedOn((FULL, Process(8)), (LEADER,), 5)
    raw, left_out = encode_processes(known, BOOT)
    assert (decode_processes(raw, BOOT), left_out) == (known, 0)


def test_the_processes_of_hooks_are_handed_on():
    former = FormerHooks(frozenset({Started(7, 10**15), Started(8, 3)}), frozenset({Started(9, 4)}))
    assert decode_hooks(encode_hooks(former, BOOT), BOOT) == former


def test_the_files_of_named_paths_are_handed_on():
    current = NamedFile("/opt/\udc80", FileId(2049, 12), True, None), 10**15
    old = NamedFile("/opt/x", FileId(2049, 13), False, Removal(5, 7)), 0
    assert decode_files(encode_files([current, old], BOOT), BOOT) == (current, old)
    assert len(decode_files(encode_files([old] * (MOST_FILES + 1), BOOT), BOOT)) == MOST_FILES


@pytest.mark.parametrize("most_bytes", [300, 5_000, 20_000])
def test_what_has_no_room_is_left_out_and_counted(most_bytes):
    known = HandedOn(tuple(Process(pid, comm="x" * 15) for pid in range(1, 1000)))
    raw, left_out = encode_processes(known, BOOT, most_bytes)
    assert len(raw) <= most_bytes
    assert 0 < left_out == 999 - len(decode_processes(raw, BOOT).processes)


def test_another_boot_or_format_is_refused():
    raw, _ = encode_processes(HandedOn((FULL,)), BOOT)
    with pytest.raises(JsonError):
        decode_processes(raw, BOOT[::-1])
    with pytest.raises(JsonError):
        decode_processes(raw.replace(b'"format": 1', b'"format": 2'), BOOT)


@given(st.data())
def test_a_damaged_text_is_refused_or_read_with_its_types(data):
    """Bytes are cut and changed: never another error, never a value of another type."""
    raw, _ = encode_processes(HandedOn((FULL, Process(8)), (LEADER,)), BOOT)
    at = data.draw(st.integers(0, len(raw)))
    damaged = raw[:at] + data.draw(st.binary(max_size=4)) + raw[at + data.draw(st.integers(0, 4)) :]
    try:
        found = decode_processes(damaged, BOOT)
    except JsonError:
        return
    for process in found.processes:
        assert isinstance(process.tgid, int) and isinstance(process.comm, str | None)
        assert isinstance(process.image, Image | None) and isinstance(process.threads, int)


@pytest.mark.parametrize("value", [None, 1, "x", [], {}, {"format": 1}, {"format": 1, "boot_id": BOOT, "processes": 1}])
def test_other_json_is_refused(value):
    for decode in (decode_processes, decode_hooks, decode_files):
        with pytest.raises(JsonError):
            decode(json.dumps(value).encode(), BOOT)
