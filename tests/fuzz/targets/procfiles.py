"""Contents of /proc files: process/stat.py.

Invariant: parse_stat and parse_ids raise ValueError or return integers; the others never raise. For any comm, including
brackets and newlines, the fields behind it are those after the last ")". Text keeps its bytes, a command line is
truncated at 4096 bytes, a unit is a component of the path, and the path contains the name of the container.
"""

from __future__ import annotations

import random
import re

from fuzz.target import Target, many, outcome

from cnprocd.process import stat
from cnprocd.process.cgroup_path import placement_of

_STAT = re.compile(rb"[^(]*\((.*)\)([^)]*)", re.DOTALL)
_FIELDS = b" S 1 2 3 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 12345 6 7 18446744073709551615 0 0\n"
_CGROUPS = (
    b"0::/system.slice/cron.service\n",
    b"1:name=systemd:/user.slice/user-0.slice/session-1.scope\n0::/\n",
    b"0::/system.slice/docker-" + b"0a" * 32 + b".scope\n",
    b"12:pids:/lxc.payload.box/init.scope\n1:name=systemd:/lxc/box\n0::/lxc/box/a.service",
    b"0::/kubepods.slice/" + b"f" * 64 + b"/x.mount\n",
)


def _raw(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


class ProcFiles(Target):
    name = "procfiles"
    executions = 2_500_000
    tokens = (
        b"(", b")", b") R 1 (", b"\n", b" ", b"\0", b"Uid:", b"\nUid:\t", b"\nGid:\n", b"0::", b":name=systemd:", b"/",
        b".service", b".scope", b"-", b"1" * 5000, b"_1", b"+5", b"\xff", b"\xe2\x80\xa8", b"\xd9\xa3",
    )  # fmt: skip

    def made(self) -> list[bytes]:
        comms = (b"cat", b"a b", b"a) R 1 (b", b"new\nline", b"\xff\xfe", b"(sd-pam)", b"", b"))) 1 1 1")
        status = b"Name:\tcat\nState:\tS (sleeping)\nUid:\t1000\t1000\t1000\t1000\nGid:\t100\t1\t1\t1\nFDSize:\t64\n"
        lines = [b"7 (" + comm + b")" + _FIELDS for comm in comms]
        return [*lines, status, b"/bin/sh\0-c\0exit 3\0", b"x" * 5000, b"\0\0", *_CGROUPS]

    def run(self, rng: random.Random) -> int:
        return many(self, rng, 256)

    def check(self, data: bytes) -> None:
        self._stat(data)
        ids, _ = outcome(lambda: stat.parse_ids(data), ValueError)
        assert ids is None or all(type(number) is int for number in ids)
        cmdline = stat.parse_cmdline(data)
        assert cmdline is None or (_raw(cmdline) in data[:4096].replace(b"\0", b" ") and cmdline)
        cgroup = stat.parse_cgroup(data)
        if cgroup is not None:
            assert _raw(cgroup) in data
            assert "\n" not in cgroup
        placement = placement_of(cgroup or "")
        for unit in (placement.unit, placement.user_unit):
            assert unit is None or {unit, f"_{unit}"} & set(cgroup.split("/"))
        for container in placement.containers:
            assert container.id

    @staticmethod
    def _stat(data: bytes) -> None:
        found, _ = outcome(lambda: stat.parse_stat(data), ValueError)
        if found is None:
            return
        shape = _STAT.fullmatch(data)
        assert shape is not None
        assert _raw(found.comm) == shape[1]
        fields = shape[2].split()
        assert (found.ppid, found.threads, found.start_ticks) == (int(fields[1]), int(fields[17]), int(fields[19]))
        assert isinstance(found.is_dead, bool)
