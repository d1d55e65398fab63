"""Classic BPF programs for the two sockets: the kernel drops what no rule can need. PURE.

SO_ATTACH_FILTER works on netlink sockets of every kernel (net/netlink/af_netlink.c do_one_broadcast calls sk_filter),
so a kernel without struct proc_input filters as well. Facts that the programs rely on:

- Offsets count from the netlink header. BPF_LD|BPF_W reads big-endian: a constant to compare with is the byte-swapped
  native value, and a field whose bits are to be tested is read byte by byte instead.
- A wait status is code << 8 | signal, so its lowest byte holds signal and core flag, the next one the code.
- The program's return value is the number of bytes to keep. Here it is all or nothing.

A program is built from tests that jump by label. `assemble` turns labels into the 8-bit offsets of the instruction, and
`listing` renders the program. Sources: Documentation/networking/filter.rst, include/uapi/linux/bpf_common.h.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from cnprocd.connector import uapi
from cnprocd.connector.status import EVERY_STATUS, FAILURES, SIGNAL_NAMES, StatusSet

LD_W_ABS = 0x20
LD_B_ABS = 0x30
LDX_W_MEM = 0x61
ST_MEM = 0x02
TAX = 0x07
ALU_AND_K = 0x54
JMP_JA = 0x05
JEQ_K = 0x15
JEQ_X = 0x1D
JGT_K = 0x25
JGE_K = 0x35
JSET_K = 0x45
RET_K = 0x06

KEEP = 0xFFFFFFFF
MAX_INSTRUCTIONS = 4096  # BPF_MAXINSNS


class Instruction(NamedTuple):
    """struct sock_filter."""

    code: int
    jt: int
    jf: int
    k: int


NOTHING = (Instruction(RET_K, 0, 0, 0),)
"""The program that drops everything."""


class _Line(NamedTuple):
    label: str | None
    code: int
    k: int
    true: str | None = None
    false: str | None = None


def _wire(value: int) -> int:
    """Return a native 32-bit value as BPF_LD|BPF_W loads it from the packet."""
    return int.from_bytes(value.to_bytes(4, sys.byteorder), "big")


@dataclass(frozen=True, slots=True)
class ConnectorFilter:
    """What the connector's socket passes.

    `events` holds PROC_EVENT_* bits; acknowledgements always pass. `thread_forks`: forks that make a thread pass as
    well. `exits`: the statuses (of a thread) that pass. `leader_exits`: every exit of a thread-group leader passes.
    """

    events: int
    thread_forks: bool = True
    exits: StatusSet = EVERY_STATUS
    leader_exits: bool = False

    def passes_everything(self) -> bool:
        wanted = uapi.PROC_EVENT_ALL & ~uapi.PROC_EVENT_NONZERO_EXIT
        return self.events & wanted == wanted and self.thread_forks and self.exits == EVERY_STATUS


@dataclass(frozen=True, slots=True)
class TaskstatsFilter:
    """What the taskstats socket passes: records of threads that ended with one of `exits`.

    Records of a leader that ends before its process always pass as well, because they carry the process's comm. A
    single-threaded process never makes one.
    """

    exits: StatusSet = EVERY_STATUS


def connector_program(wanted: ConnectorFilter) -> tuple[Instruction, ...]:
    """Return the program for SO_ATTACH_FILTER on the connector socket; empty if everything passes."""
    if wanted.passes_everything():
        return ()
    lines = [_Line(None, LD_W_ABS, uapi.OFFSET_WHAT), _Line(None, JEQ_K, 0, "keep", None)]
    singles = [
        bit
        for bit in uapi.EVENT_NAMES
        if wanted.events & bit and bit not in (uapi.PROC_EVENT_NONZERO_EXIT, uapi.PROC_EVENT_EXIT)
    ]
    for bit in singles:
        fork = bit == uapi.PROC_EVENT_FORK and not wanted.thread_forks
        lines.append(_Line(None, JEQ_K, _wire(bit), "fork" if fork else "keep", None))
    if wanted.events & (uapi.PROC_EVENT_EXIT | uapi.PROC_EVENT_NONZERO_EXIT):
        lines.append(_Line(None, JEQ_K, _wire(uapi.PROC_EVENT_EXIT), "exit", "drop"))
    lines.append(_Line(None, JMP_JA, 0, "drop"))
    if uapi.PROC_EVENT_FORK in singles and not wanted.thread_forks:
        # child_pid == child_tgid: a new process
        lines += _same_word("fork", uapi.OFFSET_DATA + 8, uapi.OFFSET_DATA + 12, "keep", "drop")
    if wanted.leader_exits:
        lines += _same_word("exit", uapi.OFFSET_DATA, uapi.OFFSET_DATA + 4, "keep", "status")
        lines += _status_tests("status", uapi.OFFSET_DATA + 8, wanted.exits)
    else:
        lines += _status_tests("exit", uapi.OFFSET_DATA + 8, wanted.exits)
    return assemble(lines)


# struct taskstats inside the generic netlink message: nlmsghdr 16, genlmsghdr 4, AGGR_PID 4, PID 4+4, STATS 4.
TASKSTATS_OFFSET = 36
_TS_EXITCODE = TASKSTATS_OFFSET + 4
_TS_FLAG = TASKSTATS_OFFSET + 8
_TS_PID = TASKSTATS_OFFSET + 128
_TS_TGID = TASKSTATS_OFFSET + 368  # ac_tgid, since version 12
_AGROUP = 0x20
_GENL_CMD = 16
_CMD_NEW = 2


def taskstats_program(wanted: TaskstatsFilter) -> tuple[Instruction, ...]:
    """Return the program for SO_ATTACH_FILTER on a taskstats version 12+ socket; empty if every record passes."""
    if wanted.exits == EVERY_STATUS:
        return ()
    lines = [
        # Anything but TASKSTATS_CMD_NEW answers a request (NLMSG_ERROR has its errno here), and is not an exit record.
        _Line(None, LD_B_ABS, _GENL_CMD),
        _Line(None, JEQ_K, _CMD_NEW, "record", "keep"),
        *_status_tests("record", _TS_EXITCODE, wanted.exits, otherwise="early"),
        _Line("early", LD_B_ABS, _TS_FLAG),
        _Line(None, JSET_K, _AGROUP, "drop", None),
        *_same_word(None, _TS_PID, _TS_TGID, "keep", "drop"),
    ]
    return assemble(lines)


def _same_word(label: str | None, first: int, second: int, true: str, false: str) -> list[_Line]:
    return [
        _Line(label, LD_W_ABS, first),
        _Line(None, TAX, 0),
        _Line(None, LD_W_ABS, second),
        _Line(None, JEQ_X, 0, true, false),
    ]


def _status_tests(label: str, offset: int, wanted: StatusSet, otherwise: str = "drop") -> list[_Line]:
    """Return tests that keep a message whose wait status at `offset` is in `wanted`, and else jump to `otherwise`."""
    low, high = (0, 1) if sys.byteorder == "little" else (3, 2)
    if wanted == EVERY_STATUS:
        return [_Line(label, JMP_JA, 0, "keep")]
    if wanted == FAILURES:
        return [_Line(label, LD_W_ABS, offset), _Line(None, JEQ_K, 0, otherwise, "keep")]
    code, by_signal = f"{label} code", f"{label} signal"
    lines = [
        _Line(label, LD_B_ABS, offset + low),
        _Line(None, ALU_AND_K, 0x7F),
        _Line(None, JEQ_K, 0, code, by_signal),
    ]
    lines += _range_tests(by_signal, _runs(wanted.signals), otherwise)
    lines += [_Line(code, LD_B_ABS, offset + high), *_range_tests(None, wanted.codes, otherwise)]
    return lines


def _runs(numbers: Iterable[int]) -> tuple[tuple[int, int], ...]:
    return StatusSet.of(((number, number) for number in numbers), ()).codes


def _range_tests(label: str | None, ranges: Iterable[tuple[int, int]], otherwise: str) -> list[_Line]:
    lines: list[_Line] = []
    for low, high in ranges:
        if low == high:
            lines.append(_Line(None, JEQ_K, low, "keep", None))
        else:
            over = f"over {label} {low}"
            lines += [
                _Line(None, JGE_K, low, None, over),
                _Line(None, JGT_K, high, None, "keep"),
                _Line(over, ALU_AND_K, KEEP),
            ]
    lines.append(_Line(None, JMP_JA, 0, otherwise))
    return [lines[0]._replace(label=label), *lines[1:]]


def assemble(lines: list[_Line]) -> tuple[Instruction, ...]:
    """Resolve labels, with `keep` and `drop` at the end. Raises ValueError if a jump or the program is too long."""
    lines = [*lines, _Line("drop", RET_K, 0), _Line("keep", RET_K, KEEP)]
    places = {line.label: number for number, line in enumerate(lines) if line.label}
    if len(lines) > MAX_INSTRUCTIONS:
        raise ValueError(f"a filter of {len(lines)} instructions exceeds the kernel's limit of {MAX_INSTRUCTIONS}")
    program = []
    for number, line in enumerate(lines):
        true = places[line.true] - number - 1 if line.true else 0
        false = places[line.false] - number - 1 if line.false else 0
        if line.code == JMP_JA:
            program.append(Instruction(JMP_JA, 0, 0, true))
        elif max(true, false) > 255 or min(true, false) < 0:
            raise ValueError("a conditional jump reaches at most 255 instructions forward")
        else:
            program.append(Instruction(line.code, true, false, line.k))
    return tuple(program)


_MNEMONICS = {
    LD_W_ABS: "ld [{k}]",
    LD_B_ABS: "ldb [{k}]",
    TAX: "tax",
    ALU_AND_K: "and #{k:#x}",
    JMP_JA: "ja {ja}",
    JEQ_K: "jeq #{k:#x}, {jt}, {jf}",
    JEQ_X: "jeq x, {jt}, {jf}",
    JGT_K: "jgt #{k:#x}, {jt}, {jf}",
    JGE_K: "jge #{k:#x}, {jt}, {jf}",
    JSET_K: "jset #{k:#x}, {jt}, {jf}",
    RET_K: "ret #{k:#x}",
}


def listing(program: tuple[Instruction, ...]) -> list[str]:
    """Return the program in the syntax of bpf_asm, one instruction a line, with line numbers as jump targets."""
    return [
        f"{n:3}: " + _MNEMONICS[i.code].format(k=i.k, ja=n + 1 + i.k, jt=n + 1 + i.jt, jf=n + 1 + i.jf)
        for n, i in enumerate(program)
    ]


def describe(wanted: StatusSet) -> str:
    """Return a status set as text, for `explain`."""
    if wanted == EVERY_STATUS:
        return "any status"
    if wanted == FAILURES:
        return "any failure"
    codes = [f"{low}" if low == high else f"{low}-{high}" for low, high in wanted.codes]
    signals = [SIGNAL_NAMES.get(number, str(number)) for number in sorted(wanted.signals)]
    if len(signals) == len(range(1, 65)):
        signals = ["any signal"]
    return ", ".join((["exit code " + " ".join(codes)] if codes else []) + signals) or "no exit"
