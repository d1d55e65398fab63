"""The kernel's connector ABI as Python: include/uapi/linux/{netlink,connector,cn_proc}.h and nothing else. PURE.

This file holds the numbers, the layouts and the packing of the one request that is sent. rules/plan.py decides what to
ask for, and listener.py sends the request. All integers are in native byte order. A datagram is always 76 bytes:

    offset  0  struct nlmsghdr   16   len, type, flags, seq, pid
           16  struct cn_msg     20   id.idx, id.val, seq, ack, len, flags
           36  struct proc_event 40   what, cpu, timestamp_ns, then a 24-byte union at 52
"""

from __future__ import annotations

import struct

NETLINK_CONNECTOR = 11
NLMSG_DONE = 3
CN_IDX_PROC = 1
CN_VAL_PROC = 1

PROC_CN_MCAST_LISTEN = 1
PROC_CN_MCAST_IGNORE = 2

PROC_EVENT_NONE = 0x00000000
PROC_EVENT_FORK = 0x00000001
PROC_EVENT_EXEC = 0x00000002
PROC_EVENT_UID = 0x00000004
PROC_EVENT_GID = 0x00000040
PROC_EVENT_SID = 0x00000080
PROC_EVENT_PTRACE = 0x00000100
PROC_EVENT_COMM = 0x00000200
PROC_EVENT_NONZERO_EXIT = 0x20000000  # only for requests: the kernel sends a failed exit as PROC_EVENT_EXIT
PROC_EVENT_COREDUMP = 0x40000000
PROC_EVENT_EXIT = 0x80000000

# cn_proc.h since 6.6 (PROC_EVENT_ALL). To the kernel, mask 0 means the same.
PROC_EVENT_ALL = (
    PROC_EVENT_FORK
    | PROC_EVENT_EXEC
    | PROC_EVENT_UID
    | PROC_EVENT_GID
    | PROC_EVENT_SID
    | PROC_EVENT_PTRACE
    | PROC_EVENT_COMM
    | PROC_EVENT_NONZERO_EXIT
    | PROC_EVENT_COREDUMP
    | PROC_EVENT_EXIT
)

EVENT_NAMES = {
    PROC_EVENT_FORK: "fork",
    PROC_EVENT_EXEC: "exec",
    PROC_EVENT_UID: "uid",
    PROC_EVENT_GID: "gid",
    PROC_EVENT_SID: "sid",
    PROC_EVENT_PTRACE: "ptrace",
    PROC_EVENT_COMM: "comm",
    PROC_EVENT_NONZERO_EXIT: "nonzero_exit",
    PROC_EVENT_COREDUMP: "coredump",
    PROC_EVENT_EXIT: "exit",
}
"""The rule language's name of each event bit."""

NLMSGHDR = struct.Struct("=IHHII")
CN_MSG = struct.Struct("=IIIIHH")
PROC_EVENT_SIZE = 40
DATAGRAM_SIZE = NLMSGHDR.size + CN_MSG.size + PROC_EVENT_SIZE
QUEUED_EVENT_BYTES = 832  # SO_RCVBUF bytes of one queued event on x86-64 (skb truesize, measured on 6.18)

OFFSET_NLMSG_TYPE = 4  # also used by the classic BPF program, whose offsets count from nlmsghdr
OFFSET_WHAT = 36
OFFSET_DATA = 52


def pack_subscription(op: int, mask: int | None, ack: int = 0) -> bytes:
    """Return a request to the proc connector: LISTEN or IGNORE, with the event mask or without.

    With `mask` the request carries struct proc_input {mcast_op, event_type} (cn_proc.h, since 6.6). With None it is
    the bare 4-byte op that every kernel accepts. An older kernel silently drops the 8-byte form, so the caller must
    wait for the acknowledgement, whose cn_msg.ack is `ack` + 1 (cn_proc.c cn_proc_ack()). The kernel overwrites seq
    with its per-CPU counter, so only ack identifies the acknowledgement among those of other listeners.
    """
    payload = struct.pack("=I", op) if mask is None else struct.pack("=II", op, mask)
    message = CN_MSG.pack(CN_IDX_PROC, CN_VAL_PROC, 0, ack, len(payload), 0) + payload
    return NLMSGHDR.pack(NLMSGHDR.size + len(message), NLMSG_DONE, 0, 0, 0) + message
