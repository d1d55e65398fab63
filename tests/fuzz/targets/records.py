"""Exit records of taskstats: connector/taskrecord.py.

Invariant: UnreadableRecordError or a record, nothing else. A message is rejected if it is too short, of another family
or command, of a version with another layout, or if its attributes are not those of one exit record in their order.
Every field of a record has the value at the offset of struct taskstats in the C header.
"""

from __future__ import annotations

import random
import struct
import sys

from fuzz.target import Target, many
from unit.connector.wire import TASKSTATS, exit_record, taskstats

from cnprocd.connector.taskrecord import UnreadableRecordError, decode_record

FAMILY = 27
_STRUCT = TASKSTATS[12]
_ATTRIBUTES = struct.Struct("=HHHHIHH")  # AGGR_PID, PID with its value, STATS
_TYPE_MASK = 0x3FFF  # the two bits above say "nested" and "network byte order"


class Records(Target):
    name = "records"
    executions = 2_500_000

    def made(self) -> list[bytes]:
        found = []
        for version in (12, 13, 14, 15, 16, 11):
            one = taskstats(
                version, ac_exitcode=11 | 0x80, ac_flag=0x20, ac_comm=b"ora_pmon", ac_uid=1, ac_gid=2, ac_pid=77,
                ac_ppid=1, cpu_run_virtual_total=5_000_000, ac_etime=99, **({"ac_tgid": 70} if version >= 12 else {}),
            )  # fmt: skip
            found.append(exit_record(one, family=FAMILY))
            if version >= 12:
                found.append(exit_record(one, group=taskstats(version, cpu_run_virtual_total=9_000_000), family=FAMILY))
        return found

    def mutated(self, rng: random.Random) -> bytes:
        chance = rng.random()
        seed = self.seeds[int(rng.random() * len(self.seeds))]
        if chance < 0.1:
            return self.mutator(rng).damaged(seed, self.seeds)
        raw = bytearray(seed)
        # Headers decide about acceptance, so they are damaged more often; the rest are values.
        for _ in range(1 + rng.getrandbits(1)):
            at = int(rng.random() * (48 if chance < 0.4 else len(raw)))
            length = 1 << int(rng.random() * (4 if chance < 0.7 else 6))
            raw[at : at + length] = rng.randbytes(length)
        if chance > 0.95:
            del raw[int(rng.random() * len(raw)) :]
        return bytes(raw)

    def run(self, rng: random.Random) -> int:
        return many(self, rng, 256)

    def check(self, data: bytes) -> None:
        try:
            record = decode_record(data, FAMILY)
        except UnreadableRecordError:
            assert not self._is_record(data), "a good record was refused"
            return
        assert self._is_record(data), "it is no record"
        one = _STRUCT.from_buffer_copy(data, 36)
        assert record[:6] == (
            one.ac_pid,
            one.ac_tgid,
            one.ac_ppid,
            one.ac_exitcode,
            bool(one.ac_flag & 0x20),
            record.threaded,
        )
        comm = bytes(one.ac_comm).split(b"\0")[0].decode("utf-8", "surrogateescape")
        assert record[6:11] == (comm, one.ac_uid, one.ac_gid, one.ac_btime64, one.ac_tgetime)
        assert record[12:] == (
            one.hiwater_rss, one.read_bytes, one.write_bytes, one.ac_minflt, one.ac_majflt, one.ac_exe_dev,
            one.ac_exe_inode,
        )  # fmt: skip
        cpu_us = one.cpu_run_virtual_total // 1000 or one.ac_utime + one.ac_stime
        group = self._group(data)
        assert record.threaded == (group is not None)
        assert record.cpu_time_us == max(cpu_us, (group or 0) // 1000)

    @staticmethod
    def _is_record(data: bytes) -> bool:
        if len(data) < 436 or int.from_bytes(data[4:6], sys.byteorder) != FAMILY or data[16] != 2:
            return False
        aggregate, kind, pid_size, pid_kind, pid, stats_size, stats_kind = _ATTRIBUTES.unpack_from(data, 20)
        kinds = (kind & _TYPE_MASK, pid_kind & _TYPE_MASK, stats_kind & _TYPE_MASK)
        if kinds != (4, 1, 3) or pid_size != 8 or stats_size < 404 or aggregate < 12 + stats_size:
            return False
        one = _STRUCT.from_buffer_copy(data, 36)
        return one.version >= 12 and one.version != 15 and pid == one.ac_pid

    @staticmethod
    def _group(data: bytes) -> int | None:
        """Return the CPU time of the second struct, if the second attribute is AGGR_TGID and has one."""
        at = 20 + (int.from_bytes(data[20:22], sys.byteorder) + 3) // 4 * 4
        if len(data) < at + 16 + 80 or int.from_bytes(data[at + 2 : at + 4], sys.byteorder) & _TYPE_MASK != 5:
            return None
        return int.from_bytes(data[at + 88 : at + 96], sys.byteorder)
