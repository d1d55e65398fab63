"""The kernel's side of both sockets, laid out by ctypes from the C headers, so that no format string is shared with the
decoders: include/uapi/linux/{netlink,connector,cn_proc,genetlink,taskstats}.h.
"""

from ctypes import Structure, Union, c_int32, c_uint8, c_uint16, c_uint32, c_uint64, sizeof


class NlMsgHdr(Structure):
    _fields_ = (
        ("nlmsg_len", c_uint32), ("nlmsg_type", c_uint16), ("nlmsg_flags", c_uint16), ("nlmsg_seq", c_uint32),
        ("nlmsg_pid", c_uint32),
    )  # fmt: skip


class CnMsg(Structure):
    _fields_ = (
        ("idx", c_uint32), ("val", c_uint32), ("seq", c_uint32), ("ack", c_uint32), ("len", c_uint16),
        ("flags", c_uint16),
    )  # fmt: skip


def _member(name: str, *fields) -> type[Structure]:
    return type(name, (Structure,), {"_fields_": fields})


_PID = (("process_pid", c_int32), ("process_tgid", c_int32))
_PARENT = (("parent_pid", c_int32), ("parent_tgid", c_int32))
MEMBERS = {
    "ack": _member("Ack", ("err", c_uint32)),
    "fork": _member("Fork", *_PARENT, ("child_pid", c_int32), ("child_tgid", c_int32)),
    "exec": _member("Exec", *_PID),
    "uid": _member("Uid", *_PID, ("ruid", c_uint32), ("euid", c_uint32)),
    "gid": _member("Gid", *_PID, ("rgid", c_uint32), ("egid", c_uint32)),
    "sid": _member("Sid", *_PID),
    "ptrace": _member("Ptrace", *_PID, ("tracer_pid", c_int32), ("tracer_tgid", c_int32)),
    "comm": _member("Comm", *_PID, ("comm", c_uint8 * 16)),
    "coredump": _member("Coredump", *_PID, *_PARENT),
    "exit": _member("Exit", *_PID, ("exit_code", c_uint32), ("exit_signal", c_uint32), *_PARENT),
}
# enum proc_cn_event
WHAT = {
    "ack": 0x00000000, "fork": 0x00000001, "exec": 0x00000002, "uid": 0x00000004, "gid": 0x00000040,
    "sid": 0x00000080, "ptrace": 0x00000100, "comm": 0x00000200, "coredump": 0x40000000, "exit": 0x80000000,
}  # fmt: skip


class _EventData(Union):
    _fields_ = tuple(MEMBERS.items())


class ProcEvent(Structure):
    _fields_ = (("what", c_uint32), ("cpu", c_uint32), ("timestamp_ns", c_uint64), ("event_data", _EventData))


assert sizeof(ProcEvent) == 40


def proc_event(member, cpu=0, timestamp_ns=0, what=None, **fields):
    """Return struct proc_event with one union member set."""
    event = ProcEvent(WHAT[member] if what is None else what, cpu, timestamp_ns)
    for name, value in fields.items():
        setattr(getattr(event.event_data, member), name, _text(value, 16))
    return bytes(event)


def _text(value, size):
    """Return a char array of C; ctypes itself would cut bytes at the first NUL."""
    return (c_uint8 * size)(*value) if isinstance(value, bytes) else value


def datagram(payload, seq=0, ack=0, **wrong):
    """Return one datagram of the connector. `wrong` overrides header fields by their C names."""
    nl = {"nlmsg_len": 36 + len(payload), "nlmsg_type": 3} | {k: v for k, v in wrong.items() if k.startswith("nlmsg")}
    cn = {"idx": 1, "val": 1, "seq": seq, "ack": ack, "len": len(payload)}
    cn |= {k: v for k, v in wrong.items() if not k.startswith("nlmsg")}
    return bytes(NlMsgHdr(**nl)) + bytes(CnMsg(**cn)) + payload


def _taskstats_fields(version):
    """Return the fields of struct taskstats in this version, in order. ctypes aligns them as the C compiler does."""
    u64 = "cpu_count cpu_delay_total blkio_count blkio_delay_total swapin_count swapin_delay_total cpu_run_real_total"
    yield from (("version", c_uint16), ("ac_exitcode", c_uint32), ("ac_flag", c_uint8), ("ac_nice", c_uint8))
    for name in u64.split():
        yield name, c_uint64
        if version == 15 and name.endswith("delay_total"):  # the change that version 16 took back
            yield name.replace("total", "max"), c_uint64
            yield name.replace("total", "min"), c_uint64
    yield "cpu_run_virtual_total", c_uint64
    yield "ac_comm", c_uint8 * 32
    yield "ac_sched", c_uint64  # u8 aligned(8), with its padding
    yield from ((name, c_uint32) for name in "ac_uid ac_gid ac_pid ac_ppid".split())
    yield "ac_btime", c_uint64  # u32, and the padding before an aligned(8)
    rest = (
        "ac_etime ac_utime ac_stime ac_minflt ac_majflt coremem virtmem hiwater_rss hiwater_vm read_char write_char "
        "read_syscalls write_syscalls read_bytes write_bytes cancelled_write_bytes nvcsw nivcsw ac_utimescaled "
        "ac_stimescaled cpu_scaled_run_real_total freepages_count freepages_delay_total thrashing_count "
        "thrashing_delay_total ac_btime64 compact_count compact_delay_total"
    )
    yield from ((name, c_uint64) for name in rest.split())
    if version >= 12:
        yield from (
            ("ac_tgid", c_uint32),
            ("ac_tgetime", c_uint64),
            ("ac_exe_dev", c_uint64),
            ("ac_exe_inode", c_uint64),
        )
    if version >= 13:
        yield from (("wpcopy_count", c_uint64), ("wpcopy_delay_total", c_uint64))
    if version >= 14:
        yield from (("irq_count", c_uint64), ("irq_delay_total", c_uint64))
    if version >= 16:
        for name in "cpu blkio swapin freepages thrashing compact wpcopy irq".split():
            yield from ((f"{name}_delay_max", c_uint64), (f"{name}_delay_min", c_uint64))


TASKSTATS: dict[int, type[Structure]] = {
    version: type(f"taskstats_v{version}", (Structure,), {"_fields_": tuple(_taskstats_fields(version))})
    for version in (11, 12, 13, 14, 15, 16)
}


def taskstats(version, **fields):
    """Return struct taskstats of a version."""
    fields = {name: _text(value, 32) for name, value in fields.items()}
    return TASKSTATS[version](version=version, **fields)


class GenlMsgHdr(Structure):
    _fields_ = (("cmd", c_uint8), ("version", c_uint8), ("reserved", c_uint16))


class NlAttr(Structure):
    _fields_ = (("nla_len", c_uint16), ("nla_type", c_uint16))


class _U32(Structure):  # a payload in the order of the other structures: see big_endian.py
    _fields_ = (("value", c_uint32),)


_TYPE_PID, _TYPE_TGID, _TYPE_STATS, _TYPE_AGGR_PID, _TYPE_AGGR_TGID = 1, 2, 3, 4, 5


def _attribute(kind, payload):
    return bytes(NlAttr(4 + len(payload), kind)) + payload + b"\0" * (-len(payload) % 4)


def exit_record(stats, group=None, family=27, cmd=2, named_pid=None):
    """Return the message of taskstats_exit(): AGGR_PID, and AGGR_TGID for a process that had threads."""
    pid = stats.ac_pid if named_pid is None else named_pid
    body = _attribute(_TYPE_AGGR_PID, _attribute(_TYPE_PID, bytes(_U32(pid))) + _attribute(_TYPE_STATS, bytes(stats)))
    if group is not None:
        tgid = bytes(_U32(stats.ac_tgid))
        body += _attribute(_TYPE_AGGR_TGID, _attribute(_TYPE_TGID, tgid) + _attribute(_TYPE_STATS, bytes(group)))
    length = 20 + len(body)
    return bytes(NlMsgHdr(length, family)) + bytes(GenlMsgHdr(cmd, 1)) + body
