"""The next daemon finds the datagrams of a killed one, until they are committed, and only in the same boot."""

import struct
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import given
from hypothesis import strategies as st
from pytest import MonkeyPatch
from unit.connector.wire import datagram, proc_event

from cnprocd.connector import inflight
from cnprocd.connector.inflight import EVENT_SLOTS, InFlight
from cnprocd.connector.needed import Needed
from cnprocd.connector.taskrecord import RECORD_SLOT_SIZE


def event(i):
    return struct.pack("=IHHII", 76, 3, 0, i, 0) + bytes(range(60)) + bytes(4)


def record(i):
    return struct.pack("=II", 596, i) + bytes(588)


def put(slots, events, records):
    for i in range(events):
        slots.events[i * 80 : (i + 1) * 80] = event(i)
    for i in range(records):
        slots.records[i * RECORD_SLOT_SIZE : i * RECORD_SLOT_SIZE + 596] = record(i)


def test_what_was_in_hand_is_found_again(tmp_path):
    first = InFlight(tmp_path / "in-flight", "boot")
    assert first.durable and first.leftover.events == b"" and first.leftover.records == ()
    put(first, 3, 2)
    second = InFlight(tmp_path / "in-flight", "boot")
    assert (second.leftover.events, second.leftover.records) == (event(0) + event(1) + event(2), (record(0), record(1)))
    third = InFlight(tmp_path / "in-flight", "boot")
    assert third.leftover == second.leftover, "killed before it settled anything"


def test_what_was_settled_is_gone(tmp_path):
    slots = InFlight(tmp_path / "in-flight", "boot")
    put(slots, EVENT_SLOTS, 5)
    slots.blank(2, 1)
    left = InFlight(tmp_path / "in-flight", "boot").leftover
    assert (len(left.events), len(left.records)) == ((EVENT_SLOTS - 2) * 80, 4)
    slots.blank(EVENT_SLOTS, 5)
    left = InFlight(tmp_path / "in-flight", "boot").leftover
    assert (left.events, left.records) == (b"", ())


def test_what_was_looked_at_ahead_stays_behind_what_is_kept(tmp_path):
    """Events 0 to 2 are handled, 3 and 4 were looked at: they stay, in front, for this daemon and for the next one."""
    slots = InFlight(tmp_path / "in-flight", "boot")
    put(slots, 5, 0)
    for _ in range(2):  # a tick can blank once more before they are taken
        handled = 3 if bytes(slots.events[:80]) == event(0) else 0
        assert slots.blank(handled, 0, ahead=2) == (0, 0)
        assert bytes(slots.events[:160]) == event(3) + event(4)
        left = InFlight(tmp_path / "in-flight", "boot").leftover
        assert left.events == event(3) + event(4)


def test_another_boot_has_other_pids(tmp_path):
    put(InFlight(tmp_path / "in-flight", "boot"), 3, 2)
    assert InFlight(tmp_path / "in-flight", "another").leftover.events == b""
    assert InFlight(tmp_path / "in-flight", "boot").leftover.events == b""


def test_without_a_file_it_is_plain_memory(tmp_path):
    slots = InFlight(tmp_path / "missing" / "in-flight", "boot")
    put(slots, 1, 1)
    assert not slots.durable
    slots.blank(1, 1)


def test_a_damaged_file_is_only_what_it_is(tmp_path):
    path = tmp_path / "in-flight"
    put(InFlight(path, "boot"), 2, 1)
    path.write_bytes(path.read_bytes()[:100])
    assert len(InFlight(path, "boot").leftover.events) <= 80
    path.write_bytes(b"\xff" * 1_000_000)
    assert InFlight(path, "boot").leftover.events == b""


def exited(tid):
    return datagram(proc_event("exit", process_pid=tid, process_tgid=tid)) + bytes(4)


def recorded(tid):
    return (struct.pack("=I", 596) + bytes(160) + struct.pack("=I", tid)).ljust(596, b"\0")


@given(st.lists(st.integers(1, 9), max_size=20), st.sets(st.integers(1, 9)), st.lists(st.integers(1, 9), max_size=3))
def test_only_partially_matched_exits_stay_in_order(tids, unsettled, more):
    with TemporaryDirectory() as directory:
        path = Path(directory) / "in-flight"
        slots = InFlight(path, "boot")
        first = 0, 0
        kept: list[int] = []
        for batch in (tids, more):
            for i, tid in enumerate(batch):
                slots.events[(first[0] + i) * 80 : (first[0] + i + 1) * 80] = exited(tid)
                at = (first[1] + i) * RECORD_SLOT_SIZE
                slots.records[at : at + 596] = recorded(tid)
            first = slots.blank(first[0] + len(batch), first[1] + len(batch), Needed(unsettled, unsettled))
            kept = [tid for tid in (*kept, *batch) if tid in unsettled]
            newest = list(dict.fromkeys(reversed(kept)))[::-1]
            assert first == (len(newest), len(kept))
        left = InFlight(path, "boot")
        once = list(dict.fromkeys(kept))  # the test's datagrams of one tid are the same, as copies are
        assert left.leftover.events == b"".join(map(exited, newest))
        assert left.leftover.records == tuple(map(recorded, once))
        assert left.leftover_slots == first


def test_of_too_many_halves_the_newest_stay(tmp_path):
    slots = InFlight(tmp_path / "in-flight", "boot")
    for i in range(EVENT_SLOTS):
        slots.events[i * 80 : (i + 1) * 80] = exited(i + 1)
    assert slots.blank(EVENT_SLOTS, 0, Needed(set(range(1, EVENT_SLOTS + 1)))) == (EVENT_SLOTS // 2, 0)
    assert slots.leftover_slots == (0, 0)
    left = InFlight(tmp_path / "in-flight", "boot").leftover.events
    assert left == b"".join(exited(i + 1) for i in range(EVENT_SLOTS // 2, EVENT_SLOTS))


def test_of_a_reused_pid_only_the_decided_record_is_gone(tmp_path):
    slots = InFlight(tmp_path / "in-flight", "boot")
    for i, tid in enumerate((7, 5, 7, 7)):
        slots.records[i * RECORD_SLOT_SIZE : i * RECORD_SLOT_SIZE + 596] = recorded(tid)[:-1] + bytes([i])
    assert slots.blank(0, 4, Needed(records={7, 5}, decided=[7, 7])) == (0, 2)
    left = InFlight(tmp_path / "in-flight", "boot").leftover.records
    assert [(record[164], record[-1]) for record in left] == [(5, 1), (7, 3)]


class KilledError(Exception):
    """The daemon is killed here."""


@given(st.integers(0, 12), st.sets(st.integers(1, 4)))
def test_a_kill_never_leaves_a_record_without_its_event(step, unsettled):
    """Of an event alone the next daemon makes the same job. Of a record alone it would make another one.

    The four deaths have been handled. The daemon is killed at some step of blanking their slots.
    """
    with TemporaryDirectory() as directory:
        path = Path(directory) / "in-flight"
        slots = InFlight(path, "boot")
        for i in range(4):
            slots.events[i * 80 : (i + 1) * 80] = exited(i + 1)
            slots.records[i * RECORD_SLOT_SIZE : i * RECORD_SLOT_SIZE + 596] = recorded(i + 1)
        with MonkeyPatch.context() as patch, suppress(KilledError):
            killed = KilledAt(step, inflight._LENGTH)
            patch.setattr(inflight, "_LENGTH", killed)
            patch.setattr(inflight, "_blank", killed.before(inflight._blank))
            slots.blank(4, 4, Needed(unsettled, unsettled))
        left = InFlight(path, "boot").leftover
        assert all(exited(tid) in left.events for tid in range(1, 5) if recorded(tid) in left.records)


class KilledAt:
    """A struct and other work, done only so often."""

    def __init__(self, steps, real):
        self.steps, self.size, self.unpack_from, self.real = steps, real.size, real.unpack_from, real

    def pack_into(self, *args):
        self._step()
        self.real.pack_into(*args)

    def before(self, work):
        def killed_or_done(*args):
            self._step()
            work(*args)

        return killed_or_done

    def _step(self):
        if not self.steps:
            raise KilledError
        self.steps -= 1
