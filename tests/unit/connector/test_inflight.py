"""What a killed process had in hand is found by the next one, until it is settled, and only in the same boot."""

import struct

from cnprocd.connector.inflight import EVENT_SLOTS, RECORD_SLOT_SIZE, InFlight

EVENT = struct.pack("=IHHII", 76, 3, 0, 7, 0) + bytes(range(60)) + bytes(4)
RECORD = struct.pack("=I", 596) + bytes(592)


def put(slots, events, records):
    for i in range(events):
        slots.events[i * 80 : (i + 1) * 80] = EVENT
    for i in range(records):
        slots.records[i * RECORD_SLOT_SIZE : i * RECORD_SLOT_SIZE + len(RECORD)] = RECORD


def test_what_was_in_hand_is_found_again(tmp_path):
    first = InFlight(tmp_path / "in-flight", "boot")
    assert first.durable and first.leftover.events == b"" and first.leftover.records == ()
    put(first, 3, 2)
    second = InFlight(tmp_path / "in-flight", "boot")
    assert (second.leftover.events, second.leftover.records) == (EVENT * 3, (RECORD, RECORD))
    third = InFlight(tmp_path / "in-flight", "boot")
    assert third.leftover == second.leftover, "killed before it settled anything"


def test_what_was_settled_is_gone(tmp_path):
    slots = InFlight(tmp_path / "in-flight", "boot")
    put(slots, EVENT_SLOTS, 5)
    slots.settle(2, 1)
    left = InFlight(tmp_path / "in-flight", "boot").leftover
    assert (len(left.events), len(left.records)) == ((EVENT_SLOTS - 2) * 80, 4)
    slots.settle(EVENT_SLOTS, 5)
    left = InFlight(tmp_path / "in-flight", "boot").leftover
    assert (left.events, left.records) == (b"", ())


def test_another_boot_has_other_pids(tmp_path):
    put(InFlight(tmp_path / "in-flight", "boot"), 3, 2)
    assert InFlight(tmp_path / "in-flight", "another").leftover.events == b""
    assert InFlight(tmp_path / "in-flight", "boot").leftover.events == b""


def test_without_a_file_it_is_plain_memory(tmp_path):
    slots = InFlight(tmp_path / "missing" / "in-flight", "boot")
    put(slots, 1, 1)
    assert not slots.durable
    slots.settle(1, 1)


def test_a_damaged_file_is_only_what_it_is(tmp_path):
    path = tmp_path / "in-flight"
    put(InFlight(path, "boot"), 2, 1)
    path.write_bytes(path.read_bytes()[:100])
    assert len(InFlight(path, "boot").leftover.events) <= 80
    path.write_bytes(b"\xff" * 1_000_000)
    assert InFlight(path, "boot").leftover.events == b""
