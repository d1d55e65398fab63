"""Recordings: cli/recording.py reads them, cli/replaying.py replays them.

Invariant: RecordingError or a recording, nothing else. Any recording that was read can be replayed, in time that grows
with its size, with the same matches every time. Each match belongs to an existing rule. The unpacked size is bounded.
"""

from __future__ import annotations

import io
import json
import random
import struct
import sys
import zlib

from fuzz.mutate import json_damaged, json_text
from fuzz.target import Target, outcome
from unit.connector.wire import datagram, exit_record, proc_event, taskstats

from cnprocd.cli.recording import MAGIC, RecordingError, read
from cnprocd.cli.replaying import replay
from cnprocd.json_value import JsonDict
from cnprocd.rules.compile import Matcher
from cnprocd.rules.language.plain import plain
from cnprocd.rules.language.schema import RuleFileModel

_HEAD = struct.Struct(">cI")
_RULES = {
    "rules": [
        {
            "name": "died",
            "events": ["nonzero_exit"],
            "match": {"comm": "ora_*", "lifetime": "< 2h"},
            "on_unknown_exit": "match",
        },
        {"name": "below", "events": ["exit"], "match": {"ancestor": {"comm": "bash"}, "not": {"user": 7}}},
        {"name": "all", "events": "all"},
        {"name": "threads", "events": "all", "threads": True},
    ]
}
_WORDS = (
    "tgid",
    "ppid",
    "start_ns",
    "comm",
    "uid",
    "cgroup",
    "threads",
    "counted_ns",
    "taskstats",
    "family",
    "0",
    "-1",
    "9" * 4400,
)
Chunks = list[tuple[bytes, bytes]]


def _json(value: object) -> bytes:
    return json.dumps(value).encode()


def _event(member: str, at_ns: int, **fields: int | bytes) -> bytes:
    return datagram(proc_event(member, 0, at_ns, **fields))


def _death(pid: int, at_ns: int, status: int) -> tuple[bytes, bytes]:
    ids = {"process_pid": pid, "process_tgid": pid}
    event = _event("exit", at_ns, **ids, exit_code=status, exit_signal=17, parent_pid=100, parent_tgid=100)
    stats = taskstats(
        16, ac_pid=pid, ac_tgid=pid, ac_ppid=100, ac_exitcode=status, ac_flag=0x20, ac_comm=b"ora_pmon", ac_uid=7
    )
    record = exit_record(stats, family=27)
    return event, struct.pack("=H", len(record)) + record


def chunks(taskstats: bool) -> Chunks:
    """Return a recording: a shell starts two programs; one is killed, one succeeds; a thread, a rename, a core dump."""
    start, second = 10**10, 10**9
    shell = {
        "tgid": 100,
        "ppid": 1,
        "start_ns": 5,
        "comm": "bash",
        "uid": 7,
        "exe": "/bin/bash",
        "cgroup": "/o.service",
    }
    found: Chunks = [
        (b"H", _json({"version": "0", "byte_order": sys.byteorder, "taskstats": taskstats, "family": 27})),
        (b"S", _json([{"tgid": 1, "ppid": 0, "comm": "systemd", "threads": 1}, shell])),
        (b"N", _json({"7": "oracle"})),
    ]
    for pid, status in ((200, 9), (201, 0)):
        ids = {"process_pid": pid, "process_tgid": pid}
        born = _event("fork", start, parent_pid=100, parent_tgid=100, child_pid=pid, child_tgid=pid)
        image = {
            "tgid": pid,
            "ppid": 100,
            "start_ns": start,
            "comm": "ora_pmon\udcff",
            "uid": 7,
            "threads": 1,
            "counted_ns": start,
        }
        found.append((b"D", born + _event("exec", start + 5, **ids)))
        found.append((b"P", _json([image])))
        thread = _event("fork", start + 6, parent_pid=100, parent_tgid=100, child_pid=pid + 50, child_tgid=pid)
        dump = _event("coredump", start + 8, **ids, parent_pid=100, parent_tgid=100)
        found.append((b"D", thread + _event("comm", start + 7, **ids, comm=b"ora_new") + dump))
        event, record = _death(pid, start + second, status)
        found.append((b"D", event))
        if taskstats:
            found.append((b"T", record))
        start += 2 * second
    return [*found, (b"E", _json({"ended": "its time", "lost": 0}))]


def packed(parts: Chunks) -> bytes:
    return MAGIC + zlib.compress(b"".join(_HEAD.pack(kind, len(payload)) + payload for kind, payload in parts), 1)


class Recordings(Target):
    name = "recordings"
    executions = 60_000
    most_cpu_s = 10.0
    tokens = (b"H", b"S", b"D", b"T", b"P", b"N", b"E", b"\0\0\0\0", b"\xff\xff\xff\xff", MAGIC)

    def __init__(self) -> None:
        self._recordings = [chunks(True), chunks(False)]
        super().__init__()
        rules = plain(RuleFileModel.model_validate(_RULES).rules)
        self._names = {rule.name for rule in rules}
        self._matcher = Matcher(rules)

    def made(self) -> list[bytes]:
        return [packed(parts) for parts in self._recordings]

    def mutated(self, rng: random.Random) -> bytes:
        chance = rng.random()
        if chance < 0.1:
            return super().mutated(rng)
        parts = list(rng.choice(self._recordings))
        for _ in range(1 + rng.getrandbits(1)):
            at = rng.randrange(len(parts))
            kind, payload = parts[at]
            if chance < 0.2:
                parts[at : at + rng.getrandbits(1)] = [rng.choice(parts)] * (1 + rng.getrandbits(2))
            elif kind in b"HSPNE" and chance < 0.7:
                parts[at] = kind, json_text(json_damaged(rng, json.loads(payload), _WORDS))
            elif kind in b"DT" and chance < 0.9 and payload:
                raw = bytearray(payload)
                for _ in range(1 + rng.getrandbits(1)):
                    where, length = rng.randrange(len(raw)), 1 << rng.getrandbits(1)
                    raw[where : where + length] = rng.randbytes(length)[: len(raw) - where]
                parts[at] = kind, bytes(raw)
            else:
                parts[at] = kind, self.mutator(rng).damaged(payload, [one for _, one in parts])
        data = packed(parts)
        if chance > 0.97:
            data = data[: rng.randrange(len(data))] if rng.getrandbits(1) else data + rng.randbytes(rng.getrandbits(8))
        return data

    def check(self, data: bytes) -> None:
        found, _ = outcome(lambda: read(io.BytesIO(data)), RecordingError)
        if found is None:
            return
        first = self._replayed(found)
        assert repr(first) == repr(self._replayed(found))

    def _replayed(self, recording) -> list[JsonDict]:
        played = replay(recording, self._matcher)
        assert set(played.rules) <= self._names
        assert played.events + played.unreadable <= sum(
            len(one.datagrams) // 76 + len(one.messages) for one in recording.drains
        )
        for match in played.matches:
            json.dumps(match)
        return played.matches
