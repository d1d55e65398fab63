"""Exit records that the slots have no room for are found by the next daemon, as long as their exit is not decided."""

import os
import struct
from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import given
from hypothesis import strategies as st
from pytest import MonkeyPatch

from cnprocd.connector import record_log
from cnprocd.connector.inflight import RECORD_SLOTS, InFlight
from cnprocd.connector.needed import Needed, Union
from cnprocd.connector.record_log import RecordLog
from cnprocd.connector.taskrecord import RECORD_SLOT_SIZE

HEAD = b"cnprocd1 a boot".ljust(64, b"\0")
LENGTH = 596


def recorded(tid, number=0):
    return (struct.pack("=II", LENGTH, number) + bytes(156) + struct.pack("=I", tid)).ljust(LENGTH, b"\0")


def put(slots, tids):
    for i, tid in enumerate(tids):
        slots.records[i * RECORD_SLOT_SIZE : i * RECORD_SLOT_SIZE + LENGTH] = recorded(tid)


def test_more_records_than_half_the_slots_survive_a_kill(tmp_path):
    """Behind a standstill hundreds of records come before their events. Those of the oldest were lost by a kill."""
    slots = InFlight(tmp_path / "in-flight", "boot")
    tids = range(1, RECORD_SLOTS + 1)
    put(slots, tids)
    assert slots.blank(0, RECORD_SLOTS, Needed(records=set(tids))) == (0, RECORD_SLOTS // 2)
    assert InFlight(tmp_path / "in-flight", "boot").leftover.records == tuple(map(recorded, tids))


def test_more_records_than_slots_survive_a_kill(tmp_path):
    slots = InFlight(tmp_path / "in-flight", "boot")
    tids = range(1, 3 * RECORD_SLOTS + 1)
    for begin in range(0, len(tids), RECORD_SLOTS):
        if begin:
            slots.make_room()
        put(slots, tids[begin : begin + RECORD_SLOTS])
        assert InFlight(tmp_path / "in-flight", "boot").leftover.records == tuple(map(recorded, tids[: begin + 512]))
    slots.blank(0, RECORD_SLOTS, Needed(records=set(tids[5:])))
    assert InFlight(tmp_path / "in-flight", "boot").leftover.records == tuple(map(recorded, tids[5:]))


def test_the_log_is_empty_when_all_is_decided(tmp_path):
    slots = InFlight(tmp_path / "in-flight", "boot")
    put(slots, range(RECORD_SLOTS))
    slots.make_room()
    slots.blank(0, 0)
    assert InFlight(tmp_path / "in-flight", "boot").leftover.records == ()
    assert (tmp_path / "in-flight-records").stat().st_size < 100


def test_only_what_has_left_is_looked_at(tmp_path):
    """In a storm, looking at every record for each batch took half of the daemon's time."""
    log = RecordLog(tmp_path / "log", HEAD)
    log.append([recorded(tid) for tid in (1, 2, 3)])
    needed = LookedAt({3})
    log.forget(Needed(records=needed, left=[1, 4]), exited=[3])
    assert needed.asked_for == {1, 3}
    assert RecordLog(tmp_path / "log", HEAD).leftover == (recorded(2), recorded(3))
    log.forget(Needed(records=needed))
    assert RecordLog(tmp_path / "log", HEAD).leftover == (recorded(3),)


class LookedAt(set):
    """A set that knows what was looked up in it."""

    def __init__(self, tids):
        super().__init__(tids)
        self.asked_for = set()

    def __contains__(self, tid):
        self.asked_for.add(tid)
        return super().__contains__(tid)


@given(st.sets(st.integers(0, 9)), st.sets(st.integers(0, 9)))
def test_a_union_is_the_set_of_both(small, large):
    union = Union(small, large)
    assert union == small | large and set(union) == small | large
    assert (len(union), bool(union)) == (len(small | large), bool(small | large))
    assert {tid for tid in range(10) if tid in union} == small | large


def test_records_of_another_boot_are_not_used(tmp_path):
    RecordLog(tmp_path / "log", HEAD).append([recorded(1)])
    assert RecordLog(tmp_path / "log", HEAD[:-1] + b"2").leftover == ()
    assert RecordLog(tmp_path / "log", HEAD).leftover == ()


STEPS = st.lists(
    st.one_of(
        st.lists(st.integers(1, 9), max_size=4).map(lambda tids: ("append", tids)),
        st.sets(st.integers(1, 9)).map(lambda tids: ("keep", tids)),
        st.lists(st.integers(1, 9), max_size=4).map(lambda tids: ("decided", tids)),
        st.just(("killed", [])),
    ),
    max_size=30,
)


@given(STEPS, st.booleans())
def test_the_log_has_what_was_kept_in_order(steps, compacts):
    with TemporaryDirectory() as directory, MonkeyPatch.context() as patch:
        if compacts:
            patch.setattr(record_log, "_LEAST_COMPACTED", 0)
        path, number = Path(directory) / "log", 0
        log = RecordLog(path, HEAD)
        kept: list[tuple[int, int]] = []
        for what, tids in steps:
            if what == "append":
                new = [(tid, number + i) for i, tid in enumerate(tids)]
                number += len(new)
                kept += new
                log.append([recorded(*one) for one in new])
            elif what == "keep":
                kept = [one for one in kept if one[0] in tids]
                log.forget(Needed(records=tids))
            elif what == "decided":
                elsewhere = []
                for tid in tids:
                    oldest = next((one for one in kept if one[0] == tid), None)
                    kept = [one for one in kept if one != oldest]
                    elsewhere += [tid] if oldest is None else []
                assert log.forget(Needed(records=set(range(10)), decided=tids)) == elsewhere
            else:
                log = RecordLog(path, HEAD)
            assert RecordLog(path, HEAD).leftover == tuple(recorded(*one) for one in kept)


@given(st.integers(0, 4 * LENGTH))
def test_a_cut_log_has_the_records_before_the_cut(size):
    with TemporaryDirectory() as directory:
        path = Path(directory) / "log"
        log = RecordLog(path, HEAD)
        start = path.stat().st_size
        log.append([recorded(1), recorded(2), recorded(3)])
        path.write_bytes(path.read_bytes()[: start + size])
        whole = [recorded(1), recorded(2), recorded(3)][: size // LENGTH]
        again = RecordLog(path, HEAD)
        assert again.leftover == tuple(whole)
        again.append([recorded(4)])
        assert RecordLog(path, HEAD).leftover == (*whole, recorded(4)), "what follows the cut can be read"


def test_records_without_room_are_counted_for_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr(record_log, "MOST_BYTES", 2 * LENGTH)
    log = RecordLog(tmp_path / "log", HEAD)
    log.append([recorded(1)])
    log.append([recorded(2), recorded(3)])
    again = RecordLog(tmp_path / "log", HEAD)
    assert again.leftover == (recorded(1),)
    assert (again.take_lost(), again.take_lost()) == (2, 0)
    assert RecordLog(tmp_path / "log", HEAD).take_lost() == 0


def test_a_full_directory_leaves_no_record_without_event(tmp_path, monkeypatch):
    """A record whose event was reported, found alone, would be reported again as an exit whose event was lost."""
    log = RecordLog(tmp_path / "log", HEAD)
    log.append([recorded(1), recorded(2)])
    monkeypatch.setattr(RecordLog, "_append", lambda self, data: False)
    log.forget(Needed(records={2}))
    again = RecordLog(tmp_path / "log", HEAD)
    assert (again.leftover, again.take_lost()) == ((), 1)


def test_a_write_that_is_cut_short_is_taken_back(tmp_path, monkeypatch):
    log = RecordLog(tmp_path / "log", HEAD)
    log.append([recorded(1)])
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, data[: len(data) - 7], at))
    assert not log._append(recorded(2))
    monkeypatch.undo()
    log.append([recorded(3)])
    assert RecordLog(tmp_path / "log", HEAD).leftover == (recorded(1), recorded(3))
