"""/proc files of hostile processes: built as fs/proc builds them, around bytes that the process chose. Their values
must be read back unchanged.
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnprocd.process.procfs import Files, to_process
from cnprocd.process.stat import (
    parse_cgroup,
    parse_cmdline,
    parse_ids,
    parse_life,
    parse_stat,
    parse_status,
    text,
)


def stat_line(comm: bytes, state="S", ppid=1, threads=1, start=12345, pid=77) -> bytes:
    """proc_pid_stat(5): 52 fields, comm in parentheses and not escaped."""
    before = [ppid, 77, 77, 34816, 77, 4194304, 100, 0, 0, 0, 1, 2, 0, 0, 20, 0]
    after = [1000000, 300, 18446744073709551615, 4194304, *range(26)]
    rest = " ".join(map(str, [*before, threads, 0, start, *after]))
    return b"%d (%s) %s %s\n" % (pid, comm, state.encode(), rest.encode())


def test_the_line_has_the_fields_of_the_manual():
    assert len(stat_line(b"sh").split()) == 52


@given(
    comm=st.binary(max_size=15).map(lambda raw: raw.replace(b"\0", b"(")),
    state=st.sampled_from("RSDZTtXI"),
    ppid=st.integers(0, 2**22),
    threads=st.integers(0, 40_000),
    start=st.integers(0, 2**63),
)
def test_stat_is_read_around_any_comm(comm, state, ppid, threads, start):
    stat = parse_stat(stat_line(comm, state, ppid, threads, start))
    assert stat.comm.encode("utf-8", "surrogateescape") == comm
    assert (stat.state, stat.ppid, stat.threads, stat.start_ticks) == (state, ppid, threads, start)


@pytest.mark.parametrize(
    ("memory", "code", "executing"),
    [
        (1000000, 0, True),  # between the new comm and the new program's code
        (1000000, 4194304, False),
        (1000000, 1, False),  # the reader may not know where the code is
        (0, 0, False),  # a zombie or a kernel thread
    ],
)
def test_an_exec_that_is_under_way_is_detected(memory, code, executing):
    line = stat_line(b"sh").replace(b"1000000 300 18446744073709551615 4194304 ", b"%d 300 1 %d " % (memory, code))
    assert parse_stat(line).is_executing is executing
    shown = to_process(77, Files(line, program=bytes(17) + b"/bin/sh"), "exec")
    assert (shown.comm, shown.comm_source) == ((None, "unknown") if executing else ("sh", "exec"))
    assert (shown.exe_claimed is None) is executing


@pytest.mark.parametrize(
    "comm", [b"a b", b"a) R 1 1 (b", b") Z 0 0", b"((((", b"))))", b"a\nb", b"", b"\xff\xfe", b") R 1 2 3 4 5"]
)
def test_a_comm_that_imitates_the_fields_is_parsed_as_comm(comm):
    stat = parse_stat(stat_line(comm, "S", ppid=42))
    assert (stat.comm.encode("utf-8", "surrogateescape"), stat.state, stat.ppid) == (comm, "S", 42)


@pytest.mark.parametrize(
    "raw", [b"", b"77", b"77 (sh", b"77 sh) S 1", b"77 (sh) S 1 2", b")(", b"77 (sh) " + b"x " * 30]
)
def test_what_is_no_stat_line_is_refused(raw):
    with pytest.raises(ValueError):
        parse_stat(raw)


@given(st.binary(max_size=300))
def test_random_bytes_are_read_or_refused(raw):
    try:
        parse_stat(raw)
    except ValueError:
        return


@pytest.mark.parametrize(
    ("state", "threads", "dead"),
    [
        ("Z", 1, True),
        ("Z", 3, False),
        ("Z", 0, True),
        ("X", 1, True),
        ("S", 1, False),
        ("R", 5, False),
        ("T", 1, False),
    ],
)
def test_a_zombie_leader_whose_threads_live_on_is_not_dead(state, threads, dead):
    assert parse_stat(stat_line(b"x", state, threads=threads)).is_dead is dead


# --- ids


def status_file(name: str, uid=(1000, 1001, 1002, 1003), gid=(100, 101, 102, 103)) -> bytes:
    """/proc/PID/status; the kernel escapes newlines and backslashes in the Name line."""
    lines = [f"Name:\t{name}", "Umask:\t0022", "State:\tS (sleeping)", "Tgid:\t77", "PPid:\t1"]
    lines += ["Uid:\t" + "\t".join(map(str, uid)), "Gid:\t" + "\t".join(map(str, gid)), "FDSize:\t64", ""]
    return "\n".join(lines).encode()


@pytest.mark.parametrize("name", ["sh", r"x\nUid:\t0\t0\t0\t0", "Uid: 0", "Gid:\t0", ""])
def test_real_ids_are_read_and_a_name_forges_none(name):
    assert parse_ids(status_file(name)) == (1000, 100)


@pytest.mark.parametrize(
    "raw", [b"", b"Name:\tsh\n", b"Uid:\t0\t0\t0\t0\n", b"Gid:\t0\t0\t0\t0\n", b"Uid:\tx\nGid:\ty\n"]
)
def test_a_status_without_ids_is_refused(raw):
    with pytest.raises(ValueError):
        parse_ids(raw)


# --- cmdline


@pytest.mark.parametrize(
    ("raw", "line"),
    [
        (b"/bin/sh\0-c\0exit 3\0", "/bin/sh -c exit 3"),
        (b"", None),
        (b"\0\0\0", None),
        (b"nginx: master process\0\0\0\0", "nginx: master process"),
        (b"a\0\0b\0", "a  b"),
        (b"no nul at the end", "no nul at the end"),
        (b"\xff\0\x1b[31m\n\0", "\udcff \x1b[31m\n"),
    ],
)
def test_cmdline_is_joined_by_spaces(raw, line):
    assert parse_cmdline(raw) == line


def test_an_endless_cmdline_is_cut():
    assert len(parse_cmdline(b"x" * 100_000)) == 4096


@given(st.binary(max_size=40))
def test_text_keeps_every_byte(raw):
    assert text(raw).encode("utf-8", "surrogateescape") == raw


# --- cgroup, unit, container


@pytest.mark.parametrize(
    ("raw", "path"),
    [
        (b"0::/system.slice/nginx.service\n", "/system.slice/nginx.service"),
        (b"0::/\n", "/"),
        (b"", None),
        (b"12:memory:/a\n1:name=systemd:/system.slice/x.service\n0::/\n", "/system.slice/x.service"),  # hybrid
        (b"1:name=systemd:/user.slice\n", "/user.slice"),  # legacy
        (b"12:memory:/only\n", None),
        (b"1:name=systemd:/named\n0::/unified.slice\n", "/unified.slice"),
        (b"0::/with:colon/a:b.service\n", "/with:colon/a:b.service"),
        (b"0::/bad\xffbyte\n", "/bad\udcffbyte"),
        (b"0::/gone.service (deleted)\n", "/gone.service"),
    ],
)
def test_the_cgroup_is_the_one_systemd_uses(raw, path):
    assert parse_cgroup(raw) == path


@pytest.mark.parametrize("status", [b"Uid:", b"Uid:\nGid:\n", b"Uid:\t1\t1\nGid:", b"Uid:\t\t\nGid:\t1\n"])
def test_found_by_fuzzing_an_id_line_without_ids_is_no_ids(status):
    with pytest.raises(ValueError, match=r"no ids|no Uid"):
        parse_ids(status)


# --- status


@pytest.mark.parametrize(
    ("name", "comm"),
    [(b"sh", "sh"), (rb"a\nUid:\t0", "a\nUid:\\t0"), (rb"b\\n", "b\\n"), (b"", ""), (b"\xff", "\udcff")],
)
def test_status_shows_the_true_name(name, comm):
    """The kernel escapes newline and backslash, and nothing else (fs/proc/array.c proc_task_name)."""
    raw = b"Name:\t" + name + b"\nState:\tS (sleeping)\nPPid:\t7\nUid:\t1\t2\t3\t4\nGid:\t5\t6\t7\t8\nThreads:\t3\n"
    assert parse_status(raw) == (comm, 7, 3, False, 1, 5, 2, False)


@pytest.mark.parametrize(
    ("state", "threads", "dead"), [("Z", 1, True), ("Z", 3, False), ("X", 1, True), ("S", 1, False)]
)
def test_status_of_a_zombie_leader_whose_threads_live_on(state, threads, dead):
    raw = f"Name:\tx\nState:\t{state} (zombie)\nPPid:\t7\nUid:\t1\t2\nGid:\t5\t6\nThreads:\t{threads}\n"
    assert parse_status(raw.encode()).is_dead is dead


@given(
    st.sampled_from([b"x", rb"a\nState:", b"State:\tZ", b"VmSize:\t1", rb"\\", b""]),
    st.sampled_from([b"Z (zombie)", b"X (dead)", b"S (sleeping)", b"R (running)"]),
    st.integers(0, 12),
    st.booleans(),
)
def test_the_life_of_a_process_is_that_of_its_whole_status(name, state, threads, has_memory):
    size = b"VmPeak:\t9 kB\nVmSize:\t9 kB\n" if has_memory else b""
    ids = b"PPid:\t7\nUid:\t1\t2\nGid:\t5\t6\n"
    raw = b"Name:\t%s\nState:\t%s\n%s%sThreads:\t%d\nSigQ:\t0/1\n" % (name, state, ids, size, threads)
    whole = parse_status(raw)
    assert parse_life(raw) == (whole.is_dead, whole.has_memory)
    with pytest.raises(ValueError, match="status"):
        parse_life(raw.replace(b"State", b"state", 1) if b"State" not in name else b"Name:\tx\n")


@given(st.binary(max_size=300))
def test_random_bytes_are_no_status_or_a_whole_one(raw):
    try:
        parse_status(raw)
    except ValueError:
        return


def test_status_and_stat_of_this_process_agree():
    with open("/proc/self/stat", "rb") as stat, open("/proc/self/status", "rb") as status:
        one, other = parse_stat(stat.read()), parse_status(status.read())
    assert (one.comm, one.ppid, one.threads, one.is_dead) == (other.comm, other.ppid, other.threads, other.is_dead)
    assert other.has_memory
    with open("/proc/self/status", "rb") as status:
        assert parse_life(status.read()) == (other.is_dead, other.has_memory)
